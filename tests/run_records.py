"""What tests do in the middle of runs, and ask of finished run folders."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tiny import TIMES
from tiny_onn import TinyOnnForCausalLM
from tiny_onn.config.schema import RunConfig
from tiny_onn.runs.folder import keep_settings
from tiny_onn.runs.metrics import read_metrics


def at_step(number: int, action: Callable[[], object]) -> Callable[[int, float], None]:
    """What `run_distill` takes as `after_step` to do something after the step of this number."""

    def after_step(step: int, _: float) -> None:
        if step == number:
            action()

    return after_step


def send(number: int) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), number)


def records(out: Path) -> list[dict[str, Any]]:
    """The metrics but for what a clock decides."""
    rows = read_metrics(out / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def student_of(out: Path) -> Any:
    """The finished student of a run."""
    return TinyOnnForCausalLM.from_pretrained(out / "student")


def assert_same_run(out: Path, expected: Path) -> None:
    """Two runs measured the same and ended with the same bits."""
    assert records(out) == records(expected)
    ours, theirs = (student_of(folder).state_dict() for folder in (out, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def write_records(folder: Path, config: RunConfig, rows: list[dict[str, Any]]) -> Path:
    """A run folder that holds settings and these records, and no model."""
    folder.mkdir()
    keep_settings(folder, config)
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
