"""The dense model a student was converted from: where it lies now, and whether it is the one.

A run and a student record where their teacher was. It may have moved since, and another model may
lie there: `--teacher` names its new place, and what was recorded of its weights tells others apart.
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
from tiny_onn.runs.folder import read_run_config
from tiny_onn.teacher.load import load_dense

OPTION = "--teacher PATH_OR_HUB_ID"


def with_teacher(config: RunConfig, named: str | None) -> RunConfig:
    """The settings with the teacher that `--teacher` names, if it names one.

    A revision belongs to the hub id that was recorded with it; another name means its `main`.

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
    """Refuse `--teacher` with a dense model, which has no teacher.

    Raises:
        UserError: `--teacher` was given.
    """
    if named is not None:
        raise UserError(
            f"--teacher: got {named} with {model}, a dense model, expected a student or the folder"
            " of a run; leave --teacher out"
        )


def load_recorded(
    config: TeacherConfig, named: str | None, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the recorded teacher as `load_dense` does; a refusal names the option that gave it.

    Args:
        config: the recorded teacher, or the one that `with_teacher` put in its place.
        named: what `--teacher` says; None: nothing.
        device: where to put it.

    Raises:
        UserError: as `load_dense`, or no teacher was recorded.
    """
    if not config.path:
        raise UserError(
            "MODEL: got a student that does not say what it was converted from, expected its"
            f" teacher's name; give it with {OPTION}"
        )
    try:
        return load_dense(config, device)
    except UserError as error:
        if named is not None:
            raise UserError(f"--teacher:{str(error).removeprefix('teacher.path:')}") from error
        raise UserError(f"{error}; if the teacher has moved, name it with {OPTION}") from error


def check_run_teacher(folder: Path, dense: PreTrainedModel, named: str | None) -> None:
    """Return if a dense model has the backbone that the run's conversion recorded.

    A run that recorded none cannot be checked, which a line tells.

    Args:
        folder: the run's.
        dense: the model.
        named: what `--teacher` says; None: nothing.

    Raises:
        UserError: it is another model, or the run's settings cannot be read.
    """
    recorded = read_run_config(folder).teacher
    expected = _recorded_hash(folder / "conversion.json")
    if expected is None:
        say(
            f"{folder / 'conversion.json'}: got no backbone_sha256, so nothing tells whether"
            f" {named or recorded.path} is the model that the run began with"
        )
    elif backbone_hash(dense, getattr(torch, recorded.dtype)) != expected:
        raise _other(named, recorded.path, f"the run's, with a backbone of SHA-256 {expected}")


def check_teacher(
    student: TinyOnnForCausalLM,
    dense: PreTrainedModel,
    path: str,
    named: str | None,
    *,
    frozen: bool,
) -> bool:
    """Whether a dense model's backbone is the student's own, tensor by tensor.

    Args:
        student: the student.
        dense: the model.
        path: the model's name.
        named: what `--teacher` says; None: nothing.
        frozen: whether the student's backbone cannot have been trained since: it is a run's. One
            that lies alone may have been fine-tuned; a line then tells that the two differ.

    Raises:
        UserError: the sizes differ, or a run's weights do.
    """
    ours, theirs = student.config.backbone.vocab_size, dense.config.get_text_config().vocab_size
    if ours != theirs:
        raise UserError(
            f"{_field(named)}: got {path} with a vocabulary of {theirs}, expected the student's "
            f"{ours}; name the model the student was converted from, with {OPTION}"
        )
    if (difference := shape_difference(student, dense)) is not None:
        raise _other(named, path, f"one of the student's sizes ({difference})")
    if same_backbone(student, dense):
        return True
    if frozen:
        raise _other(
            named, path, "the run's, with the weights that its student has outside the MLPs"
        )
    say(
        f"{path}: its weights outside the MLPs are not the student's; this is another model than"
        " the student was converted from, or the student was fine-tuned since"
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
