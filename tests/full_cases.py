"""What two processes that hold shares of the weights compute in the tests, and one for comparison.

A job returns named tensors, the whole ones where the processes hold shares.
"""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from forks import start_ranks
from parallel_cases import DENSE, ROWS, free_port
from run_records import at_step, send
from tiny import CONFIG, change, make_dense, model_bytes, write_run
from tiny_onn.config.checks import validate
from tiny_onn.config.schema import RunConfig, Shard
from tiny_onn.conversion import pipeline
from tiny_onn.distill.assembly import Training, assemble
from tiny_onn.distill.blockwise import block_errors, blockwise_step, teacher_power
from tiny_onn.distill.loop import run_distill
from tiny_onn.distill.saving import saving_ranks
from tiny_onn.distill.step import distill_step
from tiny_onn.evaluation.compare import evaluate_layers
from tiny_onn.model.full_sharding import full_tensor
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.parallel import World
from tiny_onn.routing.budgets import fit_eval_thresholds
from tiny_onn.runs.checkpoint import load_checkpoint, take_snapshot, write_checkpoint
from tiny_onn.teacher.held_out import HeldOut
from tiny_onn.teacher.load import quiet_transformers, teacher_for

Job = Callable[[World], dict[str, Tensor]]

STEPS, ROWS_PER_STEP = 3, 4
# The recommended preset's gates and losses, the card's, norms that learn, gates that the loss
# teaches.
RECIPES: dict[str, dict[str, Any]] = {
    "recommended": {
        "experts": {"compensation": "mean"},
        "router": {"budget_form": "threshold", "revive_after_steps": 1},
        "smk": {"surprise": "gain", "direction": "max", "candidates": "all"},
        "loss": {"states_coef": 0.5, "states_scale": "feature"},
        "optim": {"lr_scale": "rms", "clip_norm": 1e9},
    },
    "card": {"optim": {"clip_norm": 1e9}},
    "norms": {"optim": {"norm_lr": 1e-3, "lr_scale": "rms", "clip_norm": 1e9}},
    "task": {"router": {"objective": "task"}, **DENSE, "optim": {"clip_norm": 0.01}},
}
MODES = ("layer", "offload")
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit", "muon")
MASTERS = ("float32", "bfloat16")


def training(
    world: World, shard: Shard, changes: dict[str, Any], rows: int, **train: Any
) -> Training:
    """The program of a step of some rows."""
    settings = {"rows_per_step": rows, "shard": shard if world.size > 1 else "none", **train}
    config = change(change(CONFIG, **changes), train=settings)
    validate(config)
    dense = make_dense(intermediate_size=96)
    return assemble(config, pipeline.make_student(config, MlpInputs(dense, ROWS)), dense, world)


def weights(of: Training) -> dict[str, Tensor]:
    """The student's tensors, whole."""
    return {f"student {n}": full_tensor(t).clone() for n, t in of.student.state_dict().items()}


def steps(
    world: World, *, recipe: str, stage: str = "global", rows: int, mode: str = "none"
) -> dict[str, Tensor]:
    """The measurements and counts of some steps, and the student after them."""
    of = training(world, "full", RECIPES[recipe], rows, checkpointing=mode)
    options: dict[str, Any] = {"world": world}
    step_of = distill_step
    if stage == "blockwise":
        step_of, options["power"] = blockwise_step, teacher_power(of.teacher, ROWS)
    found = {}
    for number in range(STEPS):
        batch = [ROWS[(number * rows + i) % len(ROWS)] for i in range(rows)]
        models = (of.student, of.teacher, of.optimizer)
        result = step_of(*models, batch, of.config, step=number, **options)
        tensors = enumerate(result.stats.tensors())
        found |= {f"count {number} {place}": tensor.clone() for place, tensor in tensors}
        values = {
            "loss": result.loss,
            "expert norm": result.expert_grad_norm,
            "gate norm": result.gate_grad_norm,
        }
        found |= {f"measured {number} {n}": torch.as_tensor(v) for n, v in values.items()}
    return found | weights(of)


def optimizer_steps(world: World, *, name: str, master: str) -> dict[str, Tensor]:
    """The student after some steps, and what a checkpoint holds of each process.

    The state of the first step goes through a new optimizer, as in a resumed run.
    """
    optim = {"name": name, "master_dtype": master, "lr_scale": "rms", "clip_norm": 1e9}
    of = training(world, "full", {"optim": optim}, 2)
    folder = Path(os.environ["TINY_ONN_TEST_FOLDER"]) / f"{name}-{master}-{world.size}"
    found: dict[str, Tensor] = {}
    for number in range(STEPS):
        models = (of.student, of.teacher, of.optimizer)
        distill_step(*models, ROWS[:2], of.config, step=number, world=world)
        ranks = saving_ranks(of.student, of.optimizer, world.size)
        mine = partial(_is_mine, ranks, world.rank) if world.size > 1 else None
        snapshot = take_snapshot(number, of.student, of.optimizer, {"step": number}, mine)
        found |= {f"saved {number} {n}": t for n, t in snapshot.optimizer.items()}
        if number == 0:
            partial_name = folder / ".partial"
            write_checkpoint(folder, snapshot, keep=1, partial=partial_name, world=world)
            world.barrier()
            of = training(world, "full", {"optim": optim}, 2)
            load_checkpoint(folder, of.student, of.optimizer, world=world)
    return found | weights(of)


def _is_mine(ranks: dict[str, int], rank: int, name: str) -> bool:
    return ranks.get(name, 0) == rank


