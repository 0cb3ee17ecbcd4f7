"""Arguments that several verbs share, with their help texts, and checks that need no torch.

A help text stands in `arg(help=...)` where it is longer than a line, because tyro keeps the line
breaks of a docstring under a field.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from tiny_onn.cli.importing import leaving_at_once
from tiny_onn.errors import UserError
from tiny_onn.publish import nearest_existing

RunToml = Annotated[
    Positional[Path | None],
    arg(
        metavar="RUN.toml",
        help="A TOML file of settings; `tiny-onn config` prints one.",
        help_behavior_hint="(optional)",
    ),
]
Preset = Annotated[
    str | None,
    arg(
        metavar="NAME",
        help="Preset to start from; settings in RUN.toml override it.",
        help_behavior_hint="(optional)",
    ),
]
Overrides = Annotated[
    UseAppendAction[tuple[str, ...]],
    arg(
        name="set",
        metavar="SECTION.KEY=VALUE",
        help="Value of one setting, which overrides the preset and RUN.toml.",
    ),
]
Out = Annotated[
    Path | None,
    arg(
        metavar="FOLDER",
        help="Folder to write the run to.",
        help_behavior_hint="(default: runs/NAME-TIME)",
    ),
]
Model = Annotated[Positional[str], arg(metavar="MODEL")]
Checkpoint = Annotated[
    str,
    arg(
        metavar="newest|best|STEP",
        help="Which student of a run to use: the newest, the one with the best held-out KL, or the"
        " one saved at a step.",
    ),
]
Runs = Annotated[
    Positional[tuple[Path, ...]],
    arg(
        metavar="RUN",
        help="Run folders, or folders that hold several of them, as the demo writes. A run that"
        " still trains can be read too.",
        help_behavior_hint="(required)",
    ),
]
Teacher = Annotated[
    str | None,
    arg(
        metavar="PATH_OR_HUB_ID",
        help="The model that the student was converted from, if it is no longer where the student"
        " recorded it.",
        help_behavior_hint="(optional)",
    ),
]
ComputeDevice = Annotated[
    str,
    arg(
        metavar="auto|cpu|cuda|cuda:N",
        help="Device to compute on; auto takes the GPU if there is one.",
    ),
]
Quantize = Annotated[
    Literal["none", "nf4", "int8"],
    arg(
        help="Number format in which the student's experts are held in memory: nf4, 4 bits, which"
        " needs bitsandbytes, or int8, 8 bits.",
    ),
]
Json = Annotated[
    bool, arg(help="Print JSON and nothing else.", help_behavior_hint="(default: off)")
]


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Show a spinner while torch is imported, which takes seconds, and then set up transformers."""
    from tiny_onn.console import console, status

    spinner = status("Starting") if console().is_terminal else contextlib.nullcontext()
    with leaving_at_once(), spinner:
        yield
        from tiny_onn.teacher.load import quiet_transformers

        quiet_transformers()


def default_out(name: str) -> Path:
    """Return the folder for results of this name: `runs/NAME-TIME`.

    Raises:
        UserError: nothing can be written there.
    """
    runs = Path("runs")
    require_place(runs, "--out")
    return runs / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def parse_layers(text: str | None) -> list[int]:
    """Return the numbers in the value of --layers.

    Raises:
        UserError: the value is not a list of integers.
    """
    parts = [] if text is None else text.split(",")
    for part in parts:
        if not (part.strip().isascii() and part.strip().isdigit()):
            raise UserError(
                f"--layers: got {text}, expected integers with commas between them; for example"
                " 4,15,26"
            )
    return [int(part) for part in parts]


def require_runs(runs: Sequence[Path]) -> None:
    """Refuse an empty list of runs, and folders that hold no run.

    Raises:
        UserError: no run was named, or a folder holds none.
    """
    from tiny_onn.runs.folder import runs_in

    if not runs:
        raise UserError(
            "RUN: got none, expected the folder of a run or several; name one, as runs/mine"
        )
    for run in runs:
        runs_in(run)


def require_student(model: str) -> None:
    """Refuse a student whose folder does not exist, or holds several runs.

    Raises:
        UserError: there is no such folder, or not one student in it.
    """
    from tiny_onn.runs.folder import no_student, refuse_several

    # Path.is_dir raises an error for a name that is too long, os.path.isdir returns False.
    if not os.path.isdir(model):  # noqa: PTH112
        raise no_student(model)
    refuse_several(Path(model))


def require_text_and_budgets(model: str, text: Path | None, budgets: Sequence[float]) -> None:
    """Refuse a text that cannot be read, and budgets that the student in a folder cannot have.

    Raises:
        UserError: there is no such text, or the student's settings refuse a budget.
    """
    from tiny_onn.config.checks import check_budget
    from tiny_onn.config.routing_checks import has_budget
    from tiny_onn.config.schema import RunConfig
    from tiny_onn.data.sources import check_text
    from tiny_onn.runs.folder import settings_of_student

    settings = settings_of_student(model)
    if settings is not None:
        for budget in budgets:
            check_budget(
                budget,
                num_experts=settings.experts.num_experts,
                num_shared=settings.experts.num_shared,
                selection=settings.router.selection,
                is_mean=has_budget(settings.router),
            )
    if text is not None:
        check_text(text, (settings or RunConfig()).data.text_field)


def require_place(folder: Path, name: str) -> None:
    """Refuse a folder that cannot be written to or created, before the work whose results go there.

    Raises:
        UserError: the option `name` got such a folder.
    """
    there = nearest_existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "may not be written to" if there.is_dir() else "is no folder"
        raise UserError(
            f"{name}: got {folder}, expected a folder to write to, and {there} {reason}; choose"
            " another"
        )


def require_model(model: str) -> None:
    """Refuse a model that is neither `embedded`, nor a folder, nor a hub id that can be had.

    Raises:
        UserError: there is no such model, or the folder holds several runs.
    """
    from tiny_onn.runs.folder import refuse_several
    from tiny_onn.teacher.model_paths import find_model

    if model != "embedded":
        refuse_several(Path(find_model(model, "MODEL")))


def require(accepted: bool, name: str, value: int | float, expected: str) -> None:
    """Refuse the value of an option unless it is accepted.

    Raises:
        UserError: the value is not accepted.
    """
    if not accepted:
        raise UserError(f"{name}: got {value}, expected {expected}; leave it out for the default")
