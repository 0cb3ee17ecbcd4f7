"""Checkpoints of a run: what learns, the optimizer's state and the loop's, whole or not at all.

A checkpoint is a folder `step-N` of safetensors and JSON with a manifest of sizes and SHA-256. It
is written beside its place and renamed into it; the newest one whose manifest holds is the one that
a run resumes from.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny_onn.console import say
from tiny_onn.errors import UserError
from tiny_onn.modeling import TinyOnnForCausalLM
from tiny_onn.optim import split_parameters
from tiny_onn.run_folder import write_json

FILES = ("student.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "manifest.json"
KEPT = 2


def save_checkpoint(
    folder: Path,
    step: int,
    student: TinyOnnForCausalLM,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    """Write `folder/step-N` and remove all but the newest two.

    Raises:
        UserError: the disk refuses; earlier checkpoints are untouched.
    """
    target = folder / f"step-{step:07d}"
    partial = folder / f".partial-{os.getpid()}"
    try:
        # Left by a process that was killed while it wrote.
        for stale in folder.glob(".partial-*"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
        save_file(student_tensors(student), partial / "student.safetensors")
        save_file(optimizer_tensors(student, optimizer), partial / "optimizer.safetensors")
        write_json(partial / "state.json", state)
        manifest = {
            name: {"bytes": (partial / name).stat().st_size, "sha256": _sha256(partial / name)}
            for name in FILES
        }
        for name in manifest:
            _fsync(partial / name)
        write_json(partial / MANIFEST, manifest)
        _fsync(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        _fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{target}: cannot write the checkpoint ({reason}), expected free disk and permission; "
            "the previous checkpoint is whole, free some space and use --resume"
        ) from error
    _remove_old(folder, target.name)
    return target


def _remove_old(folder: Path, newest: str) -> None:
    """Remove all up to `newest` but the last whole ones; a damaged later one will be redone."""
    kept = [path for path in valid_checkpoints(folder) if path.name <= newest][:KEPT]
    for path in folder.glob("step-*"):
        if path.name <= newest and path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def valid_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints whose files are all there at their sizes, newest first (hashes unread)."""
    found = sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []
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
    found = sorted(folder.glob("step-*"), reverse=True)
    for path in found:
        if path not in whole or not _hashes_hold(path):
            say(f"{path}: damaged, passed over")
            continue
        device = str(next(student.parameters()).device)
        _restore_student(student, load_file(path / "student.safetensors", device=device))
        _restore_optimizer(
            student, optimizer, load_file(path / "optimizer.safetensors", device=device)
        )
        return json.loads((path / "state.json").read_text())
    if found:
        raise UserError(
            f"{folder}: got {len(found)} checkpoints, all of them damaged, expected a whole one; "
            "restore one from a copy, or start a new run with another --out"
        )
    return None


def student_tensors(student: TinyOnnForCausalLM) -> dict[str, Tensor]:
    """Experts, gates and budget thresholds: all that a run changes in the model."""
    return {
        name: tensor.detach().contiguous()
        for name, tensor in student.state_dict().items()
        if ".mlp." in name
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


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
