"""What several processes compute in the tests, and one process for comparison.

A job returns named tensors. `spawn` runs all jobs in four processes: each half of them is a world
of two for half of the jobs, then all four are one world for the rest.
"""

import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from forks import start_ranks
from run_records import at_step, send
from tiny import CONFIG, change, make_dense, make_rows, write_run
from tiny_onn.config.checks import validate
from tiny_onn.config.schema import RunConfig, Shard
from tiny_onn.conversion import pipeline
from tiny_onn.distill.blockwise import block_errors, blockwise_step, teacher_power
from tiny_onn.distill.loop import run_distill
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.step import distill_step
from tiny_onn.evaluation.compare import evaluate_layers
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.parallel import MESSAGE_BYTES, World
from tiny_onn.routing.budgets import fit_eval_thresholds
from tiny_onn.runs.checkpoint import (
    load_checkpoint,
    take_snapshot,
    write_checkpoint,
)
from tiny_onn.runs.sharded_files import load_shards
from tiny_onn.runs.trained_tensors import optimizer_tensors, student_tensors
from tiny_onn.teacher.held_out import HeldOut
from tiny_onn.teacher.load import quiet_transformers

Job = Callable[[World], dict[str, Tensor]]

# Ragged rows: the last ones of several documents each, some with padding.
ROWS = make_rows((20, 13, 30, 40, 9, 40, 17, 22, 5, 31, 12, 3, 50, 28), 32)
STEPS, ROWS_PER_STEP = 3, 4
DENSE: dict[str, Any] = {"experts": {"weighting": "softmax"}}
RECIPES: dict[str, dict[str, Any]] = {
    "budget, smk": {"router": {"revive_after_steps": 1, "balance_rate": 0.01}},
    "budget, smk, all candidates": {
        "router": {"budget_form": "threshold"},
        "smk": {"surprise": "gain", "direction": "max", "candidates": "all", "lesson_share": 0.5},
    },
    "budget, smk, one threshold": {"router": {"budget_scope": "global"}},
    "budget, smk, explored": {"smk": {"explore_fraction": 0.5}},
    "budget, task": {"router": {"objective": "task"}, **DENSE},
    "budget, regression": {"router": {"objective": "regression"}},
    "budget, none": {"router": {"objective": "none"}, "loss": {"states_coef": 0.5}},
    "top_k, smk": {"router": {"selection": "top_k"}},
    "top_k, task": {"router": {"selection": "top_k", "objective": "task"}, **DENSE},
    "top_k, regression": {"router": {"selection": "top_k", "objective": "regression"}},
    "top_k, none": {"router": {"selection": "top_k", "objective": "none"}},
    "top_any, task": {
        "experts": {"weighting": "mean"},
        "router": {"selection": "top_any", "objective": "task"},
    },
    "top_any, task, re-seeded": {
        "experts": {"weighting": "mean"},
        "router": {"selection": "top_any", "objective": "task", "reseed_every_steps": 2},
    },
    "top_any, none": {
        "experts": {"weighting": "mean"},
        "router": {"selection": "top_any", "objective": "none"},
    },
    "static, none": {"router": {"selection": "static", "objective": "none"}},
    "random, none": {"router": {"selection": "random", "objective": "none"}},
    "oracle, none": {"router": {"selection": "oracle", "objective": "none"}},
    "oracle with a budget, none": {
        "router": {"selection": "oracle", "objective": "none", "oracle_budget": True}
    },
}
STAGES = ("global", "blockwise")
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit", "adafactor", "muon")


def prepared(changes: dict[str, Any], rows_per_step: int, **sizes: Any) -> tuple[Any, Any, Any]:
    """A student, its teacher and the settings of a recipe."""
    config = change(change(CONFIG, **changes), train={"rows_per_step": rows_per_step})
    validate(config)
    dense = make_dense(**sizes)
    return pipeline.make_student(config, MlpInputs(dense, ROWS)), dense, config


