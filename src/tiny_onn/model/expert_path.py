"""Which path an expert layer takes: dense and masked, or grouped, by measurement.

The grouped path's time grows with the share of active experts, the dense path's does not; they
meet at a share that depends on the device and the number format. `python -m benchmarks expert_layer
--write-crossover` measures it and writes `crossover.json`, which is read here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import torch

from tiny_onn.config.routing_checks import dense_need
from tiny_onn.config.schema import RunConfig
from tiny_onn.device import number_format
from tiny_onn.model.experts import Execution, ExpertBank

FILE = files("tiny_onn.model") / "crossover.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class PathChoice:
    """The path of a run's expert layers, and the reason for it."""

    path: Literal["dense", "grouped"]
    reason: str


def choose_path(config: RunConfig, device: torch.device) -> PathChoice:
    """Return the path that `train.expert_path` asks for; for `auto` the faster one as measured."""
    path = config.train.expert_path
    if path != "auto":
        return PathChoice(path=path, reason=f'train.expert_path = "{path}"')
    if (need := dense_need(config)) is not None:
        return PathChoice(path="dense", reason=need)
    where = f"{device.type} {number_format(config.teacher.dtype, device)}"
    measured = read_crossover().get(where)
    if measured is None:
        return PathChoice(path="dense", reason=f"no crossover is measured for {where}")
    share = config.router.target_k / config.experts.num_experts
    grouped = share < measured["share"]
    return PathChoice(
        path="grouped" if grouped else "dense",
        reason=f"k/E = {share:.3g} is {'below' if grouped else 'not below'} {measured['share']:.3g}"
        f", where the paths were equally fast for {where} ({measured['machine']})",
    )


def read_crossover() -> dict[str, dict[str, Any]]:
    """Read the measured share k / E of equal speed and the machine's name, by `device dtype`."""
    return json.loads(FILE.read_text("utf-8"))


def crossover_share(dense_s: float, grouped_s: dict[int, float], num_experts: int) -> float:
    """Return the share k / E at which the grouped path becomes as slow as the dense one.

    It lies on a straight line between the first measured k at which the grouped path is slower and
    the k before it. It is 0 if the grouped path is slower at every measured k, and the largest
    measured k / E if it is slower at none.

    Args:
        dense_s: the dense path's time in seconds, whatever k is.
        grouped_s: the grouped path's time in seconds by k.
        num_experts: the number of experts E.
    """
    last_k, last_s = 0, 0.0
    for k, seconds in sorted(grouped_s.items()):
        if seconds >= dense_s:
            if last_k == 0:
                return 0.0
            return (last_k + (k - last_k) * (dense_s - last_s) / (seconds - last_s)) / num_experts
        last_k, last_s = k, seconds
    return last_k / num_experts


def set_objective(banks: Sequence[ExpertBank], config: RunConfig) -> None:
    """Set how each bank computes, and what its router learns from: main loss, SMK or nothing."""
    execution = Execution(
        path=choose_path(config, banks[0].experts.down_proj.device).path,
        compiled=config.train.compile,
        chunk_tokens=config.train.ffn_chunk_tokens,
        coupled=config.router.objective == "task",
    )
    for bank in banks:
        bank.set_execution(execution)
        bank.requires_grad_(True)
        bank.router.requires_grad_(config.router.objective != "none")
