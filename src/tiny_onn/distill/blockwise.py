"""The blockwise stage: every layer's experts and gate learn their teacher MLP, all in one pass.

Each layer regresses the teacher's MLP output on the teacher's MLP input:

    error_l = mean over tokens of |bank_l(x) - mlp_l(x)|^2 / power_l,    power_l = mean |mlp_l(x)|^2

First tokens of documents and padding are left out. The power is a constant of the layer, measured
on the first training rows, so that the loss does not depend on how tokens fall into rows and steps.
The layers share nothing: each has the gradients that it would have if it were trained alone.
Surprise is the gradient of the layer's own error, in units of one token's error.

Cost: one teacher forward pass to the last MLP and, per layer, a bank's forward and backward pass
without the gradient of its input. There are no logits and no backward pass through attention. The
backward pass of a layer runs inside the teacher's forward pass, right after the layer's forward
pass, and frees its memory, so that the memory in use is one layer's at any depth. Only a budget
that all layers share needs their (T, E) scores until the row ends.

Legend: T tokens, D hidden, L layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from tiny_onn.config.schema import RunConfig
from tiny_onn.console import track
from tiny_onn.data.packing import PackedRow, uncounted
from tiny_onn.distill.clock import Clock
from tiny_onn.distill.step import StepResult, add_up, undone_if_broken, update
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import decoder_layers, last_hidden_states
from tiny_onn.model.experts import recorded_routings
from tiny_onn.model.hooks import mlp_calls
from tiny_onn.model.student import TinyOnnForCausalLM, eval_mode
from tiny_onn.parallel import ALONE, World
from tiny_onn.routing.gate_step import GateStep, StepScales


@dataclass(kw_only=True, slots=True)
class BlockErrors:
    """The stage's unit of errors and its held-out errors, one number per layer each."""

    power: list[float]
    """The unit of training errors, from `teacher_power`."""
    error_before: list[float]
    """`block_errors` on held-out text before the stage."""
    error_after: list[float] | None = None
    """`block_errors` on held-out text after the stage; None while it is not over."""


def squared_error(
    y_TD: Float[Tensor, "tokens hidden"], y_teacher_TD: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, " tokens"]:
    """Return `|y - y_teacher|^2` of each token, in float32."""
    return (y_TD.float() - y_teacher_TD.float()).square().sum(-1)


@torch.no_grad()
def teacher_power(teacher: PreTrainedModel, rows: Sequence[PackedRow]) -> list[float]:
    """Return each layer's mean of `|mlp(x)|^2` over counted tokens, the unit of training errors."""
    sums_L = torch.zeros(len(decoder_layers(teacher)), device=teacher.device, dtype=torch.float64)
    num_tokens = max(1, sum(int(row.router_mask.sum()) for row in rows))

    def add_power(layer: int, _: Tensor, y_TD: Tensor) -> None:
        sums_L[layer] += (y_TD.float().square().sum(-1) * mask_T).double().sum()

    with mlp_calls(teacher, add_power):
        for row in (row.to(teacher.device) for row in track(rows, "reading the teacher, rows")):
            mask_T = row.router_mask[0]
            last_hidden_states(teacher, row.input_ids, **packed_kwargs(row))
    return (sums_L / num_tokens).tolist()


@torch.no_grad()
def block_errors(
    student: TinyOnnForCausalLM,
    teacher: PreTrainedModel,
    rows: Sequence[PackedRow],
    world: World = ALONE,
) -> list[float]:
    """Return each layer's `sum |bank(x) - mlp(x)|^2 / sum |mlp(x)|^2` over the counted tokens.

    x is the teacher's MLP input. At 0 the layer equals its teacher; at 1 it is no better than an
    output of zeros. Each of the processes measures its share of the rows.
    """
    banks = student.banks()
    sums_2L = torch.zeros(2, len(banks), device=teacher.device, dtype=torch.float64)

    def add_errors(layer: int, x_TD: Tensor, y_TD: Tensor) -> None:
        error_T, power_T = squared_error(banks[layer](x_TD), y_TD), y_TD.float().square().sum(-1)
        sums_2L[:, layer] += (torch.stack((error_T, power_T)) * mask_T).double().sum(-1)

    mine = list(world.mine(rows))
    if world.lacks_one(len(rows)):
        # Processes whose models are cut make forward passes together.
        mine.append(uncounted(rows[-1]))
    with eval_mode(student), mlp_calls(teacher, add_errors):
        for row in (row.to(teacher.device) for row in track(mine, "block errors, rows")):
            mask_T = row.router_mask[0]
            last_hidden_states(teacher, row.input_ids, **packed_kwargs(row))
    world.all_reduce_sum([sums_2L])
    return (sums_2L[0] / sums_2L[1]).tolist()


