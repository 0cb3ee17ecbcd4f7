"""The student of a run that has not finished: its newest checkpoint in a fresh conversion."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_onn.checkpoint import restore_student, valid_checkpoints
from tiny_onn.config import RunConfig
from tiny_onn.convert import share_backbone, student_config
from tiny_onn.modeling import TinyOnnForCausalLM
from tiny_onn.teacher import load_dense


def newer_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run folder, if there is one newer than its finished student."""
    found = valid_checkpoints(folder / "checkpoints")
    if not found or not (folder / "config.json").is_file():
        return None
    if not (folder / "student").is_dir():
        return found[0]
    finished = _finished_steps(folder)
    step = int(found[0].name.removeprefix("step-"))
    return found[0] if finished is not None and step > finished else None


def _finished_steps(folder: Path) -> int | None:
    """Steps after which the run wrote its student; None if it does not say."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    steps = summary.get("steps") if isinstance(summary, dict) else None
    return steps if isinstance(steps, int) else None


def load_from_checkpoint(
    config: RunConfig, path: Path, device: torch.device
) -> tuple[TinyOnnForCausalLM, PreTrainedTokenizerBase]:
    """The student in a checkpoint of a run with these settings, and its tokenizer.

    Raises:
        UserError: the checkpoint is damaged, or the teacher cannot be had.
    """
    dense, tokenizer = load_dense(config.teacher, device)
    student = share_backbone(dense, student_config(dense, config.experts, config.router))
    student.config.teacher = config.teacher.path
    student.config.teacher_revision = config.teacher.revision
    restore_student(path, student)
    student.requires_grad_(False)
    student.set_attn_implementation(_generation_attention(dense))
    return student, tokenizer


def _generation_attention(dense: PreTrainedModel) -> str:
    return "sdpa" if dense._supports_sdpa else "eager"
