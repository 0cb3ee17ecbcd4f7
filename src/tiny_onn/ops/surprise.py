"""Surprise Min_K: from per-token surprise to the gate's targets and gradient. Pure functions.

The slow system of the model card. The gate's loss is a cross-entropy between the softmax of its
logits and a target that surprise points at; its gradient with respect to the logits, softmax minus
target, is all that the expert layer's backward pass needs.

Legend: T tokens, E experts.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn.config.schema import SmkTargets, Surprise

# The interval that holds a token's offset is halved so often that float32 has no place left.
_HALVINGS = 40
# At this distance from 0 the sigmoid is within 1e-13 of its limit.
_FAR = 30.0
# Smaller norms are raised to this one before their logarithm is taken.
MIN_NORM = 1e-6
# The largest denominator of the fraction that stands for a share of tokens.
_PARTS = 2**20


def log_norm(norm: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the logarithm of a norm (or of any quantity >= 0), at least that of `MIN_NORM`."""
    return norm.clamp_min(MIN_NORM).log()


@dataclass(frozen=True, kw_only=True, slots=True)
class SmkRule:
    """The rule by which surprise points at a router's targets."""

    surprise: Surprise = "parameters"
    direction: Literal["min", "max"] = "min"
    candidates: Literal["active", "all"] = "active"
    targets: SmkTargets | Literal["log"] = "single"
    """The form of the targets: `regress` and `log` are no distributions, see `regression_grad`."""
    num_targets: int = 16
    lesson_share: float = 1.0
    """Share of the tokens whose candidates are all experts, where `candidates` says so; see
    `lesson_tokens`. The candidates of the other tokens are their active experts."""

    @property
    def samples_lesson(self) -> bool:
        """True if some tokens' candidates are all experts and the other tokens' are not."""
        return self.candidates == "all" and self.lesson_share < 1


def lesson_tokens(
    num_tokens: int, share: float, shift: int | Tensor, device: torch.device | str = "cpu"
) -> Bool[Tensor, " tokens"]:
    """Return the tokens that belong to a lesson on a share of them, evenly spaced.

    With the share as a fraction n / d, token t belongs to it where `(t + shift) * n % d < n`: of d
    tokens in a row, n do. The arithmetic is of integers, so every device chooses the same tokens.

    Args:
        num_tokens: length of the row, masked tokens included.
        share: above 0, at most 1.
        shift: moves the choice by one token each time it grows by one, such as a step's number.
        device: where the mask lies.
    """
    part = _fraction(share)
    n, d = part.numerator, part.denominator
    return (torch.arange(num_tokens, device=device) + shift % d) * n % d < n


