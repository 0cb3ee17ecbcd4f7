"""Arguments of `eval --tasks`, and its table."""

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from tiny_onn.cli.arguments import (
    require,
    require_student,
    require_text_and_budgets,
    starting,
)
from tiny_onn.errors import UserError

if TYPE_CHECKING:
    from tiny_onn.cli.evaluate import Eval

Off = arg(help_behavior_hint="(default: off)")


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Measure on tasks of lm-evaluation-harness instead of text."""

    tasks: Annotated[
        str | None,
        arg(
            metavar="TASK,TASK",
            help="Tasks of lm-evaluation-harness for student and teacher, as arc_easy,hellaswag."
            " Needs `pip install lm-eval scipy`.",
            help_behavior_hint="(optional)",
        ),
    ] = None
    tasks_folder: Annotated[
        Path | None,
        arg(
            metavar="FOLDER",
            help="Folder with YAML files of your own tasks, which need no network.",
            help_behavior_hint="(optional)",
        ),
    ] = None
    num_fewshot: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: as the task says)")
    ] = None
    """Solved examples before each question of --tasks."""
    limit: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Maximum number of questions of each task."""
    batch_size: int = 8
    """Number of texts of --tasks that a model reads at once."""
    chat: Annotated[bool, Off] = False
    """Put the questions of --tasks into the tokenizer's chat template."""


# Without a name for the table, its options have no prefix.
Options = Annotated[Tasks, arg(name="")]
NO_TASKS = Tasks()


def asked(options: Tasks) -> bool:
    """Return True if tasks are asked for.

    Raises:
        UserError: an option of tasks is given without them.
    """
    if options.tasks is not None:
        return True
    for field in fields(Tasks):
        if getattr(options, field.name) != field.default:
            name = f"--{field.name.replace('_', '-')}"
            raise UserError(f"{name}: got no --tasks, which it is for; add --tasks or leave it out")
    return False


def run(verb: "Eval") -> None:
    """Run `eval --tasks`.

    Raises:
        UserError: an option is out of its range, or does not go with --tasks.
    """
    from tiny_onn.config.checks import parse_budgets

    options = verb.by_tasks
    assert options.tasks is not None
    names = [name.strip() for name in options.tasks.split(",")]
    if not all(names):
        raise UserError(
            f"--tasks: got {options.tasks}, expected names with commas between them, as in"
            " arc_easy,hellaswag"
        )
    for name, given in (
        ("--text", verb.text is not None),
        ("--frontier", verb.frontier),
        ("--stride", verb.stride is not None),
        ("--max-tokens", verb.max_tokens != type(verb).max_tokens),
    ):
        if given:
            raise UserError(f"{name}: got --tasks too, expected one of them; leave one out")
    budgets = [] if verb.budget is None else parse_budgets(verb.budget)
    if len(budgets) > 1:
        raise UserError(
            f"--budget: got {verb.budget} with --tasks, expected one number; run the tasks once for"
            " each"
        )
    for name, value, least in (
        ("--num-fewshot", options.num_fewshot, 0),
        ("--limit", options.limit, 1),
        ("--batch-size", options.batch_size, 1),
    ):
        if value is not None:
            require(least <= value < 2**31, name, value, f"an integer from {least} to 2**31 - 1")
    require_student(verb.model)
    require_text_and_budgets(verb.model, None, budgets)
    with starting():
        from tiny_onn.evaluation.harness import run_tasks

    # Standard output holds the result alone, so that it can be piped.
    with contextlib.redirect_stdout(sys.stderr):
        result = run_tasks(
            verb.model,
            device=verb.device,
            checkpoint=verb.checkpoint,
            teacher=verb.teacher,
            quantize=verb.quantize,
            budget=budgets[0] if budgets else None,
            out=verb.out,
            options={
                "tasks": names,
                "tasks_folder": options.tasks_folder,
                "num_fewshot": options.num_fewshot,
                "limit": options.limit,
                "batch_size": options.batch_size,
                "chat": options.chat,
            },
        )
    if verb.json:
        print(json.dumps(result, indent=2))
    else:
        _print_rows(result["rows"])


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.text import Text

    from tiny_onn.report.terminal import add_numbers, narrow_table

    table = narrow_table(Text("Student and teacher by task"))
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    add_numbers(table, ("n", "student", "teacher", "difference", "95 %"))
    for row in rows:
        ends = row["interval"]
        metric = row["metric"] + ("" if row["filter"] == "none" else f" ({row['filter']})")
        table.add_row(
            row["task"],
            metric,
            str(row["num_documents"]),
            *(f"{row[name]:.4g}" for name in ("student", "teacher")),
            f"{row['difference']:+.3g}",
            "" if ends is None else f"{ends[0]:+.3g} to {ends[1]:+.3g}",
        )
    Console().print(table)
