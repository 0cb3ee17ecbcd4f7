"""The passes of one row: teacher, student, loss and backward pass, with all that is summed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tiny_onn.config.schema import RunConfig
from tiny_onn.data.packing import PackedRow
from tiny_onn.distill.clock import Clock
from tiny_onn.distill.hidden_states import unexplained_variance
from tiny_onn.model.attention import training_kwargs
from tiny_onn.model.backbone import head_of, last_hidden_states
from tiny_onn.model.experts import recorded_routings
from tiny_onn.model.hooks import layer_outputs
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.ops.distillation_loss import DistillValues, distill
from tiny_onn.ops.loss_chunks import loss_chunk_tokens
from tiny_onn.routing.gate_step import GateStep
from tiny_onn.teacher.cache import decoded


@dataclass(frozen=True, kw_only=True, slots=True)
class RowValues:
    """The measurements of one row, on its device."""

    sums_4: Tensor
    """Sums over labelled tokens of loss, KL, agreement and the student's entropy."""
    token_losses_T: Tensor
    """Every token's loss, 0 where there is no label."""
    states_error: Tensor | None
    """Mean over layers of `unexplained_variance`; None if hidden states are not matched."""


def row_passes(
    student: TinyOnnForCausalLM,
    teacher: PreTrainedModel,
    row: PackedRow,
    gates: GateStep,
    config: RunConfig,
    *,
    num_rows: int = 1,
    clock: Clock | None = None,
) -> RowValues:
    """Add a row's gradients to the parameters and its routing to `gates`.

    Args:
        student: A converted model in training mode.
        teacher: The dense model.
        row: Packed text on the models' device, with the teacher's hidden states if a cache has
            them.
        gates: The gates' side of the update.
        config: The settings.
        num_rows: Number of rows of the update, over which losses that are no sums over tokens are
            averaged.
        clock: Adds up the phases' times; None: a clock that does not wait for a GPU.
    """
    banks, heads = student.banks(), (head_of(student), head_of(teacher))
    kwargs = training_kwargs(student, row, config.train)
    match_states, clock = config.loss.states_coef > 0, clock or Clock(row.input_ids.device)
    states_error = None
    outputs = layer_outputs(teacher, match_states)
    with clock.phase("teacher forward"), torch.no_grad(), outputs as teacher_states:
        if row.teacher_states is None:
            teacher_hidden_TD = last_hidden_states(teacher, row.input_ids, **kwargs)[0]
        else:
            stored = (row.teacher_states, row.teacher_scales)
            teacher_hidden_TD = decoded(*stored, teacher.dtype)
    with gates.row(row):
        outputs, recorded = layer_outputs(student, match_states), recorded_routings(banks)
        with clock.phase("student forward"), outputs as states, recorded as routings:
            student_hidden_TD = last_hidden_states(student, row.input_ids, **kwargs)[0]
        # A decoder that hands its arguments on to no attention would mix documents unseen.
        blocks = kwargs.get("document_blocks")
        assert blocks is None or blocks.was_used
        gates.observe(routings, row)
        with clock.phase("loss"):
            hidden = (student_hidden_TD, teacher_hidden_TD)
            values = distill(*hidden, *heads, row.labels[0], **_loss_options(student, config))
            loss_T = values.loss * row.loss_mask[0]
            sums_4 = _sums(values, row.loss_mask[0])
        with clock.phase("backward"):
            extra_loss = gates.loss(routings, row)
            if match_states:
                shares_L = unexplained_variance(
                    states,
                    teacher_states,
                    row.router_mask[0],
                    by_feature=config.loss.states_scale == "feature",
                    compiled=_compiles(student, config),
                )
                # The backward pass frees a layer's states once it has their gradient.
                states.clear()
                teacher_states.clear()
                error = shares_L.mean()
                states_error = error.detach()
                extra_loss = extra_loss + config.loss.states_coef * error
            (loss_T.sum() / gates.scales.loss_tokens + extra_loss / num_rows).backward()
    return RowValues(sums_4=sums_4, token_losses_T=loss_T.detach(), states_error=states_error)


def _sums(values: DistillValues, mask_T: Tensor) -> Tensor:
    """Return the sums over labelled tokens of loss, KL, agreement and the student's entropy."""
    loss_T = values.loss.detach()
    measured = (loss_T, values.forward_kl, values.agrees, values.student_entropy)
    return torch.stack([(value_T * mask_T).sum() for value_T in measured])


def _loss_options(student: TinyOnnForCausalLM, config: RunConfig) -> dict[str, Any]:
    """Return the arguments of `distill` that do not change within a step."""
    return {
        "divergence": config.loss.divergence,
        "temperature": config.loss.temperature,
        "jsd_beta": config.loss.jsd_beta,
        "label_coef": config.loss.label_coef,
        "chunk_tokens": loss_chunk_tokens(config.loss, head_of(student).weight),
        "compiled": _compiles(student, config),
    }


def _compiles(student: TinyOnnForCausalLM, config: RunConfig) -> bool:
    """Return True if losses are compiled; on a CPU their uncompiled tiles fit its cache."""
    return config.train.compile and student.device.type == "cuda"
