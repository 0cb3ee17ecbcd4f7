"""Routing: how many experts a token activates, and which. Everything runs in float32.

A selection turns router logits into scores and activates the experts whose score exceeds a
threshold (`budget`) or ranks among the k largest (`top_k`, `static`, `random`).

Legend: T tokens, D hidden, E experts, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tiny_onn.config import Selection, Weighting

# Share by which a probability falls with its rank in the token, 16 units in float32's last place:
# without it all experts of a flat gate pass a threshold, or none.
TIE_BREAK = 2.0**-20


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingRule:
    """Which experts are active, given the router's logits, and their weights."""

    selection: Selection = "budget"
    weighting: Weighting = "unit"
    target_k: float = 16.0
    budget_form: Literal["cumulative", "threshold"] = "threshold"


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """One layer's routing of one batch."""

    router_logits: Float[Tensor, "tokens experts"]
    """float32, with the router's graph."""
    scores: Float[Tensor, "tokens experts"]
    """What a budget's threshold is compared with; the token's first choice is infinite."""
    active: Bool[Tensor, "tokens experts"]
    weights: Float[Tensor, "tokens experts"]
    """0 where inactive, the graph of the weighting elsewhere."""

    def detach(self) -> "Routing":
        """The same routing without its graph."""
        return Routing(
            router_logits=self.router_logits.detach(),
            scores=self.scores,
            active=self.active,
            weights=self.weights.detach(),
        )


class Router(nn.Module):
    """The gate of one layer: a linear map to one logit per expert, and the budget's threshold.

    The bias is each expert's own threshold: without it a gate cannot say that an expert is useful
    for every token.
    """

    def __init__(self, hidden_dim: int, num_experts: int, rule: RoutingRule) -> None:
        super().__init__()
        self.rule = rule
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_dim))
        self.bias = nn.Parameter(torch.empty(num_experts))
        self.threshold = nn.Buffer(torch.empty(()))
        self.num_updates = nn.Buffer(torch.empty(()))
        self.reset(None)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None, std: float = 0.02) -> None:
        """Zero gate, or a normal one when a generator is given, and a threshold for a flat gate."""
        if generator is None:
            self.weight.zero_()
        else:
            self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * std)
        self.bias.zero_()
        num_experts, rank = self.weight.shape[0], self.rule.target_k - 0.5
        share = 1 - rank / num_experts
        tied = (1 - rank * TIE_BREAK) / num_experts
        self.threshold.fill_(share if self.rule.budget_form == "cumulative" else tied)
        self.num_updates.zero_()

    def forward(self, x_TD: Float[Tensor, "tokens hidden"]) -> Routing:
        """The routing of every token."""
        logits_TE = F.linear(x_TD.float(), self.weight.float(), self.bias.float())
        return route(logits_TE, self.rule, self.threshold)

    @torch.no_grad()
    def steer(self, exact_threshold: Float[Tensor, ""], rate: float) -> None:
        """Move the threshold toward the last batch's exact one: a mean at first, then a moving one.

        Deterministic and causal: a batch is routed by thresholds that earlier batches made.
        """
        self.num_updates += 1
        step = (1.0 / self.num_updates).clamp_min(rate)
        self.threshold += step * (exact_threshold - self.threshold)


def route(
    logits_TE: Float[Tensor, "tokens experts"],
    rule: RoutingRule,
    threshold: Float[Tensor, ""],
) -> Routing:
    """Apply a rule to float32 logits.

    `budget`, cumulative form: experts by falling probability until their sum passes p; an expert's
    score is the probability mass from its rank on (1 minus the mass before it), the threshold is
    1 - p. Threshold form: the score is the probability, equal ones ordered by expert. The token's
    first choice is always active.
    `top_k`, `static`, `random`: the `target_k` largest logits (for the controls the logits come
    from a frozen gate). Weights of `top_k` with softmax weighting are the active probabilities,
    renormalised to sum to 1 (Mixtral, arXiv 2401.04088, section 2.1; Qwen3-MoE).
    """
    probs_TE = logits_TE.softmax(-1)
    order_TE = logits_TE.detach().argsort(dim=-1, descending=True, stable=True)
    if rule.selection == "budget":
        scores_TE = budget_scores(probs_TE.detach(), order_TE, rule.budget_form)
        active_TE = scores_TE > threshold
    else:
        scores_TE = logits_TE.detach()
        active_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
        active_TE.scatter_(-1, order_TE[:, : round(rule.target_k)], True)
    weights_TE = routing_weights(logits_TE, probs_TE, active_TE, rule.weighting)
    return Routing(router_logits=logits_TE, scores=scores_TE, active=active_TE, weights=weights_TE)