def steps(
    world: World, *, changes: dict[str, Any], stage: str, rows_per_step: int
) -> dict[str, Tensor]:
    """The gradients, measurements and counts of some steps, and the student after them."""
    student, dense, config = prepared(changes, rows_per_step)
    optimizer, found = build_optimizer(student, config.optim, world=world), {}
    options: dict[str, Any] = {"world": world}
    step_of = distill_step
    if stage == "blockwise":
        step_of, options["power"] = blockwise_step, teacher_power(dense, ROWS)
    number = 0

    def keep_gradients(*_: object) -> None:
        for name, p in student.trainable().items():
            if p.grad is not None:
                found[f"gradient {number} {name}"] = p.grad.clone()

    optimizer.register_step_pre_hook(keep_gradients)
    for number in range(STEPS):
        rows = [ROWS[(number * rows_per_step + i) % len(ROWS)] for i in range(rows_per_step)]
        result = step_of(student, dense, optimizer, rows, config, step=number, **options)
        found |= {
            f"count {number} {place}": tensor.clone()
            for place, tensor in enumerate(result.stats.tensors())
        }
        found |= {
            f"tally {number} {place} {name}": value.clone()
            for place, tally in enumerate(result.tallies)
            for name, value in tally._asdict().items()
        }
        measured = ("loss", "forward_kl", "agreement", "student_entropy", "states_error", "error_L")
        values = {name: getattr(result, name) for name in measured}
        values |= {"expert norm": result.expert_grad_norm, "gate norm": result.gate_grad_norm}
        found |= {
            f"measured {number} {name}": torch.as_tensor(value).clone()
            for name, value in values.items()
            if value is not None
        }
    return found | {f"student {n}": t.clone() for n, t in student_tensors(student).items()}


def evaluation(world: World) -> dict[str, Tensor]:
    """The thresholds that are settled on text, an evaluation, and the errors of the blocks."""
    student, dense, config = prepared({}, 1)
    fit_eval_thresholds(student, ROWS[:5], world=world)
    settled = torch.stack([bank.router.settled for bank in student.banks()])
    held_out = HeldOut(dense, ROWS)
    evaluate_layers(student, held_out, config.loss, world)
    # The teacher's states now come from memory.
    result, layers = evaluate_layers(student, held_out, config.loss, world)
    counts = {name: torch.tensor(layers[name]) for name in ("load", "k_histogram")}
    return {
        "settled": settled,
        "result": torch.tensor([float(value) for value in result.as_dict().values()]).double(),
        "blocks": torch.tensor(block_errors(student, dense, ROWS, world)).double(),
        **counts,
    }


def optimizer_steps(world: World, *, name: str, master: str, shard: Shard) -> dict[str, Tensor]:
    """The student and the optimizer's saved state after a step, and after two more.

    The state of the first step goes through a new optimizer, as in a resumed run.
    """
    optim = {"name": name, "master_dtype": master, "lr_scale": "rms"}
    student, dense, config = prepared({"optim": optim}, 2, intermediate_size=96)
    options: dict[str, Any] = {"world": world, "shard": shard}
    optimizer, found = build_optimizer(student, config.optim, **options), {}
    folder = folder_of(world) / f"{name}, {master}, {shard}"
    for number in range(STEPS):
        distill_step(student, dense, optimizer, ROWS[:2], config, step=number, world=world)
        state = dict(optimizer_tensors(student, optimizer))
        held = sum(tensor.nbytes for key, tensor in state.items() if ".experts." in key)
        found |= {
            f"student {number} {n}": p.detach().clone() for n, p in student.trainable().items()
        }
        found[f"bytes {number}"] = torch.tensor(held)
        everything = None if world.size == 1 else (lambda _: True)
        snapshot = take_snapshot(number, student, optimizer, {"step": number}, everything)
        path = write_checkpoint(folder, snapshot, keep=1, partial=folder / ".partial", world=world)
        world.barrier()
        if world.first:
            saved = saved_state(path)
            found |= {f"state {number} {n}": tensor.clone() for n, tensor in saved.items()}
        if number == 0:
            optimizer = build_optimizer(student, config.optim, **options)
            load_checkpoint(folder, student, optimizer, is_mine=optimizer.is_mine, world=world)
        world.barrier()
    return found


def folder_of(world: World) -> Path:
    """A folder for the checkpoints of a world."""
    folder = Path(os.environ.get("TINY_ONN_TEST_FOLDER", tempfile.gettempdir()))
    return folder / f"checkpoints-{os.getppid()}-{world.size}"


def saved_state(path: Path) -> dict[str, Tensor]:
    """The optimizer's state in a checkpoint."""
    if (path / "optimizer.safetensors").is_file():
        return load_file(path / "optimizer.safetensors")
    return load_shards(path, lambda name: "|" in name)


def poisoned(world: World, *, rank: int) -> dict[str, Tensor]:
    """A step in which one process has a gradient that is not finite, and one after it."""
    student, dense, config = prepared({"router": {"revive_after_steps": 2}}, 2)
    optimizer = build_optimizer(student, config.optim, world=world)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    weight = student.banks()[0].experts.down_proj

    def poison(gradient: Tensor) -> Tensor:
        return gradient.clone().index_fill_(0, torch.tensor(0), float("inf"))

    handle = weight.register_hook(poison) if world.rank == rank else None
    result = distill_step(student, dense, optimizer, ROWS[:2], config, world=world)
    if handle is not None:
        handle.remove()
    unchanged = all(torch.equal(before[n], t) for n, t in student.state_dict().items())
    after = distill_step(student, dense, optimizer, ROWS[2:4], config, step=1, world=world)
    return {
        "finite": torch.tensor([result.finite, after.finite]),
        "unchanged": torch.tensor(unchanged),
        **{f"student {name}": tensor for name, tensor in student_tensors(student).items()},
    }


