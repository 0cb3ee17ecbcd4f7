"""Checkpoints of a run: the trained tensors, the optimizer's state and the state of the loop.

A checkpoint is a folder `step-N` of safetensors and JSON with a manifest of sizes and SHA-256
hashes. It is written under another name and then renamed, so that it is complete or absent. A run
resumes from the newest checkpoint whose files agree with its manifest.

Saving overlaps training: between two steps the tensors are copied to host memory (a `Snapshot`),
and a thread writes the copy while the next steps run (`Checkpointer`).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny_onn.console import say
from tiny_onn.errors import UserError
from tiny_onn.model.backbone_mode import in_mlp
from tiny_onn.model.old_layout import today_state, today_tensors
from tiny_onn.model.student import TinyOnnForCausalLM, split_parameters
from tiny_onn.publish import publish
from tiny_onn.runs.files import write_json

FILES = ("student.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "manifest.json"
# The format of `state.json` that is written, and the formats that can be read.
FORMAT = 4
READABLE = (3, FORMAT)


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
    gather: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors,
) -> Snapshot:
    """Copy everything that the rest of the run depends on, after waiting for a GPU's kernels.

    Args:
        step: the number of updates done.
        student: the model.
        optimizer: the optimizer of the model's parameters.
        state: the state of the loop, of JSON values; a stage keeps its own state under `stage`.
        gather: returns the optimizer's state of all processes from that of this one.
    """
    if next(student.parameters()).is_cuda:
        # Paged optimizer state lies in host memory that kernels in flight may still write to.
        torch.cuda.synchronize()
    return Snapshot(
        step=step,
        student=_to_host(student_tensors(student)),
        optimizer=_to_host(gather(optimizer_tensors(student, optimizer))),
        state=json.dumps({"format": FORMAT, **state}, indent=2) + "\n",
    )


def _to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def write_checkpoint(
    folder: Path, snapshot: Snapshot, *, keep: int, best: int | None = None
) -> Path:
    """Write `folder/step-N`, and remove all but the newest `keep` and the one of step `best`.

    Raises:
        UserError: the disk refuses; earlier checkpoints then stay as they are.
    """
    target = folder / snapshot.name
    partial = folder / f".partial-{os.getpid()}"
    try:
        # A process that was killed while it wrote left these folders.
        for stale in folder.glob(".partial-*"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
        save_file(snapshot.student, partial / "student.safetensors")
        save_file(snapshot.optimizer, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(snapshot.state, encoding="utf-8")
        manifest = {
            name: {"bytes": (partial / name).stat().st_size, "sha256": _sha256(partial / name)}
            for name in FILES
        }
        write_json(partial / MANIFEST, manifest)
        publish(partial, target, over_folder=True)
    except (OSError, SafetensorError, UserError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{target}: cannot write the checkpoint ({_reason(error)}), expected free disk and"
            f" permission; {_what_is_left(folder)}"
        ) from error
    _remove_old(folder, snapshot.step, keep, best)
    return target


class Checkpointer:
    """A context manager that writes snapshots in a thread of its own, one at a time.

    At the end of the context the write in flight is waited for, and its error is ignored.

    Args:
        folder: the folder of the checkpoints.
        keep: the number of newest checkpoints to keep, the best one not counted.

    Attributes:
        best: the step of the best checkpoint, which is kept besides the newest; None: no step.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.best: int | None = None
        self._folder, self._keep = folder, keep
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def save(self, snapshot: Snapshot) -> str | None:
        """Wait for the previous write, begin this one, and return the previous one's error."""
        error = self.wait()
        self._writing = self._executor.submit(
            write_checkpoint, self._folder, snapshot, keep=self._keep, best=self.best
        )
        return error

    def poll(self) -> str | None:
        """Return the error of a write that has failed since the last call, or None."""
        done = self._writing is not None and self._writing.done()
        return self.wait() if done else None

    def wait(self) -> str | None:
        """Wait for the write in flight, if there is one, and return its error or None."""
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        try:
            writing.result()
        except UserError as error:
            return str(error)
        return None

    def tidy(self) -> None:
        """Remove checkpoints that are neither newest nor best; no write may be in flight."""
        if newest := valid_checkpoints(self._folder):
            _remove_old(self._folder, step_of(newest[0]), self._keep, self.best)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._executor.shutdown(wait=True)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder, or -1 if the name holds none."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isascii() and number.isdigit() else -1


def _reason(error: BaseException) -> str:
    error = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
    return str(getattr(error, "strerror", None) or error)


def _what_is_left(folder: Path) -> str:
    whole = valid_checkpoints(folder)
    if not whole:
        return "there is no earlier checkpoint; free some space"
    return f"the previous checkpoint, {whole[0].name}, is whole: free some space and use --resume"


