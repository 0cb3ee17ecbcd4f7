"""A budget's threshold: the one that meets the target on a batch, and how training moves it there.

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

# The budget's integral control: its rate as a share of the threshold's (a quarter is critical
# damping), the largest relative error that it sums up, and how far it may go.
INTEGRAL_SHARE = 0.25
MAX_STEP_ERROR = 0.1
MAX_CORRECTION = 0.2
# Elements of a table per layer, (T, E) for example, that are treated at once, `layer_groups`.
GROUP_ELEMENTS = 2**22


def exact_threshold(
    scores: Float[Tensor, "*layers tokens experts"],
    token_mask_T: Bool[Tensor, " tokens"],
    target_k: float | Float[Tensor, "*layers"],
) -> Float[Tensor, "*layers"]:
    """The threshold at which the counted tokens of this batch have `target_k` experts on average.

    Halfway between the last score to pass and the next, for the ends of the order 1 and -1: scores
    are probabilities, but for the first choices, which always pass. Equal scores pass together.
    """
    counted = torch.where(token_mask_T[:, None], scores, float("-inf")).flatten(-2)
    padded = F.pad(counted, (0, 1), value=float("-inf"))
    num_active = (token_mask_T.sum() * target_k).round().long().expand(padded.shape[:-1])
    if scores.device.type == "cpu":
        # Counts are at hand, and selecting is several times as fast as sorting.
        rows = padded.reshape(-1, padded.shape[-1])
        counts = num_active.flatten().tolist()
        ends = [_last_and_next(*of_layer) for of_layer in zip(rows, counts, strict=True)]
        last_and_next = torch.stack(ends).view(*num_active.shape, 2)
    else:
        places = torch.stack(((num_active - 1).clamp_min(0), num_active), dim=-1)
        last_and_next = padded.sort(dim=-1, descending=True).values.gather(-1, places)
    return last_and_next.clamp(-1, 1).mean(-1)


def _last_and_next(scores: Tensor, num_active: int) -> Float[Tensor, " 2"]:
    """The largest scores' last one to pass and the one after it; twice the first if none passes."""
    largest = scores.topk(num_active + 1, sorted=False).values
    return largest.topk(min(2, num_active + 1), largest=False).values.expand(2)


def exact_thresholds(
    scores: list[Float[Tensor, "tokens experts"]],
    token_mask_T: Bool[Tensor, " tokens"],
    aims_L: Float[Tensor, " layers"],
    scope: BudgetScope,
) -> Float[Tensor, " layers"]:
    """Each layer's exact threshold, or one at which all together meet the first layer's aim."""
    if scope == "layer":
        parts = [
            exact_threshold(torch.stack(scores[some]), token_mask_T, aims_L[some])
            for some in layer_groups(len(scores), scores[0].numel())
        ]
        return torch.cat(parts)
    pooled = exact_threshold(torch.cat(scores), token_mask_T.repeat(len(scores)), aims_L[0])
    return pooled.expand(len(scores))


def layer_groups(num_layers: int, elements: int) -> list[slice]:
    """Layers to treat together, whose tables have so many elements each.

    On short rows, launches are what small operations on every layer cost; on long ones, memory is.
    """
    size = max(1, GROUP_ELEMENTS // max(1, elements))
    return [slice(start, start + size) for start in range(0, num_layers, size)]


def aims(routers: Sequence[Router]) -> Float[Tensor, " layers"]:
    """The mean k that a batch's exact thresholds should give, integral control included."""
    rule, num_experts = routers[0].rule, routers[0].weight.shape[0]
    aimed_L = rule.target_k * (1 - torch.stack([router.correction for router in routers]))
    return aimed_L.clamp(1.0 + rule.num_shared, num_experts)


@torch.no_grad()
def steer(
    routers: Sequence[Router],
    exact_threshold_L: Float[Tensor, " layers"],
    rate: float,
    mean_k_L: Float[Tensor, " layers"] | None = None,
) -> None:
    """Move thresholds toward the last batch's exact ones: a mean at first, then a moving one.

    A moving mean of thresholds lags behind a gate that changes, and its mean k is not that of the
    thresholds it averages. Where `mean_k_L`, what the batch in fact used, is given, its relative
    error, if small, is summed up and taken from the next aims: on average it is 0.

    Deterministic and causal: a batch is routed by thresholds that earlier batches made.
    """
    names = ("threshold", "correction", "num_updates")
    buffers = {name: [getattr(router, name) for router in routers] for name in names}
    threshold_L, correction_L, updates_L = (torch.stack(buffers[name]) for name in names)
    annealing = routers[0].annealing
    if mean_k_L is not None and not annealing:
        error_L = mean_k_L / routers[0].rule.target_k - 1
        # A large one is the start, or new text: the moving mean is on its way, and what was summed
        # up meanwhile would overshoot.
        error_L = torch.where(error_L.abs() <= MAX_STEP_ERROR, error_L, 0.0)
        correction_L = correction_L + INTEGRAL_SHARE * rate * error_L
        correction_L = correction_L.clamp(-MAX_CORRECTION, MAX_CORRECTION)
    updates_L = updates_L + 1
    step_L = (1.0 / updates_L).clamp_min(1.0 if annealing else rate)
    threshold_L = threshold_L + step_L * (exact_threshold_L - threshold_L)
    buffers["settled"] = [router.settled for router in routers]
    values = (threshold_L, correction_L, updates_L, threshold_L)
    for of_routers, values_L in zip(buffers.values(), values, strict=True):
        torch._foreach_copy_(of_routers, list(values_L.unbind()))  # pyright: ignore[reportPrivateImportUsage]
