"""Ctrl-C while libraries are imported, of which some turn a KeyboardInterrupt into other errors."""

import contextlib
import os
import signal
from collections.abc import Iterator

from tiny_onn.config.launcher import is_first


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process within the context, in which nothing is done that could be lost.

    numpy, torch and transformers catch the interrupt of an import, and go on with half a module.
    A handler that is not Python's own stays, as where a shell started the process to ignore Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: object) -> None:
    if is_first():
        # A spinner hides the cursor, and leaves its line.
        restored = b"\r\x1b[2K\x1b[?25h" if os.isatty(2) else b""
        with contextlib.suppress(OSError):
            os.write(2, restored + b"tiny-onn: interrupted\n")
    os._exit(130)
