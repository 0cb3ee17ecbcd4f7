"""A training step in one and in several processes at the same global batch: the speedup.

    python -m benchmarks data_parallel [--model SmolLM2-135M] [--processes 1 2] [--rows 4]

Every number of processes makes the same steps on the same rows, packed from documents of 1K to 2K
random tokens, with random weights of a bundled shape and the preset `recommended`. Each process
takes its share of the rows on a device of its own. Before a time is reported, the first losses must
agree, and all processes of a run must hold the same weights to the bit after the last step.
"""

import argparse
import hashlib
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from benchmarks.registry import Goal, Option, Result, benchmark
from benchmarks.small_step import recipe
from benchmarks.steps import random_dense, random_rows
from tiny_onn.conversion.convert import convert
from tiny_onn.device import ask_for_same_bits
from tiny_onn.distill.assembly import assemble
from tiny_onn.distill.step import distill_step
from tiny_onn.model.expert_path import set_objective
from tiny_onn.parallel import World
from tiny_onn.teacher.load import teacher_for

WARMUP = 4


@benchmark(
    "A training step in one and in several processes: the speedup at the same global batch.",
    model=Option("SmolLM2-135M", "a bundled shape", smoke="tiny"),
    preset=Option("recommended", "the recipe"),
    tokens=Option(32768, "the tokens of a row", smoke=256),
    rows=Option(4, "the rows of a step, over all processes"),
    processes=Option([1, 2], "numbers of processes", smoke=[1, 2]),
    repeats=Option(10, "timed steps", smoke=2),
    set=Option([""], "further settings, as section.key=value"),
)
def run(arguments: argparse.Namespace) -> Result:
    """Time the step with every number of processes, after a check that all do the same."""
    found = {size: _launched(size, vars(arguments)) for size in arguments.processes}
    first = found[arguments.processes[0]]
    losses = {size: ranks[0]["loss"] for size, ranks in found.items()}
    apart = [size for size, loss in losses.items() if abs(loss / first[0]["loss"] - 1) > 1e-3]
    unequal = [size for size, ranks in found.items() if len({r["weights"] for r in ranks}) > 1]
    if apart or unequal:
        raise SystemExit(f"first losses {losses}; ranks differ: {unequal}; no time is reported")
    rates = {size: ranks[0]["tokens_per_s"] for size, ranks in found.items()}
    base, last = (arguments.processes[place] for place in (0, -1))
    name = f"tokens/s, {last} processes / {base}"
    return Result(
        rows=[{"processes": size, "tokens_per_s": rate} for size, rate in rates.items()],
        ratios={name: rates[last] / rates[base]},
        goals={name: Goal(at_least=0.95 * last / base)},
        parity={"first losses": losses},
        settings={
            name: getattr(arguments, name)
            for name in ("model", "preset", "tokens", "rows", "processes", "set")
        },
    )


def _launched(size: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of so many processes measured."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_train, (size, port, folder, options), nprocs=size)  # pyright: ignore[reportPrivateImportUsage]
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]


def _train(rank: int, size: int, port: int, folder: str, options: dict[str, Any]) -> None:
    """Make the steps of one process, and write down what it measured."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device(options["device"])
    smoke = options["model"] == "tiny"
    with World.from_environment(device.type) as world:
        ask_for_same_bits(device)
        rows_per_step = f"train.rows_per_step={options['rows']}"
        overrides = [rows_per_step, *filter(None, options["set"])]
        config = recipe(options["preset"], options["tokens"], smoke, *overrides)
        dense = random_dense(options["model"], config, device)
        generator = torch.Generator().manual_seed(0)
        student = convert(dense, config.experts, config.router, generator=generator)
        set_objective(student.banks(), config)
        training = assemble(config, student, teacher_for(dense, config.teacher), world)
        vocab = dense.config.get_text_config().vocab_size
        documents = (16, 32) if smoke else (1024, 2048)
        rows = random_rows(vocab, options["tokens"], documents=documents, num_rows=options["rows"])
        models = student, training.teacher, training.optimizer
        losses, seconds = [], []
        for step in range(WARMUP + options["repeats"]):
            world.barrier()
            start = time.perf_counter()
            result = distill_step(
                *models, rows, training.config, step=step, passes=training.passes, world=world
            )
            losses.append(float(result.loss))
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        digest = hashlib.sha256()
        for weight in student.trainable().values():
            digest.update(weight.detach().float().cpu().numpy().tobytes())
        tokens = options["rows"] * options["tokens"]
        measured = {
            "loss": losses[0],
            "tokens_per_s": tokens / statistics.median(seconds[WARMUP:]),
            "weights": digest.hexdigest(),
        }
        (Path(folder) / f"{rank}.json").write_text(json.dumps(measured))
