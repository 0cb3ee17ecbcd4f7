"""The verb `eval`."""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from tiny_onn.cli import harness
from tiny_onn.cli.arguments import (
    Checkpoint,
    ComputeDevice,
    Json,
    Model,
    Quantize,
    Teacher,
    require,
    require_place,
    require_student,
    require_text_and_budgets,
    starting,
)


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure a student's quality and cost against its teacher.

    Example: tiny-onn eval runs/mine --json > eval.json

    The numbers are given twice: as the student is deployed, and at exactly the mean number of
    active experts that its budget asks for, so that students compare at equal compute. They come
    with 95 % intervals over documents, and by domain. docs/evaluation.md explains each of them.
    """

    model: Model
    """The folder of a run or of a student."""
    checkpoint: Checkpoint = "newest"
    teacher: Teacher = None
    text: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(default: the run's held-out text)")
    ] = None
    """A file, or a folder of files, with text to measure on."""
    device: ComputeDevice = "auto"
    quantize: Quantize = "none"
    max_tokens: Annotated[
        int,
        arg(
            help="Maximum number of tokens to read; 0 reads the whole text. Whole rows, as the run"
            " evaluated on, are read, at least one; with --stride, whole windows.",
        ),
    ] = 8192
    stride: Annotated[
        int | None,
        arg(
            metavar="INT",
            help="Read documents in overlapping windows that begin so many tokens apart; each token"
            " then sees more of the text before it, and reading takes longer.",
            help_behavior_hint="(default: windows do not overlap)",
        ),
    ] = None
    budget: Annotated[
        str | None,
        arg(
            metavar="K,K",
            help="Mean number of active experts per token to run the student at. Several numbers,"
            " as in 24,16,8, give a table.",
            help_behavior_hint="(default: the number in training)",
        ),
    ] = None
    frontier: Annotated[bool, arg(help_behavior_hint="(default: off)")] = False
    """Measure at several budgets, from all experts down to an eighth of them."""
    out: Annotated[
        Path | None,
        arg(
            metavar="FOLDER",
            help="Folder for the JSON of --budget, --frontier or --tasks, and for the picture. With"
            " the run's own folder, report and compare read its budgets.",
            help_behavior_hint="(default: nothing is written)",
        ),
    ] = None
    json: Json = False
    by_tasks: harness.Options = harness.NO_TASKS

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.config.checks import check_device
        from tiny_onn.errors import UserError

        check_device(self.device, "--device")
        require(
            0 <= self.max_tokens < 2**31,
            "--max-tokens",
            self.max_tokens,
            "an integer from 0 to 2**31 - 1",
        )
        at_budgets = self.frontier or self.budget is not None
        if self.out is not None:
            require_place(self.out, "--out")
            if not at_budgets and not harness.asked(self.by_tasks):
                raise UserError(
                    f"--out: got {self.out}, expected --budget, --frontier or --tasks beside it,"
                    " whose results it keeps; add one of them, or keep the output of --json"
                )
        if harness.asked(self.by_tasks):
            harness.run(self)
            return
        if at_budgets:
            self._frontier()
            return
        require_student(self.model)
        require_text_and_budgets(self.model, self.text, ())
        from rich.console import Console

        with starting():
            from tiny_onn.evaluation.evaluate import run_eval
            from tiny_onn.report.evaluation import eval_tables

        # Standard output holds the result alone, so that it can be piped.
        with contextlib.redirect_stdout(sys.stderr):
            result = run_eval(
                self.model,
                text=self.text,
                device=self.device,
                max_tokens=self.max_tokens,
                stride=self.stride,
                checkpoint=self.checkpoint,
                teacher=self.teacher,
                quantize=self.quantize,
            )
        if self.json:
            print(json.dumps(result, indent=2))
        else:
            Console().print(eval_tables(result))

    def _frontier(self) -> None:
        from tiny_onn.config.checks import parse_budgets
        from tiny_onn.errors import UserError

        if self.frontier and self.budget is not None:
            raise UserError("--frontier: got --budget too, expected one of them; leave one out")
        budgets = () if self.budget is None else parse_budgets(self.budget)
        require_student(self.model)
        require_text_and_budgets(self.model, self.text, budgets)
        from rich.console import Console

        with starting():
            from tiny_onn.evaluation.frontier import run_frontier
            from tiny_onn.report.frontier import frontier_tables

        with contextlib.redirect_stdout(sys.stderr):
            result = run_frontier(
                self.model,
                budgets=budgets,
                text=self.text,
                device=self.device,
                max_tokens=self.max_tokens,
                stride=self.stride,
                out=self.out,
                checkpoint=self.checkpoint,
                teacher=self.teacher,
                quantize=self.quantize,
            )
        if self.json:
            print(json.dumps(result, indent=2))
        else:
            Console().print(frontier_tables(result))
