"""Checkpoints of a run: the trained tensors, the optimizer's state and the state of the loop.

A checkpoint is a folder `step-N` of safetensors and JSON with a manifest of sizes and SHA-256
hashes. It is written under another name and then renamed, so that it is complete or absent. A run
resumes from the newest checkpoint whose files agree with its manifest.

One process writes the experts and gates into `student.safetensors` and the optimizer's state into
`optimizer.safetensors`. Of several processes each one writes a part of both (`sharded_files.py`),
and the first one renames the folder when all parts are written. Any number of processes resumes
from either.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny_onn.console import say
from tiny_onn.errors import UserError
from tiny_onn.model import full_sharding
from tiny_onn.model.old_layout import today_state, today_tensors
from tiny_onn.model.student import TinyOnnForCausalLM, learning_parameters
from tiny_onn.parallel import ALONE, World
from tiny_onn.publish import publish
from tiny_onn.runs.files import FileEntry, file_entry, refusal, write_json
from tiny_onn.runs.manifest import MANIFEST, STATE, is_intact, sizes_hold
from tiny_onn.runs.shared_folder import shown_to_all
from tiny_onn.runs.trained_tensors import (
    copy_to_optimizer,
    copy_to_student,
    optimizer_tensors,
    student_tensors,
)

STUDENT, OPTIMIZER = "student.safetensors", "optimizer.safetensors"
# The formats of `state.json` that one and several processes write, and those that can be read.
FORMAT, SHARDED_FORMAT = 4, 5
READABLE = (3, FORMAT, SHARDED_FORMAT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A copy of a run's state between two steps, in host memory."""

    step: int
    student: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: str
    """The state of the loop, as JSON."""

    @property
    def name(self) -> str:
        """The name of the checkpoint's folder."""
        return checkpoint_name(self.step)


def checkpoint_name(step: int) -> str:
    """Return the name of a step's checkpoint folder; the names sort in the order of the steps."""
    return f"step-{step:07d}"


