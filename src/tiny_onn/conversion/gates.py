"""Gates fitted by ridge regression to the outputs of experts on a few thousand tokens of text.

The regressions keep only sums, so their memory does not grow with the text. The first token of each
document is left out: it is an attention sink, whose activations are thousands of times larger and
would decide the fit alone.

Legend: T tokens, D hidden, E experts, I expert width, F = E * I neurons.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tiny_onn.data.packing import PackedRow
from tiny_onn.model.experts import ExpertBank, expert_norms
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.ops.shared_experts import routed
from tiny_onn.ops.surprise import log_norm

RIDGE = 1e-3


class Ridge:
    """Ridge regressions of several targets on the same inputs, with an unpenalised bias.

    The inputs' second moments are factored once for all targets. Products over tokens are float32,
    whose rounding is far below the penalty, and the equations are solved in float64.
    """

    def __init__(self, x_TD: Float[Tensor, "tokens hidden"]) -> None:
        self._features_TD = F.pad(x_TD.float(), (0, 1), value=1.0)
        gram_DD = _penalised((self._features_TD.T @ self._features_TD).double())
        self._factors = torch.linalg.lu_factor(gram_DD)

    def fit(
        self, target_TE: Float[Tensor, "tokens experts"]
    ) -> tuple[Float[Tensor, "hidden experts"], Float[Tensor, " experts"]]:
        """Return weight and bias of the regression of these targets, float64."""
        # An unpenalised bias takes up the mean exactly, and products of targets without their mean
        # round less.
        mean_E = target_TE.double().mean(0)
        moment_DE = self._features_TD.T @ (target_TE - mean_E).float()
        solution_DE = torch.linalg.lu_solve(*self._factors, moment_DE.double())
        return solution_DE[:-1], solution_DE[-1] + mean_E


def solve_ridge(gram_DD: Tensor, moment_DE: Tensor) -> Tensor:
    """Return the ridge solution; the last feature is the constant 1, which is not penalised."""
    return torch.linalg.solve(_penalised(gram_DD), moment_DE)


def _penalised(gram_DD: Tensor) -> Tensor:
    D = len(gram_DD) - 1
    penalty = RIDGE * gram_DD.diagonal()[:D].mean() * torch.eye(D + 1, device=gram_DD.device)
    penalty[D, D] = 0
    return gram_DD + penalty


@torch.no_grad()
def fit_gates(
    inputs: MlpInputs, banks: Sequence[ExpertBank], *, static: bool = False
) -> list[float]:
    """Set each router to the ridge regression of `log |expert_e(x)|` on x.

    Softmax probabilities then stand for the experts' shares of the output's total norm, and the
    cumulative budget keeps the experts that carry a given share of it.

    Args:
        inputs: the dense model's MLP inputs on calibration text, which are regressed on.
        banks: its layers' experts and routers.
        static: True fits the bias alone, to the mean of the target, which is the best choice that
            sees no token. The bias of the whole fit is another one, the prediction at x = 0.

    Returns:
        Per layer, the share of the targets' variance (within routed experts) that the gate
        explains.
    """
    D, E = banks[0].experts.hidden_dim, banks[0].experts.num_experts
    zeros = partial(torch.zeros, device=inputs.dense.device, dtype=torch.float64)
    grams = [zeros(D + 1, D + 1) for _ in banks]
    moments = [zeros(D + 1, E) for _ in banks]
    squares = [zeros(E) for _ in banks]

    def observe(index: int, x_TD: Tensor, row: PackedRow) -> None:
        x_TD = x_TD[row.router_mask[0]]
        targets_TE = log_norm(expert_norms(banks[index], x_TD))
        features_TD = F.pad(x_TD.float(), (0, 1), value=1.0)
        grams[index] += features_TD.T @ features_TD
        moments[index] += features_TD.T @ targets_TE
        squares[index] += targets_TE.double().square().sum(0)

    inputs.visit(observe, "fitting gates, rows")
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
