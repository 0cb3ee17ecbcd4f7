"""Arguments that several verbs share."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from tiny_onn.errors import UserError

RunToml = Annotated[
    Positional[Path | None], arg(metavar="RUN.toml", help_behavior_hint="(optional)")
]
Preset = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(optional)")]
Overrides = Annotated[
    UseAppendAction[tuple[str, ...]], arg(name="set", metavar="SECTION.KEY=VALUE")
]
Out = Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(runs/NAME-TIME)")]
Results = Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(runs/VERB-TIME)")]
Budget = Annotated[str | None, arg(metavar="K,K", help_behavior_hint="(as trained)")]
Model = Annotated[Positional[str], arg(metavar="MODEL")]
Checkpoint = Annotated[str, arg(metavar="newest|best|STEP")]
Runs = Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN")]
Teacher = Annotated[
    str | None, arg(metavar="PATH_OR_HUB_ID", help_behavior_hint="(where it was recorded)")
]


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Show that something happens while torch is imported, which takes seconds, and set it up."""
    from tiny_onn.console import console, status

    with status("Starting") if console().is_terminal else contextlib.nullcontext():
        yield
        from tiny_onn.teacher.load import quiet_transformers

        quiet_transformers()


def default_out(name: str) -> Path:
    """Return the folder of a run that was given no name: the verb and the time."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def parse_layers(text: str | None) -> list[int]:
    """Return the numbers in the value of --layers.

    Raises:
        UserError: The value is not a list of integers.
    """
    parts = [] if text is None else text.split(",")
    for part in parts:
        if not (part.strip().isascii() and part.strip().isdigit()):
            raise UserError(f"--layers: got {text}, expected integers with commas; as 4,15,26")
    return [int(part) for part in parts]


def require_runs(runs: Sequence[Path]) -> None:
    """Refuse an empty list of runs.

    Raises:
        UserError: No run was named.
    """
    if not runs:
        raise UserError(
            "RUN: got none, expected the folder of a run or several; for example runs/mine"
        )


def require(accepted: bool, name: str, value: int | float, expected: str) -> None:
    """Refuse the value of an option unless it is accepted.

    Raises:
        UserError: It is not.
    """
    if not accepted:
        raise UserError(f"{name}: got {value}, expected {expected}; leave it out for the default")


def print_table(result: Mapping[str, object], prefix: str = "") -> None:
    """Print a nested dictionary, one line a number, names joined by dots."""
    for key, value in result.items():
        if isinstance(value, Mapping):
            print_table(value, f"{prefix}{key}.")
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{prefix + key:40} {shown}")
