"""Statistics of how well a score ranks experts for a token, compared with the truth.

Legend: T tokens, D features, E experts, G groups of tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NUM_RESAMPLES = 1000
# Ridge penalties tried, in units of the features' mean variance times the number of tokens.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
# Share of the fitting tokens on which the penalty is chosen.
CHOICE_SHARE = 0.2


class Estimate(NamedTuple):
    """A mean and its 95 % bootstrap interval; NaN where there is nothing to average."""

    mean: float
    low: float
    high: float


def ranks(
    values_TE: Float[Tensor, "tokens experts"], candidates_TE: Bool[Tensor, "tokens experts"]
) -> Float[Tensor, "tokens experts"]:
    """Rank each value among its row's candidates, from 0; equal values share their mean rank.

    `rank[t, e] = #{j: v[t, j] < v[t, e]} + (#{j: v[t, j] == v[t, e]} - 1) / 2`, 0 elsewhere.
    """
    others_T1E, own_TE1 = values_TE[:, None], values_TE[:, :, None]
    counted_T1E = candidates_TE[:, None]
    below_TE = ((others_T1E < own_TE1) & counted_T1E).sum(-1)
    equal_TE = ((others_T1E == own_TE1) & counted_T1E).sum(-1)
    return torch.where(candidates_TE, below_TE + (equal_TE - 1) / 2, 0.0)


def spearman(
    first_TE: Float[Tensor, "tokens experts"],
    second_TE: Float[Tensor, "tokens experts"],
    candidates_TE: Bool[Tensor, "tokens experts"],
) -> Float[Tensor, " tokens"]:
    """Return the rank correlation over each token's candidates; NaN if a score does not vary.

    This is the Pearson correlation of mean ranks, which is Spearman's correlation with ties.
    """
    count_T1 = candidates_TE.sum(-1, keepdim=True)
    centred = [
        torch.where(candidates_TE, ranks(values, candidates_TE) - (count_T1 - 1) / 2, 0.0)
        for values in (first_TE, second_TE)
    ]
    products_T = (centred[0] * centred[1]).sum(-1)
    scale_T = (centred[0].square().sum(-1) * centred[1].square().sum(-1)).sqrt()
    return torch.where(scale_T > 0, products_T / scale_T, torch.nan)


def per_token(
    score_TE: Float[Tensor, "tokens experts"],
    truth_TE: Float[Tensor, "tokens experts"],
    magnitude_TE: Float[Tensor, "tokens experts"],
    candidates_TE: Bool[Tensor, "tokens experts"],
) -> dict[str, Float[Tensor, " tokens"]]:
    """Return, for each token, how a score agrees with the truth, and the experts at its extremes.

    Experts that share the extreme score are averaged. The keys are `spearman`; `constant` (1 if the
    candidates' scores do not differ, else 0) and `zero` (1 if they are all 0, else 0); and for each
    END, `min` and `max`: `truth_at_END`, `tied_END` (1 if experts share the extreme, else 0) and
    `magnitude_rank_END` (0 for the smallest output).
    """
    magnitude_rank_TE = ranks(magnitude_TE, candidates_TE)
    found = {"spearman": spearman(score_TE, truth_TE, candidates_TE)}
    ends = {}
    for end, sign in (("min", 1.0), ("max", -1.0)):
        signed_TE = torch.where(candidates_TE, sign * score_TE, torch.inf)
        at_TE = (signed_TE == signed_TE.amin(-1, keepdim=True)) & candidates_TE
        num_T = at_TE.sum(-1)
        ends[end] = at_TE
        found[f"truth_at_{end}"] = (truth_TE * at_TE).sum(-1) / num_T
        found[f"tied_{end}"] = (num_T > 1).to(truth_TE.dtype)
        found[f"magnitude_rank_{end}"] = (magnitude_rank_TE * at_TE).sum(-1) / num_T
    found["constant"] = (ends["min"] == candidates_TE).all(-1).to(truth_TE.dtype)
    found["zero"] = ((score_TE == 0) | ~candidates_TE).all(-1).to(truth_TE.dtype)
    return found


def levels(
    truth_TE: Float[Tensor, "tokens experts"], candidates_TE: Bool[Tensor, "tokens experts"]
) -> dict[str, Float[Tensor, " tokens"]]:
    """Return each token's truth of a `random` candidate, of the `best` and of the `worst` one."""
    random_T = (truth_TE * candidates_TE).sum(-1) / candidates_TE.sum(-1)
    best_T = torch.where(candidates_TE, truth_TE, -torch.inf).amax(-1)
    worst_T = torch.where(candidates_TE, truth_TE, torch.inf).amin(-1)
    return {"random": random_T, "best": best_T, "worst": worst_T}


def estimate(
    values_T: Float[Tensor, " tokens"],
    groups_T: Int[Tensor, " tokens"],
    generator: torch.Generator,
) -> Estimate:
    """Average over tokens, with an interval by resampling whole groups; NaN is left out."""
    is_number_T = ~values_T.isnan()
    if not is_number_T.any():
        return Estimate(torch.nan, torch.nan, torch.nan)
    values, groups = values_T[is_number_T].double(), groups_T[is_number_T]
    _, index = groups.unique(return_inverse=True)
    num_groups = int(index.max()) + 1
    sums_G = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, index, values)
    counts_G = torch.bincount(index, minlength=num_groups).double()
    drawn = torch.randint(num_groups, (NUM_RESAMPLES, num_groups), generator=generator)
    means = sums_G[drawn].sum(-1) / counts_G[drawn].sum(-1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(values.mean().item(), low, high)


def fit_ridge(
    x_TD: Float[Tensor, "tokens features"], y_TE: Float[Tensor, "tokens experts"]
) -> Callable[[Float[Tensor, "new features"]], Float[Tensor, "new experts"]]:
    """Fit a ridge regression of y on x, whose penalty is chosen on the last tokens.

    Returns:
        The predictor of y from new x.
    """
    x_TD, y_TE = x_TD.double(), y_TE.double()
    num_fit = round(len(x_TD) * (1 - CHOICE_SHARE))
    candidates = _ridge(x_TD[:num_fit], y_TE[:num_fit], PENALTIES)
    errors = [
        (predict(x_TD[num_fit:]) - y_TE[num_fit:]).square().mean().item() for predict in candidates
    ]
    best = min(range(len(PENALTIES)), key=lambda index: errors[index])
    return _ridge(x_TD, y_TE, PENALTIES[best : best + 1])[0]


def _ridge(
    x_TD: Tensor, y_TE: Tensor, penalties: Sequence[float]
) -> list[Callable[[Tensor], Tensor]]:
    mean_D, mean_E = x_TD.mean(0), y_TE.mean(0)
    centred_TD = x_TD - mean_D
    values_D, vectors_DD = torch.linalg.eigh(centred_TD.T @ centred_TD)
    moment_DE = vectors_DD.T @ (centred_TD.T @ (y_TE - mean_E))
    predictors: list[Callable[[Tensor], Tensor]] = []
    for penalty in penalties:
        # The 1e-30 keeps features that do not vary from a division by zero.
        shrink_D = values_D.clamp_min(0) + penalty * values_D.mean() + 1e-30
        weight_DE = vectors_DD @ (moment_DE / shrink_D[:, None])
        predictors.append(
            lambda new_TD, weight_DE=weight_DE: (new_TD.double() - mean_D) @ weight_DE + mean_E
        )
    return predictors
