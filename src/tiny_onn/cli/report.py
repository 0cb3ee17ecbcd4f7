"""The verb `report`."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from tiny_onn.cli.arguments import Runs, Teacher, require_runs, starting


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML page that shows what runs did; it needs no network.

    Example: tiny-onn report runs/mine runs/static

    A held-out passage token by token, and which experts work together, need the student: it is
    loaded once, and the run's view.json keeps what was measured. Where it cannot be loaded, the
    page says so. Controls (router.selection = "static" or "random") are given beside their run.
    """

    runs: Runs
    """Run folders, in the middle of training too, or folders of such as the demo makes."""
    teacher: Teacher = None
    """The model that the students were converted from, if it has moved since."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    skip_models: bool = False
    """Load no models: the page shows what the runs recorded."""
    out: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(report.html in the runs' folder)")
    ] = None
    """The page."""

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.config.checks import check_device

        check_device(self.device, "--device")
        require_runs(self.runs)
        with starting():
            from tiny_onn.studies.report import run_report

        # Standard output belongs to the result.
        with contextlib.redirect_stdout(sys.stderr):
            page = run_report(
                self.runs,
                out=self.out,
                device=self.device,
                teacher=self.teacher,
                models=not self.skip_models,
            )
        print(page)