def memory(world: World) -> dict[str, Tensor]:
    """The bytes that this process holds of experts, their state and the teacher's MLPs."""
    of = training(world, "full", {}, 2)
    distill_step(of.student, of.teacher, of.optimizer, ROWS[:2], of.config, world=world)
    experts = [p for bank in of.student.banks() for p in bank.experts.parameters()]
    state = [v for p in experts for v in of.optimizer.state[p].values() if v.numel() > 1]
    mlps = [layer.mlp for layer in of.teacher.model.layers]  # pyright: ignore[reportAttributeAccessIssue]
    local: Any = [getattr(p, "to_local", lambda p=p: p)() for p in experts]
    held = {
        "experts": sum(t.untyped_storage().nbytes() for t in local),
        "state": sum(t.nbytes for t in state),
        "teacher": sum(
            getattr(p, "to_local", lambda p=p: p)().untyped_storage().nbytes()
            for mlp in mlps
            for p in mlp.parameters()
        ),
        "backbone": model_bytes(of.student.backbone.get_input_embeddings()),
    }
    return {name: torch.tensor(value) for name, value in held.items()}


def evaluation(world: World) -> dict[str, Tensor]:
    """Two evaluations on rows that do not divide evenly, and the errors of the blocks."""
    of = training(world, "full", {}, 2)
    student, rows = of.student, ROWS[:5]
    fit_eval_thresholds(student, ROWS[:3], world=world)
    settled = torch.stack([bank.router.settled for bank in student.banks()])
    held_out = HeldOut(of.teacher, rows)
    evaluate_layers(student, held_out, of.config.loss, world)
    result, layers = evaluate_layers(student, held_out, of.config.loss, world)
    return {
        "settled": settled,
        "result": torch.tensor([float(value) for value in result.as_dict().values()]).double(),
        "blocks": torch.tensor(block_errors(student, of.teacher, rows, world)).double(),
        **{name: torch.tensor(layers[name]) for name in ("load", "k_histogram")},
    }


def quantised(world: World) -> dict[str, Tensor]:
    """The student after a step with a teacher in NF4, which stays whole."""
    shard: Shard = "full" if world.size > 1 else "none"
    sections = {"teacher": {"quantization": "nf4"}, "optim": {"clip_norm": 1e9}}
    config = change(CONFIG, **sections, train={"shard": shard})
    dense = make_dense(hidden_size=64, intermediate_size=128)
    student = pipeline.make_student(config, MlpInputs(dense, ROWS))
    of = assemble(config, student, teacher_for(dense, config.teacher), world)
    distill_step(of.student, of.teacher, of.optimizer, ROWS[:2], of.config, world=world)
    kinds = {type(p).__name__ for name, p in of.teacher.named_parameters() if ".mlp." in name}
    return weights(of) | {"whole": torch.tensor(kinds == {"Params4bit"})}


def jobs() -> dict[str, Job]:
    """The jobs by name."""
    found: dict[str, Job] = {"evaluation": evaluation, "memory": memory, "quantised": quantised}
    for recipe in RECIPES:
        for stage, rows in (("global", 2), ("blockwise", 2), ("global", 4)):
            job = partial(steps, recipe=recipe, stage=stage, rows=rows)
            found[f"{recipe}, {stage}, {rows} rows"] = job
    for mode in MODES:
        found[f"checkpointing {mode}"] = partial(steps, recipe="recommended", rows=2, mode=mode)
    for name in OPTIMIZERS:
        for master in MASTERS:
            found[f"{name}, {master}"] = partial(optimizer_steps, name=name, master=master)
    return found


def chain(world: World, config: RunConfig, folder: Path) -> None:
    """A run that two processes begin with shares, one goes on with, and two end with shares.

    A signal stops each part after two steps.
    """
    out, full = folder / "chain", change(config, train={"shard": "full"})
    parts = ((world, full, 2), (World(), config, 4), (world, full, None))
    for here, settings, last in parts:
        if world.rank < here.size:
            stop = at_step(last, partial(send, signal.SIGINT)) if last else lambda *_: None
            result = run_distill(
                settings,
                out=out,
                resume=last != 2,
                allow_change=["train.shard"],
                after_step=stop,
                world=here,
            )
            assert result.interrupted == (last is not None)
        world.barrier()


def work(rank: int, port: int, folder: str, config: RunConfig) -> None:
    """Do the jobs as one of two processes, and save what they return."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TINY_ONN_TEST_FOLDER"] = folder
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    quiet_transformers()
    with World.from_environment("cpu") as world:
        for name, job in jobs().items():
            save_file(
                {n: t.contiguous() for n, t in job(world).items()},
                Path(folder) / f"{name}-{rank}.safetensors",
            )
        chain(world, config, Path(folder))


def spawn(folder: Path) -> RunConfig:
    """Run all jobs in two processes, which write their results to a folder.

    Returns:
        The settings of the run in it.
    """
    config = write_run(
        folder,
        optim={
            "name": "adamw8bit",
            "expert_lr": 1e-3,
            "gate_lr": 1e-3,
            "norm_lr": 1e-3,
            "lr_scale": "rms",
        },
        train={
            "rows_per_step": ROWS_PER_STEP,
            "tokens": 6 * ROWS_PER_STEP * 64,
            "eval_every_tokens": 3 * ROWS_PER_STEP * 64,
            "save_every_tokens": 2 * ROWS_PER_STEP * 64,
            "keep_checkpoints": 9,
        },
    )
    start_ranks(work, (free_port(), str(folder), config), 2)
    return config
