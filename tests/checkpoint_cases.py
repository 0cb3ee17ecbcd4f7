"""What four processes do with checkpoints in the tests, and what each of them saw.

A case returns JSON values. The first two processes are a world of two for one half of the cases,
the other two for the other half; all four are the world of the case `exchanged`.
"""

import json
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forks import start_ranks
from parallel_cases import ROWS, four_processes, free_port, prepared
from tiny_onn.config.schema import Shard
from tiny_onn.distill.optim import SplitOptimizer, build_optimizer
from tiny_onn.distill.saving import saving_ranks
from tiny_onn.distill.step import distill_step
from tiny_onn.errors import UserError
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.parallel import ALONE, World
from tiny_onn.runs import sharded_files, shared_folder
from tiny_onn.runs.checkpoint import (
    Snapshot,
    load_checkpoint,
    take_snapshot,
    write_checkpoint,
)
from tiny_onn.runs.checkpointer import Checkpointer
from tiny_onn.runs.shared_folder import check_shared
from tiny_onn.runs.trained_tensors import optimizer_tensors, student_tensors

Case = Callable[[World, Path], Any]
OPTIM = {"optim": {"lr_scale": "rms"}}


class Session:
    """What a run of some processes holds in memory."""

    def __init__(self, world: World, shard: Shard = "none", *, trained: bool = True) -> None:
        self.world = world
        self.student: TinyOnnForCausalLM
        self.student, self.dense, self.config = prepared(OPTIM, 1)
        options: dict[str, Any] = {"world": world, "shard": shard}
        self.optimizer: SplitOptimizer
        self.optimizer = build_optimizer(self.student, self.config.optim, **options)
        if trained:
            models = (self.student, self.dense, self.optimizer)
            distill_step(*models, ROWS[:1] * world.size, self.config, world=world)
        else:
            for parameter in self.student.trainable().values():
                parameter.data.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """The weights and the optimizer's state that this process holds."""
        state = dict(optimizer_tensors(self.student, self.optimizer))
        return student_tensors(self.student) | state

    def snapshot(self, step: int) -> Snapshot:
        """This process's part of a checkpoint."""
        ranks = saving_ranks(self.student, self.optimizer, self.world.size)
        is_mine = None if self.world.size == 1 else lambda n: ranks.get(n, 0) == self.world.rank
        return take_snapshot(step, self.student, self.optimizer, {"step": step}, is_mine)

    def save(self, folder: Path, step: int) -> str | None:
        """Write a checkpoint at once; the error, if there is one."""
        options: dict[str, Any] = {"partial": folder / ".partial-0", "world": self.world}
        try:
            write_checkpoint(folder, self.snapshot(step), keep=9, **options)
        except UserError as error:
            return str(error)
        return None

    def load(self, folder: Path) -> dict[str, Any] | None:
        """Restore the newest checkpoint."""
        models = (self.student, self.optimizer)
        is_mine = self.optimizer.is_mine
        return load_checkpoint(folder, *models, is_mine=is_mine, world=self.world)


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def refused(world: World, folder: Path) -> Any:
    """A checkpoint of which the second process cannot write its part, and one after it."""
    session = Session(world)
    assert session.save(folder, 1) is None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not world.first:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    told = session.save(folder, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    world.barrier()
    left = names_in(folder)
    world.barrier()
    return {"told": told, "left": left, "next": session.save(folder, 3), "after": names_in(folder)}


def overlapped(world: World, folder: Path) -> Any:
    """A checkpoint whose writing waits until the training that goes on has come far enough."""
    session, go_on, seen = Session(world, "optimizer"), threading.Event(), {}
    expected = {name: tensor.clone() for name, tensor in session.tensors().items()}
    with Checkpointer(folder, 2, world) as writer, slow_to_hash(go_on) as hashing:
        writer.save(session.snapshot(1))
        models = (session.student, session.dense, session.optimizer)
        distill_step(*models, ROWS[2:4], session.config, step=1, world=world)
        # The writer's thread may need longer than the step until it has begun.
        assert hashing.wait(60)
        seen["while writing"] = [name[:8] for name in names_in(folder)]
        seen["moved"] = not torch.equal(*map(flat, (expected, session.tensors())))
        world.barrier()
        go_on.set()
        seen["error"] = writer.wait()
    world.barrier()
    seen["written"] = names_in(folder)
    restored = Session(world, "optimizer", trained=False)
    restored.load(folder)
    # The units of weights are in every process.
    held = {n: t for n, t in restored.tensors().items() if n in expected}
    seen["same"] = same(held, expected)
    return seen


@contextmanager
def slow_to_hash(go_on: threading.Event) -> Iterator[threading.Event]:
    """Let this process hash its files only after `go_on`; the event tells that it wants to."""
    real, hashing = sharded_files.file_entry, threading.Event()

    def slow(file: Path) -> Any:
        hashing.set()
        assert go_on.wait(60)
        return real(file)

    sharded_files.file_entry = slow
    try:
        yield hashing
    finally:
        sharded_files.file_entry = real


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All numbers of the weights."""
    return torch.cat([t.double().reshape(-1) for n, t in sorted(tensors.items()) if "|" not in n])


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether two tables hold the same bits."""
    return ours.keys() == theirs.keys() and all(
        t.dtype == theirs[n].dtype and t.shape == theirs[n].shape and torch.equal(t, theirs[n])
        for n, t in ours.items()
    )


def damaged(world: World, folder: Path) -> Any:
    """The step from which each process goes on, with the part of one newest file damaged."""
    session = Session(world)
    for step in (1, 2, 3):
        assert session.save(folder, step) is None
    world.barrier()
    if world.first:
        last = sorted((folder / "step-0000003").glob("shard-*"))[-1]
        last.write_bytes(last.read_bytes()[:-1] + b"?")
        sorted((folder / "step-0000002").glob("shard-*"))[0].unlink()
    world.barrier()
    state = Session(world, trained=False).load(folder)
    every = sorted(folder.glob("*/shard-*"))
    world.barrier()
    if world.first:
        for file in every:
            file.write_bytes(b"")
    world.barrier()
    try:
        session.load(folder)
        told = None
    except UserError as error:
        told = str(error)
    return {"state": state, "told": told}


def unseen(world: World, folder: Path) -> Any:
    """What a process says that has another folder under the name of the run's."""
    shared_folder.SHOWN_AFTER_S = 0.3
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if world.first:
        (folder / "a" / "lock").write_text("the run")
    world.barrier()
    check_shared(folder / "a" / "lock", world)
    try:
        check_shared(folder / ("a" if world.first else "b") / "lock", world)
    except UserError as error:
        return str(error)
    return None


def late(world: World, folder: Path) -> Any:
    """From where two processes go on if the second one's mount shows a checkpoint later or never.

    The mount is a copy of the folder, which lacks the newest checkpoint, then a file of it.
    """
    session, seen = Session(world), {}
    for step in (1, 2, 3):
        assert session.save(folder, step) is None
    world.barrier()
    mount = folder if world.first else folder.with_name("late mount")
    if not world.first:
        shutil.copytree(folder, mount)
    world.barrier()
    for step, lacking in ((3, "."), (2, "manifest.json")):
        source, copy = (place / f"step-{step:07d}" / lacking for place in (folder, mount))
        shown_later = []
        if not world.first:
            shown_later = [threading.Timer(0.5, show, (source, copy))]
            shutil.rmtree(copy) if copy.is_dir() else copy.unlink()
            shown_later[0].start()
        seen[f"{step} is late"] = Session(world, trained=False).load(mount)
        for timer in shown_later:
            timer.join()
        world.barrier()
        shared_folder.SHOWN_AFTER_S = 0.3
        if not world.first:
            shutil.rmtree(copy) if copy.is_dir() else copy.unlink()
        try:
            Session(world, trained=False).load(mount)
        except UserError as error:
            seen[f"{step} is lacking"] = str(error)
        shared_folder.SHOWN_AFTER_S = 30.0
        world.barrier()
        # The one before is the newest from now on.
        shutil.rmtree(mount / f"step-{step:07d}", ignore_errors=True)
        world.barrier()
    return seen


def show(source: Path, copy: Path) -> None:
    """Copy a file, or a folder under another name that then becomes its own."""
    if source.is_dir():
        shutil.copytree(source, copy.with_name(".coming"))
        copy.with_name(".coming").rename(copy)
    else:
        shutil.copy(source, copy)


def exchanged(four: World, pair: World, folder: Path) -> Any:
    """Whether a checkpoint of one process keeps its bits through two, four and one.

    Two processes shard the optimizer's state, and four do not.
    """
    source = Session(ALONE)
    expected, found = source.tensors(), {}
    if four.first:
        source.save(folder / "1", 1)
    four.barrier()
    hops: tuple[tuple[World, Shard, str, str], ...] = (
        (pair, "optimizer", "1", "2"),
        (four, "none", "2", "4"),
        (four, "optimizer", "4", "4 sharded"),
        (ALONE, "none", "4 sharded", "1 again"),
    )
    for world, shard, before, after in hops:
        if four.rank < world.size:
            session = Session(world, shard, trained=False)
            found[f"state {after}"] = session.load(folder / before)
            held = session.tensors()
            found[f"same {after}"] = same(held, {n: t for n, t in expected.items() if n in held})
            found[f"share {after}"] = len(held) / len(expected)
            session.save(folder / after, 1)
        four.barrier()
    if four.first:
        files = ("student.safetensors", "optimizer.safetensors")
        one, again = (folder / name / "step-0000001" for name in ("1", "1 again"))
        found["files"] = all((one / f).read_bytes() == (again / f).read_bytes() for f in files)
    return found


PAIR_CASES: dict[str, Case] = {
    "refused": refused,
    "overlapped": overlapped,
    "damaged": damaged,
    "unseen": unseen,
    "late": late,
}


def work(rank: int, port: int, folder: str) -> None:
    """Do the cases of one of four processes, and write what it saw."""
    with four_processes(rank, port) as (four, pair, half):
        for name, case in list(PAIR_CASES.items())[half::2]:
            place = Path(folder) / name
            seen = case(pair, place)
            (Path(folder) / f"{name}-{pair.rank}.json").write_text(json.dumps(seen))
        four.barrier()
        seen = exchanged(four, pair, Path(folder) / "exchanged")
        (Path(folder) / f"exchanged-{rank}.json").write_text(json.dumps(seen))
        four.barrier()


def spawn(folder: Path) -> None:
    """Do all cases in four processes, which write what they saw to a folder."""
    start_ranks(work, (free_port(), str(folder)), 4)
