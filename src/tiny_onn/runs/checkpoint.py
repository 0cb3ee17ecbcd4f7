"""Checkpoints of a run: what learns, the optimizer's state and the loop's, whole or not at all.

A checkpoint is a folder `step-N` of safetensors and JSON with a manifest of sizes and SHA-256. It
is written beside its place and renamed into it; the newest one whose manifest holds is the one that
a run resumes from.

Saving overlaps training: what is to be saved is copied to host memory between two steps (a
`Snapshot`), and a thread writes the copy while the next steps run (`Checkpointer`).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
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
# Of `state.json`, and those that are read; a checkpoint of another one is refused by name.
FORMAT = 4
READABLE = (3, FORMAT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A run between two steps, in host memory, on its own."""

    step: int
    student: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: str
    """The loop's, as JSON."""

    @property
    def name(self) -> str:
        """Of the checkpoint's folder."""
        return checkpoint_name(self.step)


def checkpoint_name(step: int) -> str:
    """The name of the folder of a step's checkpoint; names sort as steps do."""
    return f"step-{step:07d}"


def take_snapshot(
    step: int,
    student: TinyOnnForCausalLM,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Snapshot:
    """A copy of everything that decides how the run goes on; waits for a GPU.

    Args:
        step: updates done.
        student: the model.
        optimizer: of its parameters.
        state: the loop's state, of JSON values; a stage of the run keeps its own under `stage`.
    """
    if next(student.parameters()).is_cuda:
        # Paged state is host memory that kernels still in flight may write.
        torch.cuda.synchronize()
    return Snapshot(
        step=step,
        student=_to_host(student_tensors(student)),
        optimizer=_to_host(optimizer_tensors(student, optimizer)),
        state=json.dumps({"format": FORMAT, **state}, indent=2) + "\n",
    )


def _to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def write_checkpoint(
    folder: Path, snapshot: Snapshot, *, keep: int, best: int | None = None
) -> Path:
    """Write `folder/step-N` and remove all but the newest `keep` and that of the step `best`.

    Raises:
        UserError: the disk refuses; earlier checkpoints are untouched.
    """
    target = folder / snapshot.name
    partial = folder / f".partial-{os.getpid()}"
    try:
        # Left by a process that was killed while it wrote.
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
    """Writes snapshots in a thread of its own, one at a time. A context manager.

    Leaving the context waits for the write in flight and passes over its error.

    Args:
        folder: of the checkpoints.
        keep: newest checkpoints to keep, the best not counted.

    Attributes:
        best: step of the best checkpoint, kept beside the newest; None: there is none.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.best: int | None = None
        self._folder, self._keep = folder, keep
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def save(self, snapshot: Snapshot) -> str | None:
        """Begin to write; the error of the write before, for which it waits."""
        error = self.wait()
        self._writing = self._executor.submit(
            write_checkpoint, self._folder, snapshot, keep=self._keep, best=self.best
        )
        return error

    def poll(self) -> str | None:
        """The error of a write that has ended since the last call, if it failed."""
        done = self._writing is not None and self._writing.done()
        return self.wait() if done else None

    def wait(self) -> str | None:
        """Wait for the write in flight, if there is one; its error if it fails."""
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        try:
            writing.result()
        except UserError as error:
            return str(error)
        return None

    def tidy(self) -> None:
        """Remove what is neither among the newest nor the best; nothing may be in flight."""
        if newest := valid_checkpoints(self._folder):
            _remove_old(self._folder, step_of(newest[0]), self._keep, self.best)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._executor.shutdown(wait=True)


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder; -1 for a name that is none."""
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
    """Return how a run that has to lower a setting goes on from these checkpoints."""
    whole = valid_checkpoints(folder)
    if not whole:
        return "there is no checkpoint yet: start again with --resume or another --out"
    return (
        f"the checkpoint {whole[0].name} is whole: --resume, with --set and --allow-change for what"
        " you lower"
    )


def _remove_old(folder: Path, newest: int, keep: int, best: int | None) -> None:
    """Remove all up to `newest` but the last whole ones; a damaged later one will be redone."""
    whole = [path for path in valid_checkpoints(folder) if step_of(path) <= newest]
    kept: Sequence[Path] = [*whole[:keep], *(p for p in whole if step_of(p) == best)]
    for path in folder.glob("step-*"):
        if step_of(path) <= newest and path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def valid_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints whose files are all there at their sizes, newest first (hashes unread)."""
    found = sorted(folder.glob("step-*"), key=step_of, reverse=True) if folder.is_dir() else []
    return [path for path in found if _sizes_hold(path)]


def load_checkpoint(
    folder: Path, student: TinyOnnForCausalLM, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Restore the newest checkpoint whose hashes hold; its loop state, or None if there is none.

    Damaged ones are named on the terminal and passed over.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    whole = valid_checkpoints(folder)
    found = sorted(folder.glob("step-*"), key=step_of, reverse=True)
    for path in found:
        if path not in whole or not _hashes_hold(path):
            say(f"{path}: damaged, passed over")
            continue
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if (got := state.pop("format", None)) not in READABLE:
            expected = " or ".join(map(str, READABLE))
            raise UserError(
                f"{path}: got a checkpoint of format {got}, expected {expected}; go"
                " on with the version of tiny-onn in environment.json, or start a new run"
            )
        device = str(next(student.parameters()).device)
        kept = today_state(load_file(path / "optimizer.safetensors", device=device))
        _restore_student(student, _read_student(path, device))
        _restore_optimizer(student, optimizer, kept)
        return state
    if found:
        raise UserError(
            f"{folder}: got {len(found)} checkpoints, all of them damaged, expected a whole one; "
            "restore one from a copy, or start a new run with another --out"
        )
    return None


def restore_student(path: Path, student: TinyOnnForCausalLM) -> None:
    """Put the experts and gates of the checkpoint `path` into the student.

    Raises:
        UserError: it is damaged, or holds another student.
    """
    device = str(next(student.parameters()).device)
    if not _hashes_hold(path):
        raise UserError(
            f"{path}: got a damaged checkpoint, expected a whole one; remove it to use the one"
            " before it"
        )
    tensors = _read_student(path, device)
    if lacking := sorted(student_tensors(student).keys() - tensors.keys()):
        raise UserError(
            f"{path}: got no {lacking[0]}, expected all of the student's tensors; use the version"
            " of tiny-onn that wrote it, named in environment.json"
        )
    _restore_student(student, tensors)


def student_tensors(student: TinyOnnForCausalLM) -> dict[str, Tensor]:
    """Experts, gates and budget thresholds: all that a run changes in the model."""
    return {
        name: tensor.detach().contiguous()
        for name, tensor in student.state_dict().items()
        if in_mlp(name)
    }


def optimizer_tensors(
    student: TinyOnnForCausalLM, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """The optimizer's state by parameter name and entry."""
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
    """Size and SHA-256 of each file; nothing if the manifest is missing or damaged."""
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
