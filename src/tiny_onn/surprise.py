"""Surprise Min_K: from per-token surprise to the gate's targets and gradient. Pure functions.

The slow system of the model card. The gate's loss is a cross-entropy between the softmax of its
logits and a target that surprise points at; its gradient with respect to the logits, softmax minus
target, is all that the expert layer's backward pass needs.

Legend: T tokens, E experts.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn.config import Surprise


@dataclass(frozen=True, kw_only=True, slots=True)
class SmkRule:
    """Which quantity, which end of it, among which experts, and how many of them."""

    surprise: Surprise = "parameters"
    direction: Literal["min", "max"] = "min"
    candidates: Literal["active", "all"] = "active"
    targets: Literal["single", "set"] = "single"
    num_targets: int = 16


def smk_targets(
    surprise_TE: Float[Tensor, "tokens experts"],
    active_TE: Bool[Tensor, "tokens experts"],
    token_mask_T: Bool[Tensor, " tokens"],
    rule: SmkRule,
) -> Float[Tensor, "tokens experts"]:
    """Target distribution of every token: rows sum to 1, or to 0 where surprise says nothing.

    `single` spreads the row over the candidates that share the extreme value (one, but for ties).
    `set` spreads it over the best `num_targets` candidates, for `active` candidates over the better
    half of them (the best k of k experts would be all of them). A row has no target when the token
    is masked or when its candidates do not differ (all zero, or only one).
    """
    signed_TE = surprise_TE if rule.direction == "min" else -surprise_TE
    if rule.candidates == "all":
        active_TE = torch.ones_like(active_TE)
    worst = torch.finfo(signed_TE.dtype).max
    signed_TE = torch.where(active_TE, signed_TE, worst)
    best_T1 = signed_TE.amin(-1, keepdim=True)
    farthest_T1 = torch.where(active_TE, signed_TE, -worst).amax(-1, keepdim=True)
    if rule.targets == "single":
        chosen_TE = signed_TE == best_T1
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
    """Cross-entropy of each token's target under its gate, nats; 0 where there is no target."""
    return -(targets_TE * router_logits_TE.log_softmax(-1)).sum(-1)


def smk_logits_grad(
    router_logits_TE: Float[Tensor, "tokens experts"],
    targets_TE: Float[Tensor, "tokens experts"],
) -> Float[Tensor, "tokens experts"]:
    """Gradient of `smk_loss(...).sum()` with respect to the logits: softmax minus target."""
    has_target_T1 = targets_TE.sum(-1, keepdim=True)
    return router_logits_TE.softmax(-1) * has_target_T1 - targets_TE
