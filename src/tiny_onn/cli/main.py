"""The command line: parse, call, print.

Every verb is a dataclass whose fields are its arguments. A verb imports torch and transformers,
which take seconds to load, only after its arguments and settings are checked, so that `--help`,
`config` and reports of mistakes do not wait for them.
"""

import atexit
import difflib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import get_args

import tyro

from tiny_onn.cli.cache import Cache
from tiny_onn.cli.chat import Chat
from tiny_onn.cli.compare import Compare
from tiny_onn.cli.config import Config
from tiny_onn.cli.demo import Demo
from tiny_onn.cli.distill import Distill
from tiny_onn.cli.evaluate import Eval
from tiny_onn.cli.export import Export
from tiny_onn.cli.generate import Generate
from tiny_onn.cli.plan import Plan
from tiny_onn.cli.probe import Probe
from tiny_onn.cli.report import Report
from tiny_onn.cli.watch import Watch
from tiny_onn.config.launcher import is_first, num_processes
from tiny_onn.errors import RankError, UserError, printable, reason_line

Verb = (
    Demo
    | Plan
    | Cache
    | Distill
    | Watch
    | Eval
    | Probe
    | Report
    | Compare
    | Generate
    | Chat
    | Export
    | Config
)
VERBS = tuple(verb.__name__.lower() for verb in get_args(Verb))
REFUSALS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
)
"""Errors of the file system that are no defect of the program, wherever they come from."""
TELLING_S = 10.0
"""Seconds for which a process that says nothing of an error waits for the one that does."""
ENDING_S = 5.0
"""Seconds that the interpreter has to end after an interrupt before a signal may end it at once."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for a user's mistake, 130 for Ctrl-C.

    Args:
        argv: the arguments, without the program's name; by default the process's own.

    Raises:
        SystemExit: the parser has printed help (0) or refused a malformed command line (2).
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments == ["--version"]:
        from tiny_onn.runs.environment import own_version

        print(f"tiny-onn {own_version()}")
        return 0
    if arguments and arguments[0].isidentifier() and arguments[0] not in VERBS:
        near = difflib.get_close_matches(arguments[0], VERBS, 1) or VERBS
        _complain(
            f"error: got {arguments[0]}, expected a verb; did you mean {', '.join(near)}?"
            " `tiny-onn --help` explains them"
        )
        return 2
    try:
        verb = tyro.cli(
            Verb,
            prog="tiny-onn",
            description="Turn a dense language model into one of many small experts, of which each"
            " token uses a few, by distillation.\n\nExample: tiny-onn demo",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        return _run(verb)
    except KeyboardInterrupt:
        _end_undisturbed()
        if is_first():
            _complain("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of standard output has left, as in `tiny-onn config | head`.
        _drop_output()
        return 141
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        if error.filename is None:
            _drop_output()
        where = printable(str(error.filename or "standard output, or a file"))
        _complain(
            f"error: {where}: got {error.strerror!r}, expected free disk and permission; free some"
            " space, or name another place"
        )
        return 2


def _run(verb: Callable[[], None]) -> int:
    try:
        if (number := num_processes()) > 1 and not isinstance(verb, Distill):
            raise UserError(
                f"{type(verb).__name__.lower()}: got {number} processes, expected one, because"
                " distill alone runs in several; start it without a launcher"
            )
        verb()
        sys.stdout.flush()
    except UserError as error:
        if is_first() or isinstance(error, RankError):
            _complain(f"error: {reason_line(error)}")
        else:
            # A launcher ends all processes when one has ended; the first one shall tell why before.
            time.sleep(TELLING_S)
        return 2
    return 0


def _drop_output() -> None:
    """Drop what standard output still holds: Python flushes it at exit, which must not fail too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end_undisturbed() -> None:
    """Let signals do nothing while the interpreter ends, unless it waits long for a thread."""
    until = time.monotonic() + ENDING_S

    def handle(*_: object) -> None:
        if time.monotonic() >= until:
            os._exit(130)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
        # Python resets other handlers after the functions at its exit, where none may be called.
        atexit.register(signal.signal, number, signal.SIG_IGN)


def _complain(text: str) -> None:
    """Print a line on standard error, which need not have a reader any more."""
    from tiny_onn.console import say

    say(f"tiny-onn: {text}")