def take_snapshot(
    step: int,
    student: TinyOnnForCausalLM,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    is_mine: Callable[[str], bool] | None = None,
) -> Snapshot:
    """Copy everything that the rest of the run depends on, after waiting for a GPU's kernels.

    Args:
        step: the number of updates done.
        student: the model.
        optimizer: the optimizer of the model's parameters.
        state: the state of the loop, of JSON values; a stage keeps its own state under `stage`.
        is_mine: returns True for the names in the student whose tensors, and whose optimizer state,
            this one of several processes copies; None: there is one process. Tensors that are cut
            are gathered, so that all processes make this call.
    """
    if next(student.parameters()).is_cuda:
        # Paged optimizer state lies in host memory that kernels in flight may still write to.
        torch.cuda.synchronize()
    number = FORMAT if is_mine is None else SHARDED_FORMAT

    def copied(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        # A tensor that is cut is gathered by all processes, one at a time.
        whole_ones = ((key, full_sharding.full_tensor(tensor)) for key, tensor in tensors)
        return {
            key: tensor.to("cpu", copy=True)
            for key, tensor in whole_ones
            if is_mine is None or is_mine(key.partition("|")[0])
        }

    return Snapshot(
        step=step,
        student=copied(student_tensors(student).items()),
        optimizer=copied(optimizer_tensors(student, optimizer)),
        state=json.dumps({"format": number, **state}, indent=2) + "\n",
    )


def write_checkpoint(
    folder: Path,
    snapshot: Snapshot,
    *,
    keep: int,
    best: int | None = None,
    partial: Path | None = None,
    world: World = ALONE,
    between_files: Callable[[], None] = lambda: None,
) -> Path:
    """Write `folder/step-N`, and remove all but the newest `keep` and the one of step `best`.

    Args:
        folder: the folder of the checkpoints.
        snapshot: the state of the run; of several processes each one has a part of it.
        keep: the number of newest checkpoints to keep.
        best: the step of a checkpoint to keep besides; None: no step.
        partial: the name of the folder until it is complete, the same one in all processes; None:
            one of this process.
        world: the processes, all of which make this call.
        between_files: called by a process that writes alone after it has written or hashed a file;
            an exception abandons the checkpoint.

    Raises:
        UserError: the disk refuses; earlier checkpoints then stay as they are.
    """
    target = folder / snapshot.name
    partial = partial or folder / f".partial-{os.getpid()}"

    def begin() -> None:
        # A process that was killed while it wrote left these folders.
        for stale in folder.glob(".partial-*"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)

    def finish(entries: Mapping[str, FileEntry]) -> None:
        (partial / STATE).write_text(snapshot.state, encoding="utf-8")
        for name, entry in entries.items():
            if (got := (partial / name).stat().st_size) != entry.bytes:
                raise OSError(f"got {got} bytes of {name}, expected {entry.bytes}")
        entries = {**entries, STATE: file_entry(partial / STATE)}
        write_json(partial / MANIFEST, {name: e._asdict() for name, e in entries.items()})
        publish(partial, target, over_folder=True)

    try:
        if world.size > 1:
            # Loading this part of torch takes a second.
            from tiny_onn.runs.sharded_files import save_shards  # noqa: PLC0415

            save_shards(partial, {**snapshot.student, **snapshot.optimizer}, world, begin, finish)
        else:
            begin()
            entries: dict[str, FileEntry] = {}
            for name, tensors in ((STUDENT, snapshot.student), (OPTIMIZER, snapshot.optimizer)):
                save_file(tensors, partial / name)
                between_files()
                entries[name] = file_entry(partial / name)
                between_files()
            finish(entries)
    except (OSError, SafetensorError, UserError) as error:
        raise UserError(
            f"{target}: cannot write the checkpoint ({refusal(error)}), expected free disk and"
            f" permission; {_what_is_left(folder)}"
        ) from error
    finally:
        # It is there only if it did not become the checkpoint.
        if world.first:
            shutil.rmtree(partial, ignore_errors=True)
    if world.first:
        remove_old(folder, snapshot.step, keep, best)
    return target


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder, or -1 if the name holds none."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isascii() and number.isdigit() else -1


def _what_is_left(folder: Path) -> str:
    whole = valid_checkpoints(folder)
    if not whole:
        return "there is no earlier checkpoint; free some space"
    return f"the previous checkpoint, {whole[0].name}, is whole: free some space and use --resume"


def way_on(folder: Path) -> str:
    """Return the advice on how to resume from these checkpoints with a setting lowered."""
    whole = valid_checkpoints(folder)
    if not whole:
        return "there is no checkpoint yet: start again with the setting lowered"
    return (
        f"the checkpoint {whole[0].name} is whole: use --resume, with --set and --allow-change for"
        " each setting that you lower"
    )


def remove_old(folder: Path, newest: int, keep: int, best: int | None) -> None:
    """Remove steps up to `newest`, except the `keep` newest complete ones and `best`.

    Checkpoints of later steps stay, since the run will write those steps again.
    """
    whole = [path for path in valid_checkpoints(folder) if step_of(path) <= newest]
    to_keep: Sequence[Path] = [*whole[:keep], *(p for p in whole if step_of(p) == best)]
    for path in folder.glob("step-*"):
        if step_of(path) <= newest and path not in to_keep:
            shutil.rmtree(path, ignore_errors=True)


def valid_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints whose files have the recorded sizes, newest first; read no hashes."""
    found = sorted(folder.glob("step-*"), key=step_of, reverse=True) if folder.is_dir() else []
    return [path for path in found if sizes_hold(path)]


def hold_students(folder: Path) -> bool:
    """Return True if there are checkpoints, and a run resumes from any of them unconverted.

    Checkpoints of before lack the units of weights, which follow from the conversion.
    """
    states = [path / STATE for path in valid_checkpoints(folder)]
    try:
        return bool(states) and all("units" in json.loads(s.read_bytes()) for s in states)
    except ValueError:
        return False


def load_checkpoint(
    folder: Path,
    student: TinyOnnForCausalLM,
    optimizer: torch.optim.Optimizer,
    *,
    is_mine: Callable[[torch.nn.Parameter], bool] = lambda _: True,
    world: World = ALONE,
) -> dict[str, Any] | None:
    """Restore the newest intact checkpoint, and return its loop state, or None without one.

    Damaged checkpoints are named on the terminal and skipped. All processes restore the same one.

    Args:
        folder: the folder of the checkpoints.
        student: the model.
        optimizer: the optimizer of the model's parameters.
        is_mine: returns True for the parameters whose optimizer state this process holds.
        world: the processes, all of which make this call.

    Raises:
        UserError: there are checkpoints, but none is intact, or the newest intact one has a format
            that cannot be read, or not all processes see it.
    """
    newest = -world.least(-max(_steps(folder), default=-1))
    if not shown_to_all(world, lambda: newest in [-1, *_steps(folder)]):
        raise _unseen(folder / checkpoint_name(newest), world)
    found = _steps(folder)
    for number in range(world.of_first(len(found))):
        path = folder / checkpoint_name(world.of_first(found[number] if world.first else 0))
        # A process that does not see yet what the others have written must not skip it.
        whole = world.any_true(sizes_hold(path))
        if whole and not shown_to_all(world, partial(sizes_hold, path)):
            raise _unseen(path, world)
        if whole and not world.any_true(not is_intact(path, world)):
            return _restore(path, student, optimizer, is_mine)
        say(f"{path}: this checkpoint is damaged and is skipped")
    if world.any_true(bool(found)):
        raise UserError(
            f"{folder}: got {len(found)} checkpoints, all of them damaged, expected an intact one; "
            "restore one from a copy, or start a new run with another --out"
        )
    return None


def _steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints that this process sees, newest first."""
    return sorted((step_of(path) for path in folder.glob("step-*")), reverse=True)


def _unseen(path: Path, world: World) -> UserError:
    return UserError(
        f"{path}: got a checkpoint that only some of {world.size} processes see, expected one that"
        " all see; look at the file system that they share, and use --resume again"
    )


def _restore(
    path: Path,
    student: TinyOnnForCausalLM,
    optimizer: torch.optim.Optimizer,
    is_mine: Callable[[torch.nn.Parameter], bool],
) -> dict[str, Any]:
    """Restore an intact checkpoint, and return its loop state."""
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    if (got := state.pop("format", None)) not in READABLE:
        expected = ", ".join(map(str, READABLE[:-1]))
        raise UserError(
            f"{path}: got a checkpoint of format {got}, expected {expected} or {READABLE[-1]};"
            " resume with the version of tiny-onn that environment.json names, or start a new run"
        )
    cut = full_sharding.is_fully_sharded(student)
    device = None if cut else str(next(student.parameters()).device)
    mine = {name for name, p in learning_parameters(student).items() if is_mine(p)}

    def is_wanted(key: str) -> bool:
        # The unit of a weight scales its gradient in every process.
        name, _, entry = key.partition("|")
        return name in mine or entry == "unit"

    optimizer_state = _read(path, OPTIMIZER, device, is_wanted)
    copy_to_student(student, _read(path, STUDENT, device))
    copy_to_optimizer(student, optimizer, optimizer_state)
    return state


def _read(
    path: Path, file: str, device: str | None, is_wanted: Callable[[str], bool] = lambda _: True
) -> dict[str, Tensor]:
    """Return the student's or the optimizer's tensors of a checkpoint, those that are wanted.

    They are on a device, or with None in mapped files, of which a process may copy its shares.
    """
    of_optimizer = file == OPTIMIZER
    if (path / file).is_file():
        tensors = load_file(path / file, device=device or "cpu")
        tensors = today_state(tensors) if of_optimizer else today_tensors(tensors)
        return {key: tensor for key, tensor in tensors.items() if is_wanted(key)}
    if device is None:
        # A tensor lies whole in one of the files, which are mapped and read where they are copied.
        files = sorted(path.glob("*.safetensors"))
        found = ((key, tensor) for file in files for key, tensor in load_file(file).items())
        return {k: t for k, t in found if ("|" in k) == of_optimizer and is_wanted(k)}
    from tiny_onn.runs.sharded_files import load_shards  # noqa: PLC0415

    return load_shards(path, lambda key: ("|" in key) == of_optimizer and is_wanted(key), device)


def restore_student(path: Path, student: TinyOnnForCausalLM) -> None:
    """Copy the experts and gates of the checkpoint `path` into the student.

    Raises:
        UserError: the checkpoint is damaged, or lacks a tensor of the student.
    """
    device = str(next(student.parameters()).device)
    if not is_intact(path):
        raise UserError(
            f"{path}: got a damaged checkpoint, expected an intact one; remove it to use the"
            " previous one"
        )
    tensors = _read(path, STUDENT, device)
    if lacking := sorted(student_tensors(student).keys() - tensors.keys()):
        raise UserError(
            f"{path}: got no {lacking[0]}, expected all of the student's tensors; use the version"
            " of tiny-onn that wrote the checkpoint, which environment.json names"
        )
    copy_to_student(student, tensors)
