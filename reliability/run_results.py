"""What a run ended with, for comparison bit by bit."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from tiny_onn.runs.checkpoint import valid_checkpoints
from tiny_onn.runs.sharded_files import load_shards


def result_of(out: Path) -> dict[str, Any]:
    """What must be equal bit for bit: student, last checkpoint, metrics without times."""
    newest = valid_checkpoints(out / "checkpoints")[0]
    parts = {
        "student": load_file(out / "student" / "model.safetensors"),
        "checkpoint's student": saved_tensors(newest, "student"),
        "optimizer state": saved_tensors(newest, "optimizer"),
    }
    found: dict[str, Any] = {name: digest_of(tensors) for name, tensors in parts.items()}
    state = json.loads((newest / "state.json").read_text())
    found["data position"] = state["stream"]
    lines = (out / "metrics.jsonl").read_text().splitlines()
    found["metrics"] = [without_times(json.loads(line)) for line in lines]
    return found


def saved_tensors(checkpoint: Path, part: str) -> dict[str, Tensor]:
    """The student's tensors or the optimizer's state in a checkpoint of any number of processes."""
    if (checkpoint / f"{part}.safetensors").exists():
        return load_file(checkpoint / f"{part}.safetensors")
    return load_shards(checkpoint, lambda name: ("|" in name) == (part == "optimizer"))


def digest_of(tensors: dict[str, Tensor]) -> str:
    """A hash of tensors with their names, formats and shapes."""
    # The files themselves would not do: torch's writer leaves the order of a header to chance.
    return hashlib.sha256(save(dict(sorted(tensors.items())))).hexdigest()


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """A metrics record without what a clock wrote."""
    return {k: v for k, v in record.items() if "seconds" not in k and not k.endswith("_per_s")}
