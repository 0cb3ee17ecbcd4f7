"""The dense model that a student was converted from: it is found again, and its identity checked.

A run and a student record where their teacher was. The teacher may have moved since, and another
model may lie in its old place: `--teacher` names the new place, and recorded hashes of the
teacher's weights tell other models apart.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_onn.config.schema import RunConfig, TeacherConfig
from tiny_onn.console import say
from tiny_onn.conversion.verify import backbone_hash, same_backbone, shape_difference
from tiny_onn.errors import UserError
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.runs.folder import no_student, read_run_config, settings_of_student
from tiny_onn.teacher.load import load_dense

OPTION = "--teacher PATH_OR_HUB_ID"


def with_teacher(config: RunConfig, named: str | None) -> RunConfig:
    """Return the settings with the teacher that `--teacher` names, if it names one.

    The recorded revision belongs to the recorded hub id; for another name it becomes `main`.

    Raises:
        UserError: the name is empty.
    """
    if named is None or named == config.teacher.path:
        return config
    if not named:
        raise UserError(
            "--teacher: got an empty name, expected the model that the student was converted from;"
            f" name it with {OPTION}, or leave the option out"
        )
    return replace(config, teacher=replace(config.teacher, path=named, revision="main"))


def refuse_for_dense(model: str, named: str | None) -> None:
    """Refuse a run that has no student yet, and `--teacher` with a dense model without a teacher.

    Raises:
        UserError: the model is the folder of a run, or `--teacher` was given.
    """
    if settings_of_student(model) is not None:
        raise no_student(model)
    if named is not None:
        raise UserError(
            f"--teacher: got {named} with {model}, a dense model, which has no teacher, expected a"
            " student or the folder of a run; leave --teacher out"
        )


def load_recorded(
    config: TeacherConfig, named: str | None, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the recorded teacher with `load_dense`; a refusal names the option that helps.

    Args:
        config: the recorded teacher, or the one that `with_teacher` put in its place.
        named: the value of `--teacher`; None: the option was not given.
        device: the device for the teacher.

    Raises:
        UserError: `load_dense` refuses the model, or no teacher was recorded.
    """
    if not config.path:
        raise UserError(
            "MODEL: got a student that does not record what it was converted from, expected the"
            f" name of its teacher; name the teacher with {OPTION}"
        )
    try:
        return load_dense(config, device)
    except UserError as error:
        if named is not None:
            raise UserError(f"--teacher:{str(error).removeprefix('teacher.path:')}") from error
        raise UserError(f"{error}; if the teacher has moved, name it with {OPTION}") from error


def check_run_teacher(folder: Path, dense: PreTrainedModel, named: str | None) -> None:
    """Refuse a dense model whose backbone is not the one that the run's conversion recorded.

    If the run recorded no backbone, the check is impossible, and a printed line says so.

    Args:
        folder: the run's folder.
        dense: the model.
        named: the value of `--teacher`; None: the option was not given.

    Raises:
        UserError: the model is another one, or the run's settings cannot be read.
    """
    recorded = read_run_config(folder).teacher
    expected = _recorded_hash(folder / "conversion.json")
    if expected is None:
        say(
            f"{folder / 'conversion.json'}: got no backbone_sha256, so that it cannot be checked"
            f" whether {named or recorded.path} is the model that the run began with"
        )
    elif backbone_hash(dense, getattr(torch, recorded.dtype)) != expected:
        raise _other(
            named, recorded.path, f"the run's teacher, with a backbone of SHA-256 {expected}"
        )


def check_teacher(
    student: TinyOnnForCausalLM,
    dense: PreTrainedModel,
    path: str,
    named: str | None,
    *,
    frozen: bool,
) -> bool:
    """Return True if a dense model's backbone equals the student's, tensor by tensor.

    Args:
        student: the student.
        dense: the model.
        path: the model's name.
        named: the value of `--teacher`; None: the option was not given.
        frozen: true for a student in its run's folder, whose backbone was never trained. Any other
            student may have been fine-tuned; if the two differ, a printed line says so.

    Raises:
        UserError: the sizes differ, or the weights differ from those of a run's student.
    """
    ours, theirs = student.config.backbone.vocab_size, dense.config.get_text_config().vocab_size
    if ours != theirs:
        raise UserError(
            f"{_field(named)}: got {path} with a vocabulary of {theirs}, expected the student's "
            f"{ours}; name the model that the student was converted from, with {OPTION}"
        )
    if (difference := shape_difference(student, dense)) is not None:
        raise _other(named, path, f"one of the student's sizes ({difference})")
    if same_backbone(student, dense):
        return True
    if frozen:
        raise _other(
            named, path, "the run's teacher, whose weights outside the MLPs equal the student's"
        )
    say(
        f"{path}: its weights outside the MLPs differ from the student's; either the student was"
        " converted from another model, or it was fine-tuned since"
    )
    return False


def _other(named: str | None, path: str, expected: str) -> UserError:
    return UserError(
        f"{_field(named)}: got {named or path}, another model, expected {expected};"
        f" name the model that the student was converted from, with {OPTION}"
    )


def _field(named: str | None) -> str:
    return "teacher.path" if named is None else "--teacher"


def _recorded_hash(file: Path) -> str | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    value = found.get("backbone_sha256") if isinstance(found, dict) else None
    return value if isinstance(value, str) else None
