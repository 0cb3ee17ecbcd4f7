"""The student that is probed."""

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_onn.config.checks import validate
from tiny_onn.config.read import with_router
from tiny_onn.config.schema import RunConfig
from tiny_onn.conversion.pipeline import make_student
from tiny_onn.data.rows import calibration_rows
from tiny_onn.errors import UserError
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.runs.recorded_teacher import refuse_for_dense
from tiny_onn.runs.students import is_student, load_student, load_teacher_of
from tiny_onn.teacher.load import load_model
from tiny_onn.teacher.model_paths import find_model


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model to probe, in float32."""

    student: TinyOnnForCausalLM
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: RunConfig
    fresh: bool
    """True for a dense model converted for the probe with all experts active, so that the student
    equals its teacher."""


def load_subject(  # noqa: PLR0917
    name: str,
    device: torch.device,
    init: str,
    num_experts: int,
    checkpoint: str,
    teacher: str | None,
) -> Subject:
    """Load the model that a user names, in float32 and frozen, with its teacher.

    Raises:
        UserError: there is no such model, or it cannot be converted with these settings.
    """
    if is_student(name):
        loaded = load_student(name, device, checkpoint, teacher)
        if loaded.student.config.routing_rule().selection == "oracle":
            raise UserError(
                f"MODEL: got {name}, a student with router.selection = 'oracle', expected one with"
                " a gate, because surprise is measured through it; probe its teacher instead"
            )
        options = loaded.config.experts
        if options.weighting == "ramp" or options.token_scale:
            raise UserError(
                f"MODEL: got {name}, a student with experts.weighting = 'ramp' or"
                " experts.token_scale = true, expected one without, because the weight that an"
                " inactive expert would have there is not defined; probe its teacher instead"
            )
        # Differences of losses are smaller than the rounding of bfloat16.
        in_float32 = replace(loaded.config.teacher, dtype="float32")
        loaded = replace(loaded, config=replace(loaded.config, teacher=in_float32))
        loaded.student.float()
        dense = load_teacher_of(loaded, device)
        return Subject(
            student=loaded.student,
            teacher=dense,
            tokenizer=loaded.tokenizer,
            config=loaded.config,
            fresh=False,
        )
    if checkpoint != "newest":
        raise UserError(
            f"--checkpoint: got {name}, a dense model, expected a run; leave --checkpoint out"
        )
    refuse_for_dense(name, teacher)
    if name != "embedded":
        find_model(name, "MODEL")
    config = RunConfig()
    config = replace(
        config,
        teacher=replace(config.teacher, path=name, dtype="float32"),
        experts=replace(
            config.experts,
            init=init,
            num_experts=num_experts,
            gate_init="zeros",
            weighting="unit",
        ),
        train=replace(config.train, device=str(device), compile=False),
    )
    config = with_router(config, selection="top_k", objective="none", target_k=float(num_experts))
    validate(config)
    dense, tokenizer = load_model(config.teacher, device)
    student = make_student(config, MlpInputs(dense, calibration_rows(config, tokenizer, device)))
    student.requires_grad_(False)
    return Subject(student=student, teacher=dense, tokenizer=tokenizer, config=config, fresh=True)
