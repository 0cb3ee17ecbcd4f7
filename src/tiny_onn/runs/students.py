"""Students on disk: found by the name that a user gives, loaded, and saved.

The name is that of a run folder, or of a folder that `save_pretrained` wrote.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tiny_onn.config.schema import RunConfig, TeacherConfig
from tiny_onn.console import say
from tiny_onn.conversion.convert import adopt_backbone
from tiny_onn.conversion.pipeline import Prepared, blank_student
from tiny_onn.data.tokens import fit_tokenizer
from tiny_onn.device import without_emulation
from tiny_onn.errors import LoadErrors, UserError
from tiny_onn.model.attention import DOCUMENT_ATTENTION
from tiny_onn.model.backbone import generation_attention
from tiny_onn.model.full_sharding import full_experts
from tiny_onn.model.norms import learned_norms
from tiny_onn.model.quantized_experts import QuantizeTo
from tiny_onn.model.student import TinyOnnConfig, TinyOnnForCausalLM
from tiny_onn.parallel import ALONE, World
from tiny_onn.publish import let_others_read
from tiny_onn.runs.checkpoint import restore_student, step_of, valid_checkpoints
from tiny_onn.runs.folder import model_type_of, no_student, read_run_config, settings_of_student
from tiny_onn.runs.recorded_teacher import (
    check_run_teacher,
    check_teacher,
    load_recorded,
    with_teacher,
)
from tiny_onn.teacher.model_files import (
    check_loaded,
    check_model_config,
    check_runs,
    check_weights,
    read_object,
)

# A run that has finished writes its student again only where there is none.
REMEDY = "remove the folder and write it again with --resume"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedStudent:
    """A student from disk, its tokenizer, and the settings it came from."""

    student: TinyOnnForCausalLM
    tokenizer: PreTrainedTokenizerBase
    config: RunConfig
    step: int | None
    """The number of updates that trained the student, if that is known."""
    of_run: bool
    """True if the student lies in its run's folder, so that it has its teacher's backbone."""
    named_teacher: str | None
    """The teacher that the user named instead of the recorded one."""


def is_student(name: str) -> bool:
    """Return True if a name is that of a run folder or of a student's folder."""
    # Path.is_dir raises an error for a name that is too long, os.path.isdir returns False.
    if not os.path.isdir(name):  # noqa: PTH112
        return False
    folder = Path(name)
    found = (folder / "student").is_dir() or newer_checkpoint(folder) is not None
    return found or model_type_of(folder) == "tiny_onn"


def load_student(
    name: str,
    device: torch.device,
    checkpoint: str = "newest",
    teacher: str | None = None,
    *,
    quantize: QuantizeTo = "none",
) -> LoadedStudent:
    """Load a student from a run folder, with the run's settings, or from its own, with defaults.

    Args:
        name: the folder.
        device: the device for the student.
        checkpoint: the choice among a run's students: `newest` (the finished student, or the newest
            checkpoint of a run that is not finished), `best` (by held-out KL) or a step. A printed
            line tells which one was chosen.
        teacher: the dense model that the student was converted from: a folder, hub id, or
            `embedded`; None: the recorded one. Only a checkpoint is loaded with its help.
        quantize: the number format that holds the experts; another line tells what memory it saves.

    Raises:
        UserError: there is no student, or its files are damaged, or its teacher cannot be had, or
            the experts cannot be quantised.
    """
    loaded = _load(name, device, checkpoint, teacher)
    if quantize != "none":
        say(loaded.student.quantize_experts(quantize))
    return loaded


def _load(name: str, device: torch.device, checkpoint: str, teacher: str | None) -> LoadedStudent:
    folder, step = Path(name), None
    there = os.path.isdir(name)  # noqa: PTH112 - as in `is_student`
    of_run = there and ((folder / "student").is_dir() or newer_checkpoint(folder) is not None)
    if of_run:
        config, student_folder = read_run_config(folder), folder / "student"
        config = without_emulation(config, device)
        choice = choose(folder, checkpoint)
        say(f"{name}: {choice.description}")
        step = choice.step
        if choice.path is not None:
            config = with_teacher(config, teacher)
            student, tokenizer = load_from_checkpoint(config, folder, choice.path, device, teacher)
            return LoadedStudent(
                student=student.train(False),
                tokenizer=tokenizer,
                config=config,
                step=step,
                of_run=True,
                named_teacher=teacher,
            )
    elif there and model_type_of(folder) == "tiny_onn":
        if checkpoint != "newest":
            raise UserError(
                f"--checkpoint: got {checkpoint} with {name}, one student, expected the folder of a"
                " run; name that, or leave --checkpoint out"
            )
        config, student_folder = settings_of_student(name) or RunConfig(), folder
    else:
        raise no_student(name)
    try:
        with LoadErrors(
            lambda reason: (
                "expected config.json, model.safetensors and tokenizer.json of a student "
                f"({reason}); {REMEDY}"
            )
        ):
            student, tokenizer = _read_student(student_folder)
    except UserError as error:
        reason = str(error)
        if "expected" not in reason:
            reason = f"expected a whole student ({reason}); {REMEDY}"
        raise UserError(f"MODEL: got {student_folder}, {reason}") from error
    if not of_run:
        settings = student.config
        dtype = "bfloat16" if student.dtype == torch.bfloat16 else "float32"
        recorded = TeacherConfig(
            path=settings.teacher, revision=settings.teacher_revision, dtype=dtype
        )
        config = without_emulation(replace(config, teacher=recorded), device)
    if config.teacher.dtype == "float32":
        student.float()
    student.requires_grad_(False)
    student.to(device)  # pyright: ignore[reportArgumentType] - transformers hides Module.to
    return LoadedStudent(
        student=student.train(False),
        tokenizer=tokenizer,
        config=with_teacher(config, teacher),
        step=step,
        of_run=of_run,
        named_teacher=teacher,
    )


