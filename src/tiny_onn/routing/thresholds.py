"""Budget thresholds: the one that meets the target on a batch, and the controller that follows it.

Thresholds, integral corrections and update counts are buffers of the routers, all on the device.

Legend: T tokens, E experts, L layers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn.config.schema import BudgetScope
from tiny_onn.model.router import Router

# The integral controller has this share of the threshold's rate (a quarter is critical damping),
# sums relative errors of k up to MAX_STEP_ERROR, and changes a target by at most this share of it:
# MAX_CORRECTION.
INTEGRAL_SHARE = 0.25
MAX_STEP_ERROR = 0.1
MAX_CORRECTION = 0.2
# Layers are treated together while their tables, (T, E) for example, have so many elements.
GROUP_ELEMENTS = 2**22


def exact_threshold(
    scores: Float[Tensor, "*layers tokens experts"],
    token_mask_T: Bool[Tensor, " tokens"],
    target_k: float | Float[Tensor, "*layers"],
) -> Float[Tensor, "*layers"]:
    """Return the threshold at which this batch's counted tokens have `target_k` experts on average.

    The threshold lies halfway between the last score that passes and the next one. Both are taken
    to lie in [-1, 1], where scores are, except for those of first choices, which always pass. Equal
    scores pass together.
    """
    counted = torch.where(token_mask_T[:, None], scores, float("-inf")).flatten(-2)
    padded = F.pad(counted, (0, 1), value=float("-inf"))
    num_active = (token_mask_T.sum() * target_k).round().long().expand(padded.shape[:-1])
    if scores.device.type == "cpu":
        # Reading the counts costs nothing on a CPU, and topk is several times as fast as a sort.
        rows = padded.reshape(-1, padded.shape[-1])
        counts = num_active.flatten().tolist()
        pairs = [_last_and_next(*layer) for layer in zip(rows, counts, strict=True)]
        last_and_next = torch.stack(pairs).view(*num_active.shape, 2)
    else:
        places = torch.stack(((num_active - 1).clamp_min(0), num_active), dim=-1)
        last_and_next = padded.sort(dim=-1, descending=True).values.gather(-1, places)
    return last_and_next.clamp(-1, 1).mean(-1)


def _last_and_next(scores: Tensor, num_active: int) -> Float[Tensor, " 2"]:
    """Return the last score to pass and the one after it; twice the largest if none passes."""
    largest = scores.topk(num_active + 1, sorted=False).values
    return largest.topk(min(2, num_active + 1), largest=False).values.expand(2)


def exact_thresholds(
    scores: list[Float[Tensor, "tokens experts"]],
    token_mask_T: Bool[Tensor, " tokens"],
    targets_L: Float[Tensor, " layers"],
    scope: BudgetScope,
) -> Float[Tensor, " layers"]:
    """Return each layer's exact threshold, or with a global scope one for all layers together.

    The global threshold meets the first layer's target on average over layers.
    """
    if scope == "layer":
        parts = [
            exact_threshold(torch.stack(scores[some]), token_mask_T, targets_L[some])
            for some in layer_groups(len(scores), scores[0].numel())
        ]
        return torch.cat(parts)
    pooled = exact_threshold(torch.cat(scores), token_mask_T.repeat(len(scores)), targets_L[0])
    return pooled.expand(len(scores))


def layer_groups(num_layers: int, elements: int) -> list[slice]:
    """Return slices of layers to treat together, for tables of so many elements per layer.

    On short rows the cost of small operations on every layer is their launches, which groups save;
    on long rows it is memory, which small groups save.
    """
    size = max(1, GROUP_ELEMENTS // max(1, elements))
    return [slice(start, start + size) for start in range(0, num_layers, size)]


def corrected_targets(routers: Sequence[Router]) -> Float[Tensor, " layers"]:
    """Return each layer's target k less its integral correction, which exact thresholds meet."""
    rule, num_experts = routers[0].rule, routers[0].weight.shape[0]
    target_k_L = rule.target_k * (1 - torch.stack([router.correction for router in routers]))
    return target_k_L.clamp(1.0 + rule.num_shared, num_experts)


@torch.no_grad()
def update_thresholds(
    routers: Sequence[Router],
    exact_threshold_L: Float[Tensor, " layers"],
    rate: float,
    mean_k_L: Float[Tensor, " layers"] | None = None,
) -> None:
    """Move each threshold toward the one that would have met the target on the last batch.

    Early updates average all batches, later ones are an exponential moving average. The average
    lags behind a changing gate, and gives another mean k than the thresholds that it averages.
    Relative errors of k up to `MAX_STEP_ERROR` are therefore accumulated and subtracted from the
    next targets, which makes the mean error 0.

    The result is deterministic and causal: earlier batches make the thresholds that route a batch.

    Args:
        routers: The routers whose buffers change.
        exact_threshold_L: The thresholds that would have met the targets on the last batch.
        rate: Share of the exact threshold in the moving average.
        mean_k_L: Experts per token that the batch used; None: no error is accumulated.
    """
    names = ("threshold", "correction", "num_updates")
    buffers = {name: [getattr(router, name) for router in routers] for name in names}
    threshold_L, correction_L, updates_L = (torch.stack(buffers[name]) for name in names)
    annealing = routers[0].annealing
    if mean_k_L is not None and not annealing:
        error_L = mean_k_L / routers[0].rule.target_k - 1
        # Large errors come at the start or with new text. The moving average removes them by
        # itself, and an accumulated correction would overshoot.
        error_L = torch.where(error_L.abs() <= MAX_STEP_ERROR, error_L, 0.0)
        correction_L = correction_L + INTEGRAL_SHARE * rate * error_L
        correction_L = correction_L.clamp(-MAX_CORRECTION, MAX_CORRECTION)
    updates_L = updates_L + 1
    step_L = (1.0 / updates_L).clamp_min(1.0 if annealing else rate)
    threshold_L = threshold_L + step_L * (exact_threshold_L - threshold_L)
    buffers["settled"] = [router.settled for router in routers]
    values = (threshold_L, correction_L, updates_L, threshold_L)
    for router_buffers, values_L in zip(buffers.values(), values, strict=True):
        torch._foreach_copy_(router_buffers, list(values_L.unbind()))  # pyright: ignore[reportPrivateImportUsage]
