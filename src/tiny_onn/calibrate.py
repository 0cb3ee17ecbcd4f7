"""What a few thousand tokens of text say about a dense MLP: neuron importance and a first gate.

Both passes run the teacher once over the calibration rows and keep only sums: memory does not grow
with the text. The first token of each document is left out (the attention sink: activations
thousands of times larger would decide everything).

Legend: T tokens, D hidden, E experts, I expert width, F = E * I neurons.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from tiny_onn.attention import packed_kwargs
from tiny_onn.config import BudgetScope
from tiny_onn.experts import MIN_NORM, ExpertBank, expert_norms
from tiny_onn.modeling import activation_name, gated_mlps, last_hidden_states
from tiny_onn.packing import PackedRow
from tiny_onn.shared import routed
from tiny_onn.thresholds import aims, exact_thresholds, steer

RIDGE = 1e-3


@contextmanager
def mlp_inputs(dense: PreTrainedModel, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Within the context, `see(layer, x)` gets each MLP's input in the dense model's passes."""

    def hook(index: int, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        see(index, inputs[0].flatten(0, -2))

    with ExitStack() as hooks:
        for index, mlp in enumerate(gated_mlps(dense)):
            hooks.enter_context(mlp.module.register_forward_pre_hook(partial(hook, index)))
        yield


@torch.no_grad()
def neuron_importance(
    dense: PreTrainedModel, rows: Sequence[PackedRow]
) -> list[Float[Tensor, " neurons"]]:
    """Per layer, each neuron's squared contribution to the output, `sum_t h^2 * |down|^2`."""
    mlps = gated_mlps(dense)
    activation = ACT2FN[activation_name(dense.config.get_text_config())]
    sums = [torch.zeros(1, device=dense.device) for _ in mlps]

    def see(index: int, x_TD: Tensor) -> None:
        hidden_TF = activation(mlps[index].gate_proj(x_TD)) * mlps[index].up_proj(x_TD)
        sums[index] = sums[index] + hidden_TF[mask_T].float().square().sum(0)

    with mlp_inputs(dense, see):
        for row in rows:
            mask_T = row.router_mask.flatten()
            last_hidden_states(dense, row.input_ids, **packed_kwargs(row))
    return [
        total * mlp.down_proj.weight.float().square().sum(0)
        for total, mlp in zip(sums, mlps, strict=True)
    ]


@torch.no_grad()
def sample_inputs(
    dense: PreTrainedModel, rows: Sequence[PackedRow], max_tokens: int
) -> list[Float[Tensor, "tokens hidden"]]:
    """Per layer, the MLP's inputs at about `max_tokens` counted tokens, evenly spaced.

    Memory: `L * max_tokens * D` numbers in the model's own format, whatever the text's length.
    """
    stride = max(1, -(-sum(int(row.router_mask.sum()) for row in rows) // max_tokens))
    kept: list[list[Tensor]] = [[] for _ in gated_mlps(dense)]

    def see(index: int, x_TD: Tensor) -> None:
        kept[index].append(x_TD[mask_T][start::stride])

    start = 0
    with mlp_inputs(dense, see):
        for row in rows:
            mask_T = row.router_mask.flatten()
            last_hidden_states(dense, row.input_ids, **packed_kwargs(row))
            start = (start - int(mask_T.sum())) % stride
    return [torch.cat(layer) for layer in kept]


class Ridge:
    """Ridge regressions on the same inputs; the bias is free.

    The inputs' second moments are factored once, whatever is regressed on them, and how often.
    Products over tokens are float32, whose rounding is far below the penalty, and the equations
    are solved in float64.
    """

    def __init__(self, x_TD: Float[Tensor, "tokens hidden"]) -> None:
        self._features_TD = F.pad(x_TD.float(), (0, 1), value=1.0)
        gram_DD = _penalised((self._features_TD.T @ self._features_TD).double())
        self._factors = torch.linalg.lu_factor(gram_DD)

    def fit(
        self, target_TE: Float[Tensor, "tokens experts"]
    ) -> tuple[Float[Tensor, "hidden experts"], Float[Tensor, " experts"]]:
        """Weight and bias of the regression of these targets, float64."""
        # A free bias takes up the mean exactly, and without it the rounding of products is less.
        mean_E = target_TE.double().mean(0)
        moment_DE = self._features_TD.T @ (target_TE - mean_E).float()
        solution_DE = torch.linalg.lu_solve(*self._factors, moment_DE.double())
        return solution_DE[:-1], solution_DE[-1] + mean_E


def solve_ridge(gram_DD: Tensor, moment_DE: Tensor) -> Tensor:
    """The ridge solution; the last feature is the constant 1, which goes unpenalised."""
    return torch.linalg.solve(_penalised(gram_DD), moment_DE)


def _penalised(gram_DD: Tensor) -> Tensor:
    D = len(gram_DD) - 1
    penalty = RIDGE * gram_DD.diagonal()[:D].mean() * torch.eye(D + 1, device=gram_DD.device)
    penalty[D, D] = 0
    return gram_DD + penalty


def importance_order(
    importance: Sequence[Float[Tensor, " neurons"]],
) -> list[Int[Tensor, " neurons"]]:
    """Per layer, neurons by falling importance, so that experts differ in it as they can."""
    return [scores.argsort(descending=True, stable=True) for scores in importance]


@torch.no_grad()
def fit_gates(
    dense: PreTrainedModel,
    banks: Sequence[ExpertBank],
    rows: Sequence[PackedRow],
    *,
    static: bool = False,
) -> list[float]:
    """Set each router to the ridge regression of `log |expert_e(x)|` on x.

    Softmax probabilities then stand for the experts' shares of the output's total norm, and the
    cumulative budget keeps the experts that carry a given share of it.

    Args:
        dense: the model whose MLP inputs are regressed on.
        banks: its layers' experts and routers.
        rows: calibration text.
        static: fit the bias alone, the mean of the target: the best choice that sees no token. It
            is not the bias of the whole fit, which is the prediction at x = 0.

    Returns:
        Per layer, the share of the targets' variance (within routed experts) that the gate
        explains.
    """
    D = banks[0].gate_up_proj.shape[-1]
    E = banks[0].down_proj.shape[0]
    zeros = partial(torch.zeros, device=dense.device, dtype=torch.float64)
    grams = [zeros(D + 1, D + 1) for _ in banks]
    moments = [zeros(D + 1, E) for _ in banks]
    squares = [zeros(E) for _ in banks]

    def see(index: int, x_TD: Tensor) -> None:
        targets_TE = expert_norms(banks[index], x_TD[mask_T]).clamp_min(MIN_NORM).log()
        features_TD = F.pad(x_TD[mask_T].float(), (0, 1), value=1.0)
        grams[index] += features_TD.T @ features_TD
        moments[index] += features_TD.T @ targets_TE
        squares[index] += targets_TE.double().square().sum(0)

    with mlp_inputs(dense, see):
        for row in rows:
            mask_T = row.router_mask.flatten()
            last_hidden_states(dense, row.input_ids, **packed_kwargs(row))
    explained = []
    for bank, gram, moment, square in zip(banks, grams, moments, squares, strict=True):
        if static:
            solution = F.pad(moment[D:] / gram[D, D], (0, 0, D, 0))
        else:
            solution = solve_ridge(gram, moment)
        bank.router.weight.copy_(solution[:D].T)
        bank.router.bias.copy_(solution[D])
        residual = square - 2 * (solution * moment).sum(0) + (solution * (gram @ solution)).sum(0)
        variance = square - moment[D].square() / gram[D, D]
        sums = [routed(of_E, bank.router.rule.num_shared).sum() for of_E in (residual, variance)]
        explained.append(1 - (sums[0] / sums[1]).item())
    return explained


@torch.no_grad()
def settle_budgets(
    dense: PreTrainedModel,
    banks: Sequence[ExpertBank],
    rows: Sequence[PackedRow],
    scope: BudgetScope = "layer",
) -> None:
    """Set each budget's threshold to the mean of those that meet its target on each row."""
    if not banks[0].router.rule.has_budget:
        return
    routers = [bank.router for bank in banks]
    scores: list[Tensor] = []

    def see(index: int, x_TD: Tensor) -> None:
        scores.append(banks[index].route(x_TD).scores)

    with mlp_inputs(dense, see):
        for row in rows:
            last_hidden_states(dense, row.input_ids, **packed_kwargs(row))
            mask_T = row.router_mask.flatten()
            thresholds_L = exact_thresholds(scores, mask_T, aims(routers), scope)
            scores.clear()
            steer(routers, thresholds_L, rate=0.0)