def _read_student(folder: Path) -> tuple[TinyOnnForCausalLM, PreTrainedTokenizerBase]:
    """Load the student and tokenizer in a folder, after the checks that dense models get too."""
    source = str(folder)
    check_model_config(source, None)
    table = read_object(folder / "config.json")
    if not all(isinstance(table.get(name, ""), str) for name in ("teacher", "teacher_revision")):
        raise UserError("teacher or teacher_revision in config.json is no string")
    with torch.device("meta"):
        skeleton = TinyOnnForCausalLM(TinyOnnConfig.from_pretrained(source))
    check_weights(source, None, skeleton)
    # With loading info the method returns a pair, which its annotation does not say.
    loaded: Any = TinyOnnForCausalLM.from_pretrained(
        source, use_safetensors=True, output_loading_info=True
    )
    student, loading = loaded
    check_loaded(student, loading)
    check_runs(student.train(False))
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    fit_tokenizer(tokenizer, student)
    return student, tokenizer


def load_teacher_of(loaded: LoadedStudent, device: torch.device) -> PreTrainedModel:
    """Load the dense model that a student was converted from; equal backbones are shared.

    Raises:
        UserError: the teacher cannot be had, or it is another model.
    """
    student, settings, named = loaded.student, loaded.config.teacher, loaded.named_teacher
    dense, _ = load_recorded(settings, named, device)
    same = check_teacher(student, dense, settings.path, named, frozen=loaded.of_run)
    if same and student.dtype == dense.dtype:
        adopt_backbone(student, dense, besides=learned_norms(student))
    student.set_attn_implementation(DOCUMENT_ATTENTION)
    return dense


def save_student(folder: Path, prepared: Prepared, world: World = ALONE) -> None:
    """Write the student and its tokenizer in Hugging Face's layout.

    Args:
        folder: the folder.
        prepared: the student and its tokenizer.
        world: the processes, of which the first one writes what all of them may hold a share of.

    Raises:
        UserError: the disk refuses.
    """
    try:
        with full_experts(prepared.student, keep=world.first):
            if world.first:
                prepared.student.save_pretrained(folder)
                prepared.tokenizer.save_pretrained(folder)
                let_others_read(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{folder}: cannot write the student ({reason}), expected free disk and permission; "
            "the last checkpoint is whole: free some space and use --resume"
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A student that a run has kept."""

    path: Path | None
    """The student's checkpoint; None: the finished student."""
    step: int | None
    """The number of updates that trained the student; None if the run does not say."""
    description: str
    """The student in words: its step, and if it is the newest or the best one."""


def choose(folder: Path, which: str) -> Choice:
    """Choose the student of a run: `newest`, `best` (by held-out KL), or the one of a step.

    Raises:
        UserError: the run has not kept that student.
    """
    newer = newer_checkpoint(folder)
    record = _read(folder / "summary.json" if newer is None else newer / "state.json")
    newest = _step(record, "steps" if newer is None else "step")
    best = _step(record.get("best"), "step")
    if which == "newest":
        step = newest
    else:
        checkpoints = {step_of(path): path for path in valid_checkpoints(folder / "checkpoints")}
        asked = str(best) if which == "best" else which
        steps = sorted({*checkpoints} if newest is None else {newest, *checkpoints})
        if asked not in map(str, steps):
            got = f"best, step {best}" if which == "best" else which
            raise UserError(
                f"--checkpoint: got {got}, expected newest, best or a step that the run has kept,"
                f" of {', '.join(map(str, steps))}; leave it out for the newest"
            )
        step = int(asked)
        newer = newer if step == newest else checkpoints[step]
    description = "the finished student" if step is None else f"step {step}"
    description += ", the newest" * (step == newest) + ", the best by held-out KL" * (step == best)
    if best not in (None, step):
        description += f"; the best by held-out KL was step {best}: --checkpoint best"
    return Choice(path=newer, step=step, description=description)


def newer_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run, if it is newer than the run's finished student."""
    found = valid_checkpoints(folder / "checkpoints")
    if not found or not (folder / "config.json").is_file():
        return None
    if not (folder / "student").is_dir():
        return found[0]
    finished = _finished_steps(folder)
    return found[0] if finished is not None and step_of(found[0]) > finished else None


def _finished_steps(folder: Path) -> int | None:
    """Return the step after which the run wrote its student, or None if it does not say."""
    return _step(_read(folder / "summary.json"), "steps")


def _step(record: object, name: str) -> int | None:
    step = record.get(name) if isinstance(record, dict) else None
    return step if isinstance(step, int) else None


def _read(file: Path) -> dict[str, Any]:
    """Return the JSON object in a run's file, or an empty one if it cannot be read."""
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
    """Load the student in a checkpoint of a run, and its tokenizer.

    Args:
        config: the settings of the run.
        folder: the run's folder.
        path: the checkpoint's folder.
        device: the device for the student.
        named_teacher: the value of `--teacher`; None: the option was not given.

    Raises:
        UserError: the checkpoint is damaged, or the teacher cannot be had or is another model.
    """
    dense, tokenizer = load_recorded(config.teacher, named_teacher, device)
    check_run_teacher(folder, dense, named_teacher)
    student = blank_student(config, dense)
    restore_student(path, student)
    student.requires_grad_(False)
    student.set_attn_implementation(generation_attention(dense))
    return student, tokenizer
