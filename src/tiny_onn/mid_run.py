"""The student of a run at one of its checkpoints, in a fresh conversion."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tiny_onn.checkpoint import restore_student, step_of, valid_checkpoints
from tiny_onn.config.schema import RunConfig
from tiny_onn.conversion.convert import share_backbone, student_config
from tiny_onn.errors import UserError
from tiny_onn.model.backbone import generation_attention
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.recorded_teacher import check_run_teacher, load_recorded


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One of the students that a run has kept."""

    path: Path | None
    """Its checkpoint; None: the finished student."""
    step: int | None
    """Updates that made it; None if the run does not say."""
    about: str
    """Which one it is, in words."""


def choose(folder: Path, which: str) -> Choice:
    """The student of a run folder that `which` names: `newest`, `best` (held-out KL), or a step.

    Raises:
        UserError: the run has not kept it.
    """
    newer = newer_checkpoint(folder)
    told = _read(folder / "summary.json" if newer is None else newer / "state.json")
    newest = _step(told, "steps" if newer is None else "step")
    best = _step(told.get("best"), "step")
    if which == "newest":
        step = newest
    else:
        kept = {step_of(path): path for path in valid_checkpoints(folder / "checkpoints")}
        asked = str(best) if which == "best" else which
        steps = sorted({*kept} if newest is None else {newest, *kept})
        if asked not in map(str, steps):
            got = f"best, step {best}" if which == "best" else which
            raise UserError(
                f"--checkpoint: got {got}, expected newest, best or a step that the run has kept,"
                f" of {', '.join(map(str, steps))}; leave it out for the newest"
            )
        step = int(asked)
        newer = newer if step == newest else kept[step]
    about = "the finished student" if step is None else f"step {step}"
    about += ", the newest" * (step == newest) + ", the best by held-out KL" * (step == best)
    if best not in (None, step):
        about += f"; the best by held-out KL was step {best}: --checkpoint best"
    return Choice(path=newer, step=step, about=about)


def newer_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run folder, if there is one newer than its finished student."""
    found = valid_checkpoints(folder / "checkpoints")
    if not found or not (folder / "config.json").is_file():
        return None
    if not (folder / "student").is_dir():
        return found[0]
    finished = _finished_steps(folder)
    return found[0] if finished is not None and step_of(found[0]) > finished else None


def _finished_steps(folder: Path) -> int | None:
    """Steps after which the run wrote its student; None if it does not say."""
    return _step(_read(folder / "summary.json"), "steps")


def _step(record: object, name: str) -> int | None:
    step = record.get(name) if isinstance(record, dict) else None
    return step if isinstance(step, int) else None


def _read(file: Path) -> dict[str, Any]:
    """A JSON object of a run; empty if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def load_from_checkpoint(
    config: RunConfig,
    folder: Path,
    path: Path,
    device: torch.device,
    named_teacher: str | None = None,
) -> tuple[TinyOnnForCausalLM, PreTrainedTokenizerBase]:
    """The student in a checkpoint of a run with these settings, and its tokenizer.

    Args:
        config: the settings.
        folder: the run's.
        path: the checkpoint's.
        device: where to put the student.
        named_teacher: what `--teacher` says; None: nothing.

    Raises:
        UserError: the checkpoint is damaged, or the teacher cannot be had or is another model.
    """
    dense, tokenizer = load_recorded(config.teacher, named_teacher, device)
    check_run_teacher(folder, dense, named_teacher)
    student = share_backbone(dense, student_config(dense, config.experts, config.router))
    student.config.teacher = config.teacher.path
    student.config.teacher_revision = config.teacher.revision
    restore_student(path, student)
    student.requires_grad_(False)
    student.set_attn_implementation(generation_attention(dense))
    return student, tokenizer
