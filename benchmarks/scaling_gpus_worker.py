"""One of the processes of `scaling_gpus.py`, which measure a model's step together."""

import gc
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import environment, resident_bytes
from benchmarks.steps import FIXED, Step, make_step, random_dense, random_rows
from tiny_onn.config.read import load_config
from tiny_onn.config.schema import RunConfig
from tiny_onn.data.packing import PackedRow
from tiny_onn.distill.clock import Clock
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.row_graphs import RowGraphs
from tiny_onn.distill.step import StepResult, distill_step
from tiny_onn.errors import UserError
from tiny_onn.parallel import World
from tiny_onn.planning.sources import find_device

# Activations are kept where they fit.
CHECKPOINTING = {"SmolLM2-135M": "none"}
# These models are measured with shares of the weights, and by the plan a GPU of 80 GiB holds them
# whole only if four GPUs divide the optimizer's state. A graph would hold activations once more.
LARGE = {"Qwen3-8B": ("optim.master_dtype=bfloat16", "train.cuda_graphs=false")}
LARGE_WHOLE_FROM = 4
SHARDS = ("none", "optimizer")


def worker(case: dict[str, Any]) -> dict[str, Any]:
    """Measure every row of a model, as one of the processes that a launcher started.

    The first process writes lines to `case["out"]`: the machine, then each row once it is known.
    """
    kind = torch.device(case["device"]).type
    with World.from_environment(kind) as world:
        device = torch.device(kind)
        if kind == "cuda":
            device = torch.device(kind, torch.cuda.current_device())
        config = settings_of(case)
        # The teacher and the student's experts are whole on every GPU until they are cut.
        dense = random_dense(case["model"], config, device)
        vocab = dense.config.get_text_config().vocab_size
        documents = (1024, 2048) if case["tokens"] > 2048 else (16, 32)
        pool = random_rows(vocab, case["tokens"], documents=documents, num_rows=2 * case["rows"])
        lengths = torch.cat([row.cu_seqlens.diff() for row in pool]).double()
        mean_length = round(float((lengths**2).sum() / lengths.sum()))
        known = {"environment": environment(device), "document_tokens": mean_length}
        _say(world, case, known | {"device": _as_planned(device, config)})
        step = make_step(dense, config, pool, world)
        for shard, rows in ways(case):
            labels = {"shard": shard, "rows_per_step": rows}
            try:
                row = _measured(step, pool, labels, case, world)
            except torch.OutOfMemoryError as error:
                row = {"error": f"out of memory: {error}"[:300]}
            _say(world, case, {"row": labels | row})
    return {}


def settings_of(case: Mapping[str, Any]) -> RunConfig:
    """The preset's settings without what needs bitsandbytes, with random experts and gates."""
    mode = CHECKPOINTING.get(case["model"], "layer")
    return load_config(
        None,
        case["preset"],
        [
            *FIXED,
            "loss.chunk_tokens=4096",
            "optim.name=adamw",
            "teacher.quantization=none",
            f"data.row_tokens={case['tokens']}",
            f"train.checkpointing={mode}",
            f"train.compile={str(case['model'] != 'tiny').lower()}",
            f"train.shard={'full' if case['full'] else 'none'}",
            *LARGE.get(case["model"], ()),
            *filter(None, case["set"]),
        ],
    )


def ways(case: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The ways to take a step: how it is sharded, and its rows; the same global batch first."""
    gpus = case["gpus"]
    rows = sorted({case["rows"], gpus}, reverse=True)
    even = [number for number in rows if number % gpus == 0]
    if case["full"]:
        return [("full", number) for number in even] if gpus > 1 else []
    shards = SHARDS[: 1 + (gpus > 1)]
    if case["model"] in LARGE:
        shards = SHARDS[1:] if gpus >= LARGE_WHOLE_FROM else ()
    return [(shard, number) for shard in shards for number in even]


def numbers_of_steps(case: Mapping[str, Any]) -> tuple[int, int, int]:
    """The steps before the timed ones, these, and those of which each phase is timed."""
    return (1, min(4, case["repeats"]), 1) if case["model"] in LARGE else (5, case["repeats"], 3)


def _measured(
    step: Step,
    pool: Sequence[PackedRow],
    labels: Mapping[str, Any],
    case: Mapping[str, Any],
    world: World,
) -> dict[str, Any]:
    """Time and peak memory of one way to take a step, the slowest process' and the largest."""
    device, num_rows = step.student.device, labels["rows_per_step"]
    config = replace(step.config, train=replace(step.config.train, rows_per_step=num_rows))
    models = (step.student, step.teacher)
    options: dict[str, Any] = {"passes": RowGraphs(*models), "world": world}
    rows, numbers = itertools.cycle(pool), itertools.count()

    def take(clock: Clock | None = None) -> StepResult:
        batch = [next(rows) for _ in range(num_rows)]
        options.update(step=next(numbers), clock=clock)
        return distill_step(*models, optimizer, batch, config, **options)

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    optimizer = build_optimizer(step.student, config.optim, world=world, shard=labels["shard"])
    start = time.perf_counter()
    warmup, repeats, phases = numbers_of_steps(case)
    loss = float(take().loss)
    first_s = time.perf_counter() - start
    for _ in range(warmup):
        take()
    seconds, finite = [], True
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        finite &= take().finite
        _wait(device)
        seconds.append(time.perf_counter() - start)
    if not finite:
        return {"error": "a step skipped its update, which was not finite; no time is reported"}
    all_reduce_s = []
    for _ in range(phases):
        take(clock := Clock(device, wait=True))
        all_reduce_s.append(clock.seconds.get("all-reduce", 0.0))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_bytes("VmHWM")
    slowest = _over_ranks(seconds, world).amax(0)
    p20, p50, p80 = slowest.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {
        "step_ms": 1e3 * p50,
        "p20_ms": 1e3 * p20,
        "p80_ms": 1e3 * p80,
        "tokens_per_s": num_rows * case["tokens"] / p50,
        # Who comes last to the sums of a step waits least for the others.
        "all_reduce_ms": 1e3 * float(_over_ranks(all_reduce_s, world).amin(0).mean()),
        "peak_bytes": int(_over_ranks([peak], world).amax()),
        "first_step_s": first_s,
        "first_loss": loss,
    }


def _over_ranks(numbers: Sequence[float], world: World) -> Tensor:
    """The numbers of every process, a line each."""
    lines = torch.zeros(world.size, len(numbers), dtype=torch.float64)
    lines[world.rank] = torch.tensor(numbers, dtype=torch.float64)
    world.all_reduce_sum([lines])
    return lines


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _say(world: World, case: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Let the first process write a line for the one that started all."""
    if world.first:
        with Path(case["out"]).open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(values)}\n")


def _as_planned(device: torch.device, config: RunConfig) -> dict[str, Any] | None:
    """The GPU as `plan` knows it; None if it does not, or on a CPU."""
    if device.type == "cpu":
        return None
    try:
        return asdict(find_device("auto", config.teacher.dtype))
    except UserError:
        return None