def blockwise_step(
    student: TinyOnnForCausalLM,
    teacher: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[PackedRow],
    config: RunConfig,
    *,
    power: Sequence[float],
    step: int = 0,
    clock: Clock | None = None,
    commit: Callable[[], None] = lambda: None,
    world: World = ALONE,
) -> StepResult:
    """Update every layer once from some rows, or none if a loss or gradient is not finite.

    Gates learn as in `distill_step`, with the layer's own error as the main loss.

    Args:
        student: A converted model; its banks learn, and its backbone is not run.
        teacher: The dense model whose MLPs the banks replace.
        optimizer: The optimizer of the student's experts and gates.
        rows: Packed text; the rows' gradients are summed.
        config: The settings.
        power: Each layer's unit of errors, from `teacher_power` for this teacher.
        step: Number of steps before this one, on which exploration and re-seeding depend.
        clock: Adds up the phases' times; None: a clock that does not wait for a GPU.
        commit: Called right before the update, after which the step can no longer be undone.
        world: The processes, of which each gets all rows, runs its share, and makes the update.
    """
    banks = student.banks()
    device = banks[0].router.weight.device
    scales = StepScales.of_rows(rows, config, step, device, labelled=False)
    gates = GateStep(banks, config, scales, step, world)
    layers = _Layers(gates, power, len(rows))
    clock = clock or Clock(device)
    student.train()
    with undone_if_broken(gates, optimizer), clock.phase("blocks"), torch.no_grad():
        for row in (row.to(device) for row in world.mine(rows)):
            with gates.row(row), mlp_calls(teacher, layers.row_learner(row)):
                last_hidden_states(teacher, row.input_ids, **packed_kwargs(row))
        commit()
    add_up(world, student, gates, [layers.error_L], clock)
    loss = layers.error_L.mean()
    with clock.phase("optimizer"):
        result = update(student, optimizer, loss, gates, config)
    return replace(
        result,
        error_L=layers.error_L,
        token_losses=layers.token_losses,
        seconds=clock.seconds,
    )


class _Layers:
    """The passes of one step over its layers, and their sums on the device."""

    def __init__(self, gates: GateStep, power: Sequence[float], num_rows: int) -> None:
        self.gates, self.power, self.num_rows = gates, power, num_rows
        self.error_L = torch.zeros(len(gates.banks), device=gates.banks[0].router.weight.device)
        self.token_losses: list[Tensor] = []

    def row_learner(self, row: PackedRow) -> Callable[[int, Tensor, Tensor], None]:
        """Return the function to call with each layer's MLP input and output on this row."""
        self.token_losses.append(torch.zeros_like(row.router_mask[0], dtype=torch.float32))
        return partial(self.learn, row)

    def learn(self, row: PackedRow, layer: int, x_TD: Tensor, y_teacher_TD: Tensor) -> None:
        """Run the forward and backward pass of one layer, of which gradients and sums remain."""
        gates, bank, mask_T = self.gates, self.gates.banks[layer], row.router_mask[0]
        with torch.enable_grad():
            with recorded_routings([bank]) as routings:
                y_TD = bank(x_TD)
            errors_T = squared_error(y_TD, y_teacher_TD) * (mask_T / self.power[layer])
            loss = errors_T.sum() / gates.scales.router_tokens
            total = loss + gates.loss(routings, row, layer) / self.num_rows
        self.error_L[layer] += loss.detach()
        # A token's loss is the mean of the layers' errors, as the step's loss is.
        self.token_losses[-1] += errors_T.detach() / len(gates.banks)
        gates.observe(routings, row, layer)
        total.backward()
