"""The update of online distillation, top to bottom: teacher, student, loss, backward pass."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from transformers import PreTrainedModel

from tiny_onn.config.schema import RunConfig
from tiny_onn.data.packing import PackedRow
from tiny_onn.distill.hidden_states import unexplained_variance
from tiny_onn.distill.optim import clip_gradients
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import head_of, last_hidden_states
from tiny_onn.model.experts import recorded_routings
from tiny_onn.model.hooks import layer_outputs
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.ops.distillation_loss import DistillValues, distill
from tiny_onn.ops.loss_chunks import loss_chunk_tokens
from tiny_onn.ops.router_gradient import SurpriseTally
from tiny_onn.routing.gate_step import GateStep
from tiny_onn.routing.statistics import RoutingStats


@dataclass(kw_only=True, slots=True)
class StepResult:
    """The measurements of one step: device tensors, which are read when a record is written."""

    loss: Tensor
    """The distillation loss; in the blockwise stage the mean of `error_L`."""
    forward_kl: Tensor | None = None
    """KL(teacher || student); None in the blockwise stage, as the next two are."""
    agreement: Tensor | None = None
    student_entropy: Tensor | None = None
    states_error: Tensor | None = None
    """Mean over layers of `unexplained_variance`; None if hidden states are not matched."""
    error_L: Tensor | None = None
    """Each layer's normalised error in the blockwise stage; None in the global one."""
    expert_grad_norm: Tensor | float
    gate_grad_norm: Tensor | float
    stats: RoutingStats
    token_losses: list[Tensor] = field(default_factory=list)
    """Every token's loss, one tensor per row; 0 at tokens without a label."""
    finite: bool = True
    """True if loss and gradients are finite; otherwise nothing was updated."""
    tallies: list[SurpriseTally] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class Clock:
    """The wall time of a step's phases, which are also named ranges in a profiler's trace.

    On a GPU, phases are timed only with `wait=True`, which synchronises after each.
    """

    def __init__(self, device: torch.device, *, wait: bool = False) -> None:
        self._cuda, self._wait = device.type == "cuda", wait
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the phase."""
        start = time.perf_counter()
        with record_function(name):
            yield
            if self._cuda and self._wait:
                torch.cuda.synchronize()
        if self._wait or not self._cuda:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def distill_step(
    student: TinyOnnForCausalLM,
    teacher: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[PackedRow],
    config: RunConfig,
    *,
    step: int = 0,
    clock: Clock | None = None,
    commit: Callable[[], None] = lambda: None,
) -> StepResult:
    """Update the student once, by the mean loss over all tokens with a label in some rows.

    If loss or gradient is not finite, nothing is updated; to find out, the step waits for a GPU
    once. An exception before the update leaves everything as it was before the step.

    One backward pass per row teaches both systems: the experts by the distillation loss, the gates
    by SMK (`objective = smk`), by their experts' norms (`regression`), by the distillation loss
    (`task`), or not at all.

    Args:
        student: A converted model; its experts and gates learn.
        teacher: The dense model.
        optimizer: The optimizer of the student's experts and gates.
        rows: Packed text; the rows' gradients are summed.
        config: The settings.
        step: Number of steps before this one, on which exploration and re-seeding depend.
        clock: Adds up the phases' times; None: a clock that does not wait for a GPU.
        commit: Called right before the update, after which the step can no longer be undone.
    """
    banks = student.banks()
    device = banks[0].router.weight.device
    loss_tokens = max(1, sum(int(row.loss_mask.sum()) for row in rows))
    gates = GateStep(banks, config, rows, step, loss_tokens=loss_tokens)
    sums, token_losses, state_errors = torch.zeros(4, device=device), [], []
    clock = clock or Clock(device)
    loss_options, match_states = _loss_options(student, config), config.loss.states_coef > 0
    heads = (head_of(student), head_of(teacher))
    student.train()
    with undone_if_broken(gates, optimizer):
        for row in (row.to(device) for row in rows):
            kwargs = packed_kwargs(row)
            outputs = layer_outputs(teacher, match_states)
            with clock.phase("teacher forward"), torch.no_grad(), outputs as teacher_states:
                teacher_hidden_TD = last_hidden_states(teacher, row.input_ids, **kwargs)[0]
            with gates.row(row):
                outputs, recorded = layer_outputs(student, match_states), recorded_routings(banks)
                with clock.phase("student forward"), outputs as states, recorded as routings:
                    student_hidden_TD = last_hidden_states(student, row.input_ids, **kwargs)[0]
                gates.observe(routings, row)
                with clock.phase("loss"):
                    hidden = (student_hidden_TD, teacher_hidden_TD)
                    values = distill(*hidden, *heads, row.labels[0], **loss_options)
                    loss_T = values.loss * row.loss_mask[0]
                    token_losses.append(loss_T.detach())
                    sums += _sums(values, row.loss_mask[0])
                with clock.phase("backward"):
                    extra_loss = gates.loss(routings, row)
                    if match_states:
                        error_L = unexplained_variance(states, teacher_states, row.router_mask[0])
                        state_errors.append((error := error_L.mean()).detach())
                        extra_loss = extra_loss + config.loss.states_coef * error
                    (loss_T.sum() / loss_tokens + extra_loss / len(rows)).backward()
            # Otherwise every layer's (T, E) tables stay in memory during the next teacher pass.
            del routings
        commit()
    loss, forward_kl, agreement, student_entropy = sums / loss_tokens
    with clock.phase("optimizer"):
        result = update(student, optimizer, loss, gates, config)
    return replace(
        result,
        forward_kl=forward_kl,
        agreement=agreement,
        student_entropy=student_entropy,
        states_error=torch.stack(state_errors).mean() if match_states else None,
        token_losses=token_losses,
        seconds=clock.seconds,
    )


@contextmanager
def undone_if_broken(gates: GateStep, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Discard gradients and statistics if an exception ends the passes of a step in the context."""
    completed = False
    try:
        yield
        completed = True
    finally:
        if not completed:
            gates.finish(updated=False)
            optimizer.zero_grad(set_to_none=True)