def num_lesson_tokens(num_tokens: int, share: float, shift: int | Tensor) -> int | None:
    """Return how many tokens `lesson_tokens` chooses, without reading a device.

    Returns:
        The number; None if it depends on a shift that is a tensor.
    """
    part = _fraction(share)
    if num_tokens * part.numerator % part.denominator == 0:
        return num_tokens * part.numerator // part.denominator
    if isinstance(shift, Tensor):
        return None
    first = shift % part.denominator
    return int((first + num_tokens - 1) * part // 1) - int((first - 1) * part // 1)


def _fraction(share: float) -> Fraction:
    return Fraction(share).limit_denominator(_PARTS) or Fraction(1, _PARTS)


def smk_targets(
    surprise_TE: Float[Tensor, "tokens experts"],
    active_TE: Bool[Tensor, "tokens experts"],
    token_mask_T: Bool[Tensor, " tokens"],
    rule: SmkRule,
) -> Float[Tensor, "tokens experts"]:
    """Return every token's target distribution: rows sum to 1, or to 0 where there is no target.

    A row has no target when the token is masked or when its candidates do not differ (all zero, or
    a single one). The other rows are spread evenly over these candidates:

    - `single`: those that share the extreme value (one, but for ties);
    - `set` and `member`: the best `num_targets`, or with `active` candidates the better half of
      them (the best k of k experts would be all of them);
    - `helpful`: those of positive gain, unless that is all of them;
    - `regress` and `log`: those of `single`, for statistics; their gradient needs no distribution.
    """
    signed_TE = surprise_TE if rule.direction == "min" else -surprise_TE
    if rule.candidates == "all":
        active_TE = torch.ones_like(active_TE)
    worst = torch.finfo(signed_TE.dtype).max
    signed_TE = torch.where(active_TE, signed_TE, worst)
    best_T1 = signed_TE.amin(-1, keepdim=True)
    farthest_T1 = torch.where(active_TE, signed_TE, -worst).amax(-1, keepdim=True)
    if rule.targets not in ("set", "member", "helpful"):
        chosen_TE = signed_TE == best_T1
    elif rule.targets == "helpful":
        chosen_TE = (signed_TE < 0) & (farthest_T1 >= 0)
    else:
        num_T1 = _num_targets(active_TE, rule)
        rank_TE = signed_TE.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
        chosen_TE = rank_TE < num_T1
    chosen_TE = chosen_TE & active_TE & token_mask_T[:, None] & (farthest_T1 > best_T1)
    return chosen_TE.to(surprise_TE.dtype) / chosen_TE.sum(-1, keepdim=True).clamp_min(1)


def _num_targets(
    active_TE: Bool[Tensor, "tokens experts"], rule: SmkRule
) -> Int[Tensor, "tokens 1"]:
    num_active_T1 = active_TE.sum(-1, keepdim=True)
    if rule.candidates == "all":
        return num_active_T1.clamp_max(rule.num_targets)
    return (num_active_T1 + 1) // 2


def smk_loss(
    router_logits_TE: Float[Tensor, "tokens experts"],
    targets_TE: Float[Tensor, "tokens experts"],
) -> Float[Tensor, " tokens"]:
    """Return the cross-entropy, in nats, of each token's target under its gate; 0 without one."""
    return -(targets_TE * router_logits_TE.log_softmax(-1)).sum(-1)


def smk_logits_grad(
    router_logits_TE: Float[Tensor, "tokens experts"],
    targets_TE: Float[Tensor, "tokens experts"],
) -> Float[Tensor, "tokens experts"]:
    """Return the gradient of `smk_loss(...).sum()` at the logits: softmax minus target."""
    has_target_T1 = targets_TE.sum(-1, keepdim=True)
    return router_logits_TE.softmax(-1) * has_target_T1 - targets_TE


def regression_targets(
    surprise_TE: Float[Tensor, "tokens experts"],
    active_TE: Bool[Tensor, "tokens experts"],
    token_mask_T: Bool[Tensor, " tokens"],
    rule: SmkRule,
) -> tuple[Float[Tensor, "tokens experts"], Bool[Tensor, "tokens experts"]]:
    """Return the values that the logits regress on, and which pairs count.

    - `regress`: the quantity, its sign turned so that larger is better, minus its mean over the
      token's candidates, divided by the root mean square of these differences over all counted
      pairs of the layer and row. The values are free of the scales of loss and layer, yet all
      tokens share one scale, so that a regression learns the expectation of the quantity. A token
      whose candidates do not differ does not count.
    - `log`: the logarithm of the quantity.
    """
    candidates_TE = torch.ones_like(active_TE) if rule.candidates == "all" else active_TE
    counts_TE = candidates_TE & token_mask_T[:, None]
    if rule.targets == "log":
        return log_norm(surprise_TE), counts_TE
    signed_TE = surprise_TE if rule.direction == "max" else -surprise_TE
    centred_TE = centre(signed_TE, candidates_TE)
    farthest_TE = torch.where(candidates_TE, signed_TE, float("-inf"))
    nearest_TE = torch.where(candidates_TE, signed_TE, float("inf"))
    differ_T1 = farthest_TE.amax(-1, keepdim=True) > nearest_TE.amin(-1, keepdim=True)
    counts_TE = counts_TE & differ_T1
    squares = torch.where(counts_TE, centred_TE.square(), 0).sum()
    spread = (squares / counts_TE.sum().clamp_min(1)).sqrt()
    return centred_TE / spread.clamp_min(torch.finfo(spread.dtype).tiny), counts_TE


def regression_grad(
    router_logits_TE: Float[Tensor, "tokens experts"],
    surprise_TE: Float[Tensor, "tokens experts"],
    active_TE: Bool[Tensor, "tokens experts"],
    token_mask_T: Bool[Tensor, " tokens"],
    rule: SmkRule,
) -> Float[Tensor, "tokens experts"]:
    """Return the gradient at the logits of the mean squared error, summed over tokens.

    The mean is over a token's candidates. For `regress` the logits are centred like their targets,
    since their common level means nothing to a softmax.
    """
    targets_TE, counts_TE = regression_targets(surprise_TE, active_TE, token_mask_T, rule)
    if rule.targets == "regress":
        router_logits_TE = centre(router_logits_TE, counts_TE)
    errors_TE = torch.where(counts_TE, router_logits_TE - targets_TE, 0)
    return 2 * errors_TE / counts_TE.sum(-1, keepdim=True).clamp_min(1)


def centre(
    values_TE: Float[Tensor, "tokens experts"], among_TE: Bool[Tensor, "tokens experts"]
) -> Float[Tensor, "tokens experts"]:
    """Return the values minus their mean over each token's experts in `among_TE`."""
    total_T1 = torch.where(among_TE, values_TE, 0).sum(-1, keepdim=True)
    return values_TE - total_T1 / among_TE.sum(-1, keepdim=True).clamp_min(1)


def label_loss(
    router_logits_TE: Float[Tensor, "tokens experts"],
    targets_TE: Float[Tensor, "tokens experts"],
    candidates_TE: Bool[Tensor, "tokens experts"],
) -> Float[Tensor, " tokens"]:
    """Return each token's mean binary cross-entropy of "is this candidate a target?", in nats.

    `min over c of mean_e BCE(sigmoid(logit[e] - c), target[e] > 0)`: routing asks which experts,
    not how many, so the token's own level c is free. `single` and `set` share out one unit of
    probability; here every expert is judged by itself, and the best logit is the log-odds of being
    a target. The loss of a token without a target is 0.
    """
    labels_TE = (targets_TE > 0).to(router_logits_TE.dtype)
    shifted_TE = router_logits_TE - _offset(router_logits_TE, targets_TE, candidates_TE)
    losses_TE = F.binary_cross_entropy_with_logits(shifted_TE, labels_TE, reduction="none")
    counts_TE = candidates_TE & (targets_TE.sum(-1, keepdim=True) > 0)
    return torch.where(counts_TE, losses_TE, 0).sum(-1) / counts_TE.sum(-1).clamp_min(1)


def label_logits_grad(
    router_logits_TE: Float[Tensor, "tokens experts"],
    targets_TE: Float[Tensor, "tokens experts"],
    candidates_TE: Bool[Tensor, "tokens experts"],
) -> Float[Tensor, "tokens experts"]:
    """Return the gradient of `label_loss(...).sum()` with respect to the logits.

    It is `(sigmoid(logit - c) - label) / candidates`: c is at the loss' minimum and adds nothing.
    """
    shifted_TE = router_logits_TE - _offset(router_logits_TE, targets_TE, candidates_TE)
    errors_TE = shifted_TE.sigmoid() - (targets_TE > 0).to(shifted_TE.dtype)
    counts_TE = candidates_TE & (targets_TE.sum(-1, keepdim=True) > 0)
    errors_TE = torch.where(counts_TE, errors_TE, 0)
    return errors_TE / counts_TE.sum(-1, keepdim=True).clamp_min(1)


@torch.no_grad()
def _offset(
    router_logits_TE: Float[Tensor, "tokens experts"],
    targets_TE: Float[Tensor, "tokens experts"],
    candidates_TE: Bool[Tensor, "tokens experts"],
) -> Float[Tensor, "tokens 1"]:
    """Return the c at which the candidates' `sigmoid(logit - c)` sum to the number of targets."""
    num_T1 = (targets_TE > 0).sum(-1, keepdim=True)
    worst = torch.finfo(router_logits_TE.dtype).max
    low_T1 = torch.where(candidates_TE, router_logits_TE, worst).amin(-1, keepdim=True) - _FAR
    high_T1 = torch.where(candidates_TE, router_logits_TE, -worst).amax(-1, keepdim=True) + _FAR
    for _ in range(_HALVINGS):
        middle_T1 = (low_T1 + high_T1) / 2
        shares_TE = torch.where(candidates_TE, (router_logits_TE - middle_T1).sigmoid(), 0)
        too_low_T1 = shares_TE.sum(-1, keepdim=True) > num_T1
        low_T1 = torch.where(too_low_T1, middle_T1, low_T1)
        high_T1 = torch.where(too_low_T1, high_T1, middle_T1)
    return (low_T1 + high_T1) / 2
