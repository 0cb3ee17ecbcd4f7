"""Arguments that several verbs share."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

_Run = Annotated[Positional[Path | None], arg(metavar="RUN.toml", help_behavior_hint="(optional)")]


_Preset = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(optional)")]


_Overrides = Annotated[
    UseAppendAction[tuple[str, ...]], arg(name="set", metavar="SECTION.KEY=VALUE")
]


_Out = Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(runs/NAME-TIME)")]


_Results = Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(runs/VERB-TIME)")]


_Budget = Annotated[str | None, arg(metavar="K,K", help_behavior_hint="(as trained)")]


_Model = Annotated[Positional[str], arg(metavar="MODEL")]


_Checkpoint = Annotated[str, arg(metavar="newest|best|STEP")]


_Runs = Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN")]


_Teacher = Annotated[
    str | None, arg(metavar="PATH_OR_HUB_ID", help_behavior_hint="(where it was recorded)")
]


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Show that something happens while torch is imported, which takes seconds, and set it up."""
    from tiny_onn.console import console, stage

    with stage("Starting") if console().is_terminal else contextlib.nullcontext():
        yield
        from tiny_onn.teacher.load import quiet_transformers

        quiet_transformers()


def _default_out(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _parse_layers(text: str | None) -> list[int]:
    from tiny_onn.errors import UserError

    parts = [] if text is None else text.split(",")
    for part in parts:
        if not (part.strip().isascii() and part.strip().isdigit()):
            raise UserError(f"--layers: got {text}, expected integers with commas; as 4,15,26")
    return [int(part) for part in parts]


def _require_runs(runs: Sequence[Path]) -> None:
    from tiny_onn.errors import UserError

    if not runs:
        raise UserError(
            "RUN: got none, expected the folder of a run or several; for example runs/mine"
        )


def _require(accepted: bool, name: str, value: int | float, expected: str) -> None:
    from tiny_onn.errors import UserError

    if not accepted:
        raise UserError(f"{name}: got {value}, expected {expected}; leave it out for the default")


def _print_table(result: Mapping[str, object], prefix: str = "") -> None:
    for key, value in result.items():
        if isinstance(value, Mapping):
            _print_table(value, f"{prefix}{key}.")
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{prefix + key:40} {shown}")
