"""Runs that tests of the report look at."""

from pathlib import Path

from tiny import change, write_run
from tiny_onn.distill.loop import run_distill
from tiny_onn.evaluation.frontier import run_frontier

ROW = 64


def write_runs(folder: Path) -> Path:
    """A trained student with a frontier and a static control, in one folder."""
    config = write_run(
        folder,
        num_files=80,
        experts={"calibration_tokens": 512},
        train={"tokens": 6 * ROW, "stats_every_steps": 2, "eval_every_tokens": 2 * ROW},
    )
    run_distill(config, out=folder / "student")
    control = change(config, router={"selection": "static", "objective": "none"})
    run_distill(control, out=folder / "static")
    run_frontier(
        str(folder / "student"),
        budgets=(6.0, 4.0, 2.0),
        text=None,
        device="cpu",
        max_tokens=config.data.eval_tokens,
        out=folder / "student",
    )
    return folder
