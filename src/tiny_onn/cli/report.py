"""The verb `report`."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from tiny_onn.cli.arguments import (
    ComputeDevice,
    Runs,
    Teacher,
    require_place,
    require_runs,
    starting,
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML page about one or several runs, which can be read without a network.

    Example: tiny-onn report runs/mine runs/static

    Two parts of the page need the student: a held-out passage token by token, and which experts
    work together. The student is loaded once, and the run's view.json keeps the measurements. If
    the student cannot be loaded, the page gives the reason. Name controls, which are runs with
    router.selection = "static" or "random", together with the run that they belong to.
    """

    runs: Runs
    teacher: Teacher = None
    device: ComputeDevice = "auto"
    skip_models: Annotated[bool, arg(help_behavior_hint="(default: off)")] = False
    """Load no models; the page then shows only the records of the runs."""
    out: Annotated[
        Path | None,
        arg(metavar="FILE", help_behavior_hint="(default: report.html in the runs' folder)"),
    ] = None
    """The HTML file to write."""

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.config.checks import check_device

        check_device(self.device, "--device")
        require_runs(self.runs)
        if self.out is not None:
            require_place(self.out.parent, "--out")
        with starting():
            from tiny_onn.studies.report import run_report

        # Standard output holds the result alone, so that it can be piped.
        with contextlib.redirect_stdout(sys.stderr):
            page = run_report(
                self.runs,
                out=self.out,
                device=self.device,
                teacher=self.teacher,
                models=not self.skip_models,
            )
        print(page)
