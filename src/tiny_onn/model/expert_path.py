"""Which path an expert layer takes: dense and masked, grouped, or sparse, by measurement.

The time of the grouped and the sparse path grows with the share of computed pairs of token and
expert, the dense path's does not; they meet at a share that depends on the device and the number
format. `python -m benchmarks expert_layer --write-crossover` measures it and writes
`crossover.json`, which is read here. The sparse path's entry holds for GPUs of the compute
capability that it was measured on: its kernels' tiles are cut for that.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import torch

from tiny_onn.config.routing_checks import path_refusal
from tiny_onn.config.schema import RunConfig
from tiny_onn.device import number_format
from tiny_onn.errors import UserError
from tiny_onn.model.experts import Execution, ExpertBank
from tiny_onn.model.quantized_experts import refuse_quantized
from tiny_onn.ops import sparse
from tiny_onn.ops.regions import cpu_compiles

FILE = files("tiny_onn.model") / "crossover.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class PathChoice:
    """The path of a run's expert layers, and the reason for it."""

    path: Literal["dense", "grouped", "sparse"]
    reason: str


def choose_path(config: RunConfig, device: torch.device, activation: str) -> PathChoice:
    """Return the path that `train.expert_path` asks for; for `auto` the fastest one as measured.

    Args:
        config: the settings.
        device: where the layers compute.
        activation: the name of the experts' activation.

    Raises:
        UserError: `sparse` is asked for and cannot compute such layers on the device.
    """
    path, dtype = config.train.expert_path, number_format(config.teacher.dtype, device)
    lack = sparse.obstacle(
        device.type, getattr(torch, dtype), config.experts.num_experts, activation
    )
    if path == "sparse" and lack is not None:
        raise UserError(
            f'train.expert_path: got "sparse", expected "auto", "dense" or "grouped": {lack}; set'
            ' train.expert_path = "auto"'
        )
    if path != "auto":
        return PathChoice(path=path, reason=f'train.expert_path = "{path}"')
    where = f"{device.type} {dtype}"
    measured = read_crossover().get(where, {})
    share, name = computed_share(config)
    ours = sparse_entry(config, where)
    if ours is not None and lack is None and ours["capability"] == _capability(device):
        return PathChoice(
            path="sparse",
            reason=f"{name} = {share:.3g} is at most {ours['share']:.3g}, up to which this path was"
            f" the fastest for {where} ({ours['machine']})",
        )
    if (need := path_refusal(config, "grouped")) is not None:
        return PathChoice(path="dense", reason=need)
    if not measured:
        return PathChoice(path="dense", reason=f"no crossover is measured for {where}")
    grouped = share < measured["share"]
    return PathChoice(
        path="grouped" if grouped else "dense",
        reason=f"{name} = {share:.3g} is {'below' if grouped else 'not below'} "
        f"{measured['share']:.3g}, where the paths were equally fast for {where} "
        f"({measured['machine']})",
    )


def computed_share(config: RunConfig) -> tuple[float, str]:
    """Return the share of pairs of token and expert that a path without idle work computes.

    Returns:
        The share, k / E where no inactive expert teaches the gate, and the share in words.
    """
    active, smk = config.router.target_k / config.experts.num_experts, config.smk
    if config.router.objective != "smk" or smk.candidates != "all":
        return active, "k/E"
    return active + smk.lesson_share * (1 - active), "the share of active and surprised experts"


def sparse_entry(config: RunConfig, where: str) -> dict[str, Any] | None:
    """Return the measurement by which the sparse path is the fastest for these settings, if any.

    Args:
        config: the settings.
        where: `device dtype`.
    """
    entry = read_crossover().get(where, {}).get("sparse")
    if entry is None or path_refusal(config, "sparse") is not None:
        return None
    return entry if computed_share(config)[0] <= entry["share"] else None


def _capability(device: torch.device) -> str | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def read_crossover() -> dict[str, dict[str, Any]]:
    """Return what was measured, by `device dtype`.

    `share` is the share of computed pairs at which the grouped path is as slow as the dense one.
    `sparse` holds the `share` up to which the sparse path is faster than both, and the GPU's
    `capability`. Both say where they were measured.
    """
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


def fastest_share(
    dense_s: float, grouped_s: dict[int, float], sparse_s: dict[int, float], num_experts: int
) -> float:
    """Return the share k / E up to which the sparse path is faster than both other paths.

    It is `crossover_share` against the dense path, and 0 where the grouped path is faster at a
    measured k below that.

    Args:
        dense_s: the dense path's time, whatever k is.
        grouped_s: the grouped path's time by k.
        sparse_s: the sparse path's time by k.
        num_experts: E.
    """
    share = crossover_share(dense_s, sparse_s, num_experts)
    slower = any(grouped_s[k] < sparse_s[k] for k in sparse_s if k <= share * num_experts)
    return 0.0 if slower else share


def set_objective(banks: Sequence[ExpertBank], config: RunConfig) -> None:
    """Set how each bank computes, and what its router learns from: main loss, SMK or nothing.

    Raises:
        UserError: the experts are quantised.
    """
    refuse_quantized(banks, "training", "load the student without quantisation")
    device = banks[0].experts.down_proj.device
    execution = Execution(
        path=choose_path(config, device, banks[0].activation_name).path,
        compiled=config.train.compile and (device.type != "cpu" or cpu_compiles()),
        chunk_tokens=config.train.ffn_chunk_tokens,
        coupled=config.router.objective == "task",
    )
    for bank in banks:
        bank.set_execution(execution)
        bank.requires_grad_(True)
        bank.router.requires_grad_(config.router.objective != "none")
