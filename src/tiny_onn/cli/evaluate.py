"""The verb `eval`."""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from tiny_onn.cli.arguments import (
    Budget,
    Checkpoint,
    Model,
    Results,
    Teacher,
    default_out,
    print_table,
    require,
    starting,
)


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure a student's quality and cost against its teacher.

    Example: tiny-onn eval runs/mine --json > eval.json
    """

    model: Model
    """A run folder, or the folder of a converted model."""
    checkpoint: Checkpoint = "newest"
    """Which of a run's students: the newest, the best by held-out KL, or that of a step."""
    teacher: Teacher = None
    """The model that the student was converted from, if it has moved since."""
    text: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(held-out text)")] = None
    """Text to measure on, a file or a folder."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    max_tokens: int = 8192
    """Tokens to read at most."""
    budget: Budget = None
    """Mean active experts a token to run the student at; several, as 24,16,8, give a table."""
    frontier: bool = False
    """Measure at several budgets, from all experts to an eighth of them."""
    out: Results = None
    """Folder for a frontier's JSON and picture."""
    json: bool = False
    """Print JSON and nothing else."""

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.config.checks import check_device

        check_device(self.device, "--device")
        require(
            1 <= self.max_tokens < 2**31,
            "--max-tokens",
            self.max_tokens,
            "an integer from 1 to 2**31 - 1",
        )
        if self.frontier or self.budget is not None:
            self._frontier()
            return
        with starting():
            from tiny_onn.evaluation.evaluate import run_eval

        # Standard output belongs to the result.
        with contextlib.redirect_stdout(sys.stderr):
            result = run_eval(
                self.model,
                text=self.text,
                device=self.device,
                max_tokens=self.max_tokens,
                checkpoint=self.checkpoint,
                teacher=self.teacher,
            )
        if self.json:
            print(json.dumps(result, indent=2))
        else:
            print_table(result)

    def _frontier(self) -> None:
        from tiny_onn.config.checks import parse_budgets
        from tiny_onn.errors import UserError

        if self.frontier and self.budget is not None:
            raise UserError("--frontier: got --budget too, expected one of them; leave one out")
        budgets = () if self.budget is None else parse_budgets(self.budget)
        from rich.console import Console

        with starting():
            from tiny_onn.evaluation.frontier import run_frontier
            from tiny_onn.report.frontier import frontier_table

        with contextlib.redirect_stdout(sys.stderr):
            result = run_frontier(
                self.model,
                budgets=budgets,
                text=self.text,
                device=self.device,
                max_tokens=self.max_tokens,
                out=default_out("frontier") if self.out is None else self.out,
                checkpoint=self.checkpoint,
                teacher=self.teacher,
            )
        if self.json:
            print(json.dumps(result, indent=2))
        else:
            Console().print(frontier_table(result))