def way_on(folder: Path) -> str:
    """Return the advice on how to resume from these checkpoints with a setting lowered."""
    whole = valid_checkpoints(folder)
    if not whole:
        return "there is no checkpoint yet: start again with --resume or another --out"
    return (
        f"the checkpoint {whole[0].name} is whole: use --resume, with --set and --allow-change for"
        " each setting that you lower"
    )


def _remove_old(folder: Path, newest: int, keep: int, best: int | None) -> None:
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
    return [path for path in found if _sizes_hold(path)]


def load_checkpoint(
    folder: Path, student: TinyOnnForCausalLM, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Restore the newest intact checkpoint, and return its loop state, or None without one.

    Damaged checkpoints are named on the terminal and skipped.

    Raises:
        UserError: there are checkpoints, but none is intact, or the newest intact one has a format
            that cannot be read.
    """
    whole = valid_checkpoints(folder)
    found = sorted(folder.glob("step-*"), key=step_of, reverse=True)
    for path in found:
        if path not in whole or not _hashes_hold(path):
            say(f"{path}: this checkpoint is damaged and is skipped")
            continue
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if (got := state.pop("format", None)) not in READABLE:
            expected = " or ".join(map(str, READABLE))
            raise UserError(
                f"{path}: got a checkpoint of format {got}, expected {expected}; resume with the"
                " version of tiny-onn that environment.json names, or start a new run"
            )
        device = str(next(student.parameters()).device)
        optimizer_state = today_state(load_file(path / "optimizer.safetensors", device=device))
        _restore_student(student, _read_student(path, device))
        _restore_optimizer(student, optimizer, optimizer_state)
        return state
    if found:
        raise UserError(
            f"{folder}: got {len(found)} checkpoints, all of them damaged, expected an intact one; "
            "restore one from a copy, or start a new run with another --out"
        )
    return None


def restore_student(path: Path, student: TinyOnnForCausalLM) -> None:
    """Copy the experts and gates of the checkpoint `path` into the student.

    Raises:
        UserError: the checkpoint is damaged, or lacks a tensor of the student.
    """
    device = str(next(student.parameters()).device)
    if not _hashes_hold(path):
        raise UserError(
            f"{path}: got a damaged checkpoint, expected an intact one; remove it to use the"
            " previous one"
        )
    tensors = _read_student(path, device)
    if lacking := sorted(student_tensors(student).keys() - tensors.keys()):
        raise UserError(
            f"{path}: got no {lacking[0]}, expected all of the student's tensors; use the version"
            " of tiny-onn that wrote the checkpoint, which environment.json names"
        )
    _restore_student(student, tensors)


def student_tensors(student: TinyOnnForCausalLM) -> dict[str, Tensor]:
    """Return the experts, gates and budget thresholds: all that a run changes in the model."""
    return {
        name: tensor.detach().contiguous()
        for name, tensor in student.state_dict().items()
        if in_mlp(name)
    }


def optimizer_tensors(
    student: TinyOnnForCausalLM, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return the optimizer's state, by the parameter's name and the entry's."""
    tensors = {}
    for group in split_parameters(student):
        for name, parameter in group.items():
            for entry, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}|{entry}"] = torch.as_tensor(value).detach().contiguous()
    return tensors


def _read_student(path: Path, device: str) -> dict[str, Tensor]:
    return today_tensors(load_file(path / "student.safetensors", device=device))


@torch.no_grad()
def _restore_student(student: TinyOnnForCausalLM, tensors: dict[str, Tensor]) -> None:
    for name, tensor in student_tensors(student).items():
        tensor.copy_(tensors[name])


def _restore_optimizer(
    student: TinyOnnForCausalLM, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    for group in split_parameters(student):
        for name, parameter in group.items():
            prefix = f"{name}|"
            optimizer.state[parameter] = {
                key.removeprefix(prefix): tensor
                for key, tensor in tensors.items()
                if key.startswith(prefix)
            }


def _manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Return the size and SHA-256 of each file, or nothing if the manifest cannot be read."""
    try:
        entries = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return {name: (entries[name]["bytes"], entries[name]["sha256"]) for name in FILES}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _sizes_hold(path: Path) -> bool:
    manifest = _manifest(path)
    files = [path / name for name in FILES]
    return bool(manifest) and all(
        file.is_file() and file.stat().st_size == manifest[file.name][0] for file in files
    )


def _hashes_hold(path: Path) -> bool:
    return all(_sha256(path / name) == sha256 for name, (_, sha256) in _manifest(path).items())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