def sums(world: World) -> dict[str, Tensor]:
    """Tensors of many sizes and formats, large ones among them, multiplied by 1, 2, ... by rank."""
    # A message holds so many numbers of 4 bytes.
    large = torch.arange(MESSAGE_BYTES // 4).remainder(1000).float()
    tensors = {
        "large": large.clone(),
        "large, transposed": large.view(2, -1).clone().T,
        "large count": torch.arange(MESSAGE_BYTES // 8),
        "count": torch.arange(5),
        "bfloat16": torch.arange(6.0).bfloat16().view(2, 3).T,
        "one": torch.ones(()),
    }
    for tensor in tensors.values():
        tensor.mul_(world.rank + 1)
    world.all_reduce_sum(list(tensors.values()))
    return tensors


def pair_jobs() -> dict[str, Job]:
    """The jobs of two processes."""
    jobs: dict[str, Job] = {"evaluation": evaluation, "sums": sums}
    for name, changes in RECIPES.items():
        for stage in STAGES:
            for rows in (2, 4):
                options: dict[str, Any] = {"changes": changes, "stage": stage}
                jobs[f"{name}, {stage}, {rows} rows"] = partial(
                    steps, rows_per_step=rows, **options
                )
    for name in OPTIMIZERS:
        for master in ("float32", "bfloat16"):
            for shard in ("none", "optimizer"):
                jobs[f"{name}, {master}, {shard}"] = partial(
                    optimizer_steps, name=name, master=master, shard=shard
                )
    for rank in (0, 1):
        jobs[f"poisoned {rank}"] = partial(poisoned, rank=rank)
    return jobs


def chain(four: World, pair: World, config: RunConfig, folder: Path) -> None:
    """A run that one process begins, two and four go on with, and one ends.

    A signal stops each part after two steps. It reaches one process alone, the last one.
    """
    out, last = folder / "chain", 2
    for world, number in ((World(), signal.SIGINT), (pair, signal.SIGTERM), (four, signal.SIGINT)):
        if four.rank < world.size:
            is_last = world.rank == world.size - 1
            stop = at_step(last, partial(send, number)) if is_last else lambda *_: None
            result = run_distill(
                config, out=out, resume=world.size > 1, after_step=stop, world=world
            )
            assert result.interrupted
            assert result.tokens == last * ROWS_PER_STEP * config.data.row_tokens
        four.barrier()
        last += 2
    if four.first:
        run_distill(config, out=out, resume=True)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def four_processes(rank: int, port: int) -> Iterator[tuple[World, World, int]]:
    """The world of four processes, this one's pair of them, and the pair's number, 0 or 1."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    quiet_transformers()
    with World.from_environment("cpu") as four:
        groups = [[dist.new_group(ranks) for ranks in ([0, 1], [2, 3])] for _ in range(2)]
        half = rank // 2
        group, saving = (each[half] for each in groups)
        yield four, replace(four, rank=rank % 2, size=2, group=group, saving=saving), half


def work(rank: int, port: int, folder: str, config: RunConfig) -> None:
    """Do the jobs of one of four processes, and save what they return."""
    os.environ["TINY_ONN_TEST_FOLDER"] = folder
    with four_processes(rank, port) as (four, pair, half):
        for name, job in list(pair_jobs().items())[half::2]:
            save_file(
                {n: t.contiguous() for n, t in job(pair).items()},
                Path(folder) / f"{name}-{pair.rank}.safetensors",
            )
        four.barrier()
        chain(four, pair, config, Path(folder))
        if four.rank < pair.size:
            run_distill(change(config, train={"shard": "optimizer"}), out=two(folder), world=pair)
        four.barrier()


def spawn(folder: Path) -> RunConfig:
    """Run all jobs in four processes, which write their results to a folder.

    Returns:
        The settings of the runs in it.
    """
    config = write_run(
        folder,
        optim={"name": "adamw8bit", "expert_lr": 1e-3, "gate_lr": 1e-3},
        train={
            "rows_per_step": ROWS_PER_STEP,
            "blockwise_tokens": 2 * ROWS_PER_STEP * 64,
            "tokens": 6 * ROWS_PER_STEP * 64,
            "eval_every_tokens": 3 * ROWS_PER_STEP * 64,
            "save_every_tokens": ROWS_PER_STEP * 64,
            "keep_checkpoints": 9,
        },
    )
    arguments = (free_port(), str(folder), config)
    start_ranks(work, arguments, 4)
    return config


def two(folder: str | Path) -> Path:
    """The folder of a run that two processes made from beginning to end."""
    return Path(folder) / "two"
