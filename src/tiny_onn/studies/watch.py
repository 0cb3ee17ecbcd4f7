"""The verb `watch`: a run that another process writes, followed in the terminal."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tiny_onn.config.read import resolved_json
from tiny_onn.console import say
from tiny_onn.distill.health import diagnose, verdict
from tiny_onn.errors import UserError
from tiny_onn.report.live import live_view
from tiny_onn.report.run_data import STEPS, Run
from tiny_onn.runs.folder import (
    read_run_config,
    read_summary,
    refuse_several,
    resume_command,
    some_runs_in,
)
from tiny_onn.runs.lock import LOCK_NAME, is_held, other_host
from tiny_onn.runs.metrics import METRICS_NAME, MetricsTail
from tiny_onn.studies.report import check_records, news_of, process_of


class Follower:
    """The records of a run so far, read as they are written.

    Args:
        folder: the run folder, which need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._records = folder, list[dict[str, Any]]()
        self._tail = MetricsTail(folder / METRICS_NAME)

    @property
    def ended(self) -> bool:
        """True if the run has begun and no process writes it."""
        return (self._folder / "config.json").exists() and not is_held(self._folder)

    def state(self) -> str:
        """Tell in a sentence whether the run trains, waits or has ended."""
        folder = self._folder
        resume = f"`{resume_command(folder)}` continues it."
        if is_held(folder):
            if process_of(folder) == "silent":
                return (
                    f"no news since {news_of(folder)}; it is on {other_host(folder)}, whose"
                    f" processes cannot be asked from here. If it has ended, {resume}"
                )
            return "it trains." if self._records else "it is being prepared; no step is done yet."
        if not (folder / "config.json").exists():
            return "waiting for it to begin; Ctrl-C ends the wait."
        if (folder / LOCK_NAME).exists():
            return f"its process has ended without saving; {resume}"
        summary = read_summary(folder)
        if summary is not None and not summary.get("interrupted"):
            return "it has finished."
        if summary is not None:
            ended = "was interrupted;"
        elif any(record["step"] for record in self._records):
            ended = "was stopped before its end, by a signal or an error;"
        else:
            ended = (
                "ended before its first step, by a signal or an error; start it again with the same"
                " --out, or as it is:"
            )
        return f"it {ended} {resume}"

    def poll(self) -> Run | None:
        """Read what is new and return the run so far; None if it has not begun.

        Raises:
            UserError: a file of the run is damaged.
        """
        if not (self._folder / "config.json").exists():
            return None
        config = read_run_config(self._folder)
        new, anew = self._tail.poll()
        if anew:
            self._records = []
        check_records(self._folder / METRICS_NAME, new)
        self._records += new
        # The layers are most of a record, and only the newest ones are shown.
        with_layers = [r for r in self._records if r["kind"] in STEPS and r.get("layers")]
        for record in with_layers[:-1]:
            record["layers"] = None
        return Run(
            name=str(self._folder),
            config=json.loads(resolved_json(config)),
            environments=(),
            records=self._records,
            health=verdict(diagnose(self._records, config)),
            process=process_of(self._folder),
            news=news_of(self._folder),
        )

    def view(self) -> Any:  # noqa: ANN401 - whatever rich prints
        """Return what a terminal shows of the run now."""
        run = self.poll()
        if run is None:
            return Text.assemble((str(self._folder), "bold"), f": {self.state()}")
        return live_view(run, self.state())


def run_watch(folder: Path, *, interval_s: float, once: bool) -> None:
    """Show a run until it ends, or once.

    Args:
        folder: the run folder; unless `once`, a run that has not begun is waited for.
        interval_s: seconds between two looks at its files.
        once: True to show the run as it is now.

    Raises:
        UserError: the folder holds several runs, or none and `once` is set, or a file of the run is
            damaged.
    """
    refuse_several(folder)
    follower, console = Follower(folder), Console()
    if once:
        if follower.poll() is None:
            raise UserError(
                f"RUN: got {folder}, where no run has begun, expected the folder of a run; leave"
                " --once out to wait for it"
            )
        console.print(follower.view())
        return
    if follower.poll() is None:
        # Without a terminal the view is shown once, at the end.
        others = some_runs_in(folder.parent)
        found = f"; there are {others}" if others else ""
        say(f"{folder}: no run has begun there yet, and it is waited for{found}")
    with Live(follower.view(), console=console, auto_refresh=False) as live:
        while not follower.ended:
            time.sleep(interval_s)
            live.update(follower.view(), refresh=True)
        live.update(follower.view(), refresh=True)
