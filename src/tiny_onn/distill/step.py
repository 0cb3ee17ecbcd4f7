"""The update of online distillation, top to bottom: teacher, student, loss, backward pass."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tiny_onn.config.schema import RunConfig
from tiny_onn.data.packing import PackedRow
from tiny_onn.distill.clipping import clip_gradients
from tiny_onn.distill.clock import Clock
from tiny_onn.distill.passes import RowValues, row_passes
from tiny_onn.model.full_sharding import is_sharded
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.ops.router_gradient import SurpriseTally
from tiny_onn.parallel import ALONE, World
from tiny_onn.routing.gate_step import GateStep, StepScales
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
    """Every token's loss, one tensor per row of this process; 0 at tokens without a label."""
    finite: bool = True
    """True if loss and gradients are finite; otherwise nothing was updated."""
    tallies: list[SurpriseTally] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


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
    passes: Callable[..., RowValues] | None = None,
    world: World = ALONE,
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
        passes: Runs a row's passes as `row_passes` does, such as a `RowGraphs`; None: `row_passes`.
        world: The processes, of which each gets all rows, runs its share, and makes the update.
    """
    device = student.banks()[0].router.weight.device
    scales = StepScales.of_rows(rows, config, step, device, labelled=True)
    gates = GateStep(student.banks(), config, scales, step, world)
    sums_4, measured = torch.zeros(4, device=device), []
    clock = clock or Clock(device)
    run_passes = passes or partial(row_passes, student, teacher)
    if not student.training:
        student.train()
    with undone_if_broken(gates, optimizer):
        for row in (row.to(device) for row in world.mine(rows)):
            values = run_passes(row, gates, config, num_rows=len(rows), clock=clock)
            sums_4 += values.sums_4
            measured.append(values)
        commit()
    errors = [values.states_error for values in measured if values.states_error is not None]
    # Every process has as many rows, so that the sum of these shares is the mean over all rows.
    mean_errors = [torch.stack(errors).mean() / world.size] if errors else []
    add_up(world, student, gates, [sums_4, *mean_errors], clock)
    loss, forward_kl, agreement, student_entropy = sums_4 / scales.loss_tokens
    with clock.phase("optimizer"):
        result = update(student, optimizer, loss, gates, config)
    return replace(
        result,
        forward_kl=forward_kl,
        agreement=agreement,
        student_entropy=student_entropy,
        states_error=mean_errors[0] if mean_errors else None,
        token_losses=[values.token_losses_T for values in measured],
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


def add_up(
    world: World,
    student: TinyOnnForCausalLM,
    gates: GateStep,
    measured: Sequence[Tensor],
    clock: Clock,
) -> None:
    """Replace gradients, counts and measurements by their sums over all processes, in place."""
    if world.size == 1:
        return
    with clock.phase("all-reduce"):
        # The gradients of weights that are cut are sums already.
        whole = (p for p in student.trainable().values() if not is_sharded(p))
        gradients = [p.grad for p in whole if p.grad is not None]
        world.all_reduce_sum([*gradients, *gates.sums(), *measured])


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
