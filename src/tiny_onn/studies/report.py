"""The verbs `report` and `compare`: read run folders, measure what is missing, write the page."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from tiny_onn.console import say, status
from tiny_onn.distill.health import diagnose, verdict
from tiny_onn.errors import UserError, reason_line
from tiny_onn.report.comparing import Comparison, compare
from tiny_onn.report.page import report_page
from tiny_onn.report.run_data import EVALUATIONS, Run, distinct
from tiny_onn.report.terminal import add_numbers, narrow_table
from tiny_onn.runs.files import read_object
from tiny_onn.runs.folder import has_metrics, read_run_config, runs_in
from tiny_onn.runs.lock import LOCK_NAME, is_held, other_host
from tiny_onn.runs.metrics import METRICS_NAME, read_metrics
from tiny_onn.runs.records import BlockwiseRecord, EvaluationRecord, StepRecord

REPORT_NAME = "report.html"
# A process of another machine cannot be asked for. One that wrote nothing for so long may be gone.
SILENT_AFTER_S = 600.0


def run_report(
    folders: Sequence[Path],
    *,
    out: Path | None = None,
    device: str = "auto",
    teacher: str | None = None,
    models: bool = True,
) -> Path:
    """Write one page about runs and return its path.

    Args:
        folders: run folders, or folders that hold several runs, as `demo` makes them.
        out: the file; None: `report.html` in the only folder, or in the one that holds them all.
        device: the device to measure students on.
        teacher: the dense model of all runs, if it is no longer in its recorded place.
        models: true to load students and measure what the records do not hold; if a student cannot
            be loaded, the page gives the reason.

    Raises:
        UserError: a folder holds no run, or the page cannot be written.
    """
    path = _default_path(folders) if out is None else out
    runs = []
    for folder in (run for given in folders for run in runs_in(given)):
        run = read_run(folder)
        runs.append(_with_view(run, folder, device, teacher) if models else run)
    with status("Writing the report"):
        page = report_page(distinct(runs))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(page, encoding="utf-8", newline="\n")
        except OSError as error:
            raise UserError(
                f"--out: got {path}, expected a file to write to ({error.strerror}); choose another"
            ) from error
    return path


def run_compare(folders: Sequence[Path], mean_k: float | None = None) -> Comparison:
    """Rank runs by held-out KL at equal compute, and list the differences of their settings.

    Args:
        folders: run folders, or folders that hold several runs, as `demo` makes them.
        mean_k: the mean number of active experts per token to compare at; None: the number at which
            most runs were measured.

    Raises:
        UserError: a folder holds no run, or none of the runs was evaluated.
    """
    runs = distinct([read_run(run) for given in folders for run in runs_in(given)])
    most = max(run.config["experts"]["num_experts"] for run in runs)
    if mean_k is not None and not 1 <= mean_k <= most:
        raise UserError(
            f"--k: got {mean_k:g}, expected a number from 1 to {most}, the runs' experts per layer"
        )
    found = compare(runs, mean_k)
    left_out = [run.name for run in runs if run.last is None]
    if not found.rows:
        raise UserError(
            f"RUN: got {', '.join(left_out)} without an evaluation, expected runs that were"
            " evaluated; wait for the first evaluation, or resume the run with --resume"
        )
    for name in left_out:
        say(f"{name}: left out, because it has no evaluation yet")
    return found


def print_comparison(found: Comparison) -> None:
    """Print a comparison's tables to standard output, for a terminal."""
    console = Console()
    for title, header, rows in found.tables():
        table = narrow_table(Text(title))
        table.add_column(header[0], overflow="fold")
        add_numbers(table, header[1:])
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    console.print(Text(found.caption()))


def read_run(folder: Path) -> Run:
    """Read the content of a run's folder, without the measurements that need a model.

    Raises:
        UserError: the folder holds no run, or a file in it cannot be read.
    """
    config = read_run_config(folder)
    records = read_metrics(folder / METRICS_NAME) if has_metrics(folder) else []
    check_records(folder / METRICS_NAME, records)
    environments = sorted(folder.glob("environment*.json"), key=lambda path: path.stat().st_mtime)
    environments.sort(key=lambda path: (len(path.name), path.name))
    return Run(
        name=folder.resolve().name,
        config=read_object(folder / "config.json") or {},
        environments=[table for path in environments if (table := read_object(path))],
        records=records,
        health=verdict(diagnose(records, config)),
        conversion=read_object(folder / "conversion.json"),
        summary=read_object(folder / "summary.json"),
        process=process_of(folder),
        news=news_of(folder),
        frontier=_frontier_of(folder, records),
        view_missing="The report was asked not to load the models.",
    )


def process_of(folder: Path) -> Literal["ended", "trains", "lost", "silent"]:
    """Return what became of the process of the run in a folder, see `Run.process`."""
    if is_held(folder):
        is_far = other_host(folder) is not None
        return "silent" if is_far and time.time() - _news(folder) > SILENT_AFTER_S else "trains"
    return "lost" if (folder / LOCK_NAME).exists() else "ended"


def news_of(folder: Path) -> str:
    """Return the time of the last news of the run in a folder, in words."""
    return f"{datetime.fromtimestamp(_news(folder), UTC):%Y-%m-%d %H:%M} UTC"


def _news(folder: Path) -> float:
    """Return the time, in seconds since 1970, at which the run last wrote a record or its lock."""
    paths = (folder / METRICS_NAME, folder / LOCK_NAME)
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def _with_view(run: Run, folder: Path, device: str, teacher: str | None) -> Run:
    """Add the measurements of the student itself, or the reason why there are none."""
    if run.is_control:
        return replace(run, view_missing="Single tokens are not measured for a control.")
    # Only this part of a report needs torch, which takes seconds to load.
    from tiny_onn.evaluation.run_view import view_of_run  # noqa: PLC0415

    try:
        return replace(run, view=view_of_run(folder, device, teacher), view_missing="")
    except UserError as error:
        reason = reason_line(error)
        say(f"{folder}: the report is made without single tokens: {reason}")
        return replace(run, view_missing=f"The models could not be loaded: {reason}.")


def _frontier_of(folder: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the run's `frontier.json`, unless it is of another step or of quantised experts."""
    frontier = read_object(folder / "frontier.json")
    if frontier is None:
        return None
    steps = [record["step"] for record in records if record.get("kind") in EVALUATIONS]
    stored_as = frontier.get("experts_stored_as")
    if stored_as is not None:
        why = f"with experts in {stored_as}"
    elif steps and frontier.get("step") != steps[-1]:
        why = "at another step"
    else:
        return frontier
    say(f"{folder / 'frontier.json'}: left out, because it was measured {why}")
    return None


def check_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Refuse records that lack fields of their kinds.

    Raises:
        UserError: a record lacks a field, because the file is damaged or of another version.
    """
    kinds = {"step": StepRecord, "blockwise": BlockwiseRecord}
    kinds |= dict.fromkeys(EVALUATIONS, EvaluationRecord)
    needed = {kind: {field.name for field in fields(cls)} for kind, cls in kinds.items()}
    for number, record in enumerate(records, start=1):
        always = {"kind", "step", "tokens"}
        missing = sorted(needed.get(str(record.get("kind")), always) - record.keys())
        if missing:
            raise UserError(
                f"{path}: got no {missing[0]} in record {number}, expected the fields that"
                " docs/metrics.md lists; restore the file, or read it with the version of tiny-onn"
                " that wrote it"
            )


def _default_path(folders: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([folder.absolute() for folder in folders])) / REPORT_NAME
