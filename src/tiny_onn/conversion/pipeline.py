"""The pipeline that makes a student, its teacher and its text from the settings of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_onn.config.routing_checks import has_budget
from tiny_onn.config.schema import RunConfig
from tiny_onn.console import status
from tiny_onn.conversion.convert import convert, share_backbone, student_config
from tiny_onn.conversion.gates import fit_gates
from tiny_onn.conversion.massive_activations import massive_activations, massive_neurons
from tiny_onn.conversion.mean_outputs import fit_compensation
from tiny_onn.conversion.partition import (
    importance_order,
    neuron_importance,
    partition_neurons,
    put_first,
)
from tiny_onn.conversion.refit import refit
from tiny_onn.conversion.verify import Conversion, check_conversion, searched_tokens
from tiny_onn.data.packing import PackedRow
from tiny_onn.data.rows import calibration_rows, eval_row_tokens, held_out_rows
from tiny_onn.data.stream import check_vocabulary
from tiny_onn.device import pick_device
from tiny_onn.model.backbone import gated_mlps
from tiny_onn.model.expert_path import set_objective
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.norms import own_norms
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.routing.budgets import fit_start_thresholds
from tiny_onn.teacher.cache_reader import check_cache
from tiny_onn.teacher.held_out import HeldOut
from tiny_onn.teacher.load import load_dense, teacher_for

FindOrder = Callable[[RunConfig, MlpInputs], Sequence[Tensor] | None]
MakeStudent = Callable[[RunConfig, MlpInputs, Sequence[Tensor] | None], TinyOnnForCausalLM]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """The models, the text and the conversion that a run starts from."""

    teacher: PreTrainedModel
    student: TinyOnnForCausalLM
    tokenizer: PreTrainedTokenizerBase
    conversion: Conversion | None
    """The checks of the conversion; None: a checkpoint's tensors are to fill the student."""
    held_out: HeldOut
    """The rows that the student is evaluated on, with the teacher."""


def prepare(
    config: RunConfig, find_order: FindOrder | None = None, *, make: MakeStudent | None = None
) -> Prepared:
    """Load the teacher, convert it, and calibrate the student on the first training rows.

    Args:
        config: the settings.
        find_order: finds the order of neurons in the place of `partition`, such as from a file.
        make: converts the teacher in the place of `make_student`, whose arguments it takes.

    Raises:
        UserError: something is wrong with the teacher, its cache, the text or the sizes.
    """
    inputs, tokenizer, held_out = read_inputs(config, pick_device(config.train.device))
    check_cache(config, inputs.dense, tokenizer)
    with status("Converting"):
        order = None if find_order is None else find_order(config, inputs)
        student = (make or make_student)(config, inputs, order)
    with status("Checking the conversion"):
        conversion = check_conversion(config, student, inputs)
    refit_if_asked(config, student, inputs)
    teacher = teacher_for(inputs.dense, config.teacher)
    return Prepared(
        teacher=teacher,
        student=student,
        tokenizer=tokenizer,
        conversion=conversion,
        held_out=HeldOut(teacher, held_out),
    )


def prepare_to_resume(config: RunConfig) -> Prepared:
    """Load the teacher, and build a student without values, which a checkpoint's tensors fill.

    Args:
        config: the settings.

    Raises:
        UserError: something is wrong with the teacher, its cache, the text or the sizes.
    """
    dense, tokenizer = _load_teacher(config, pick_device(config.train.device))
    held_out = _held_out_rows(config, tokenizer)
    check_cache(config, dense, tokenizer)
    dense.requires_grad_(False)
    student = blank_student(config, dense)
    set_objective(student.banks(), config)
    teacher = teacher_for(dense, config.teacher)
    return Prepared(
        teacher=teacher,
        student=student,
        tokenizer=tokenizer,
        conversion=None,
        held_out=HeldOut(teacher, held_out),
    )


def blank_student(config: RunConfig, dense: PreTrainedModel) -> TinyOnnForCausalLM:
    """Return a student of a dense model whose experts and gates have no values yet.

    Raises:
        UserError: the sizes do not fit, or the norms are to learn and have no gains.
    """
    student = share_backbone(dense, student_config(dense, config.experts, config.router))
    student.config.teacher = config.teacher.path
    student.config.teacher_revision = config.teacher.revision
    if config.optim.norm_lr:
        own_norms(student)
    return student