def budget_scores(
    probs_TE: Float[Tensor, "tokens experts"],
    order_TE: Tensor,
    form: Literal["cumulative", "threshold"],
) -> Float[Tensor, "tokens experts"]:
    """What the budget's threshold is compared with; infinite for the token's first choice."""
    sorted_TE = probs_TE.gather(-1, order_TE)
    if form == "cumulative":
        # Summed from the small end: 1 - mass would round a sharp gate's later ranks to a tie at 0.
        ranked_TE = sorted_TE.flip(-1).cumsum(-1).flip(-1)
    else:
        rank_E = torch.arange(probs_TE.shape[-1], device=probs_TE.device)
        ranked_TE = sorted_TE * (1 - rank_E * TIE_BREAK)
    scores_TE = torch.empty_like(probs_TE).scatter_(-1, order_TE, ranked_TE)
    return scores_TE.scatter_(-1, order_TE[:, :1], float("inf"))


def routing_weights(
    logits_TE: Float[Tensor, "tokens experts"],
    probs_TE: Float[Tensor, "tokens experts"],
    active_TE: Bool[Tensor, "tokens experts"],
    weighting: Weighting,
) -> Float[Tensor, "tokens experts"]:
    """The active experts' weights: 1, renormalised softmax, sigmoid of the logit, or 1 / k.

    Weights that do not depend on the logits (`unit`, `mean`) pass their gradient straight through
    to `E * softmax`, for active and inactive experts alike: an expert's logit rises by what the
    expert would gain beyond the softmax-weighted mean.
    """
    if weighting == "softmax":
        kept_TE = probs_TE * active_TE
        return kept_TE / kept_TE.sum(-1, keepdim=True)
    if weighting == "sigmoid":
        return logits_TE.sigmoid() * active_TE
    straight_TE = probs_TE.shape[-1] * (probs_TE - probs_TE.detach())
    weights_TE = active_TE.to(logits_TE.dtype) + straight_TE
    if weighting == "mean":
        weights_TE = weights_TE / active_TE.sum(-1, keepdim=True).clamp_min(1)
    return weights_TE


def exact_threshold(
    scores_TE: Float[Tensor, "tokens experts"],
    token_mask_T: Bool[Tensor, " tokens"],
    target_k: float,
) -> Float[Tensor, ""]:
    """The threshold at which the counted tokens of this batch have `target_k` experts on average.

    Halfway between the last score to pass and the next, for the ends of the order 1 and -1: scores
    are probabilities, but for the first choices, which always pass. Equal scores pass together.
    """
    scores_TE = torch.where(token_mask_T[:, None], scores_TE, float("-inf"))
    ordered = torch.cat((scores_TE.flatten(), scores_TE.new_full((1,), float("-inf"))))
    ordered, _ = ordered.sort(descending=True)
    num_active = (token_mask_T.sum() * target_k).round().long()
    last_and_next = torch.stack(((num_active - 1).clamp_min(0), num_active))
    return ordered.gather(0, last_and_next).clamp(-1, 1).mean()


def load_balancing_loss(
    router_logits: Sequence[Float[Tensor, "tokens experts"]],
    top_k: int,
    token_mask_T: Bool[Tensor, " tokens"],
) -> Float[Tensor, ""]:
    """`E * sum_e f_e P_e`, over all layers' tokens together, as transformers' Mixtral computes it.

    f_e is the share of counted tokens whose k largest probabilities include expert e (their sum is
    k), P_e the mean probability of e. Source: Switch Transformer, arXiv 2101.03961, equations 4-6.
    """
    probs = torch.cat([logits_TE[token_mask_T] for logits_TE in router_logits]).softmax(-1)
    chosen = probs.topk(top_k, dim=-1).indices
    share_E = F.one_hot(chosen, probs.shape[-1]).float().sum(1).mean(0)
    return (share_E * probs.mean(0)).sum() * probs.shape[-1]


def z_loss(
    router_logits: Sequence[Float[Tensor, "tokens experts"]],
    token_mask_T: Bool[Tensor, " tokens"],
) -> Float[Tensor, ""]:
    """Mean squared log-partition of the router logits.

    Source: ST-MoE, arXiv 2202.08906, equation 5.
    """
    logits = torch.cat([logits_TE[token_mask_T] for logits_TE in router_logits])
    return logits.logsumexp(-1).square().mean()