def _sums(values: DistillValues, mask_T: Tensor) -> Tensor:
    """Return the sums over labelled tokens of loss, KL, agreement and the student's entropy."""
    loss_T = values.loss.detach()
    measured = (loss_T, values.forward_kl, values.agrees, values.student_entropy)
    return torch.stack([(value_T * mask_T).sum() for value_T in measured])


def _all_finite(*values: Tensor | float) -> bool:
    """Return True if all values are finite; a GPU is read once."""
    device = next(value.device for value in values if isinstance(value, Tensor))
    numbers = torch.stack([torch.as_tensor(value, device=device).float() for value in values])
    return all(math.isfinite(number) for number in numbers.tolist())


def update(
    student: TinyOnnForCausalLM,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    gates: GateStep,
    config: RunConfig,
) -> StepResult:
    """Clip the gradients, and if all is finite update experts, gates and routers.

    Returns:
        The measurements that both stages have.
    """
    expert_norm, gate_norm = clip_gradients(student, config.optim.clip_norm, optimizer)
    finite = _all_finite(loss, expert_norm, gate_norm)
    if finite:
        optimizer.step()
    gates.finish(updated=finite)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=loss,
        expert_grad_norm=expert_norm,
        gate_grad_norm=gate_norm,
        stats=gates.stats,
        finite=finite,
        tallies=gates.tallies,
    )


def _loss_options(student: TinyOnnForCausalLM, config: RunConfig) -> dict[str, Any]:
    """Return the arguments of `distill` that do not change within a step."""
    return {
        "divergence": config.loss.divergence,
        "temperature": config.loss.temperature,
        "jsd_beta": config.loss.jsd_beta,
        "chunk_tokens": loss_chunk_tokens(config.loss, head_of(student).weight),
        # On a CPU the tiles of the uncompiled loss fit its cache.
        "compiled": config.train.compile and student.device.type == "cuda",
    }