def _load_teacher(
    config: RunConfig, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with status(f"Loading the teacher, {config.teacher.path}"):
        dense, tokenizer = load_dense(config.teacher, device)
        check_vocabulary(tokenizer, dense.config.get_text_config().vocab_size)
    return dense, tokenizer


def _held_out_rows(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[PackedRow]:
    data = config.data
    return held_out_rows(data, tokenizer, eval_row_tokens(data), data.eval_tokens)


def read_inputs(
    config: RunConfig, device: torch.device
) -> tuple[MlpInputs, PreTrainedTokenizerBase, list[PackedRow]]:
    """Return the dense MLPs' inputs on calibration text, the tokenizer, and the held-out rows.

    If the conversion reads no text, the inputs are those on the first held-out row, for its checks.

    Raises:
        UserError: something is wrong with the teacher or the text.
    """
    dense, tokenizer = _load_teacher(config, device)
    with status("Reading calibration text"):
        rows = calibration_rows(config, tokenizer, device)
        # A lack of held-out text shall show before the conversion's work.
        held_out = _held_out_rows(config, tokenizer)
    return MlpInputs(dense, rows or [held_out[0].to(device)]), tokenizer, held_out


def partition(config: RunConfig, inputs: MlpInputs) -> list[Int[Tensor, " neurons"]] | None:
    """Return per layer the order in which neurons fill the experts; None keeps their own order.

    Raises:
        UserError: the architecture or the sizes do not fit.
    """
    experts = config.experts
    shape = student_config(inputs.dense, experts, config.router)
    first_neurons: Sequence[Sequence[int]] = ()
    if experts.keep_massive:
        massive = massive_activations(searched_tokens(config, inputs))
        num_neurons = experts.num_shared * shape.moe_intermediate_size
        first_neurons = massive_neurons(massive, len(gated_mlps(inputs.dense)), num_neurons)
    if experts.init == "importance":
        orders = importance_order(neuron_importance(inputs))
        if not first_neurons:
            return orders
        return [put_first(*pair) for pair in zip(orders, first_neurons, strict=True)]
    generator = torch.Generator().manual_seed(config.train.seed)
    return partition_neurons(
        inputs, experts, config.router.target_k, generator, first_neurons=first_neurons
    )


def make_student(
    config: RunConfig,
    inputs: MlpInputs,
    order: Sequence[Int[Tensor, " neurons"]] | None = None,
) -> TinyOnnForCausalLM:
    """Convert the dense model and set experts, gates and budgets as the settings say.

    Args:
        config: the settings.
        inputs: the MLP inputs of the model to cut on calibration text.
        order: the order that `partition` returns for the same settings and rows; None computes it.
    """
    order = partition(config, inputs) if order is None else order
    student = convert(
        inputs.dense,
        config.experts,
        config.router,
        generator=torch.Generator().manual_seed(config.train.seed),
        neuron_order=order,
    )
    student.config.teacher = config.teacher.path
    student.config.teacher_revision = config.teacher.revision
    banks = student.banks()
    selection = config.router.selection
    linear = selection in ("top_k", "budget")
    if selection == "static" or (config.experts.gate_init == "ridge" and linear):
        fit_gates(inputs, banks, static=selection == "static")
    if has_budget(config.router):
        fit_start_thresholds(inputs, banks, config.router.budget_scope)
    if config.experts.compensation == "mean":
        fit_compensation(inputs, banks)
    set_objective(banks, config)
    return student


def refit_if_asked(config: RunConfig, student: TinyOnnForCausalLM, inputs: MlpInputs) -> None:
    """Refit the student if the settings say so, after the checks of its conversion.

    A refitted student no longer equals its teacher with all experts on.

    Args:
        config: the settings.
        student: the converted student.
        inputs: the MLP inputs that it was converted with.

    Raises:
        UserError: the family's layers cannot be run one by one.
    """
    if config.experts.refit:
        refit(student, inputs.dense, inputs.rows)
