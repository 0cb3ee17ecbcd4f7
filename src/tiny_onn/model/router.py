"""The router: which experts a token activates, and how many, in float32 with or without autocast.

The experts' scores come from a linear gate, from cosines with prototypes (`top_any`, dynmoe.py), or
from the true norms of their outputs (`oracle`, given from outside). A selection then activates the
experts whose score exceeds a threshold (a budget) or ranks among the k largest.
`routing/thresholds.py` moves a budget's threshold, and `routing/steering.py` makes the router's
other changes that need no gradient.

Legend: T tokens, D hidden, E experts, S of them shared, R = E - S routed, L layers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_type_hints

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tiny_onn.config.checks import shown
from tiny_onn.config.read import coerce
from tiny_onn.config.schema import (
    AtLeastOne,
    ExpertsConfig,
    RouterConfig,
    Selection,
    StraightThrough,
    Weighting,
)
from tiny_onn.errors import UserError, printable
from tiny_onn.model import dynmoe
from tiny_onn.model.exploration import Exploration, explore
from tiny_onn.model.routing_weights import margins, routing_weights
from tiny_onn.model.sequence_budget import UNMEASURED, Sequences
from tiny_onn.ops.precision import without_autocast
from tiny_onn.ops.shared_experts import routed, with_shared

# The probability of rank r is multiplied by 1 - r * TIE_BREAK (16 float32 ulps), so that a
# threshold can separate the equal probabilities of a flat gate.
TIE_BREAK = 2.0**-20


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingRule:
    """The rule that gives active experts and their weights from the router's logits.

    Every option has the name, the type and the meaning of a setting in the `experts` or `router`
    table of a run, and a saved student's config.json holds all of them under `routing`.
    """

    selection: Selection = "budget"
    weighting: Weighting = "unit"
    target_k: float = 16.0
    budget_form: Literal["cumulative", "threshold"] = "threshold"
    at_least_one: AtLeastOne = "evaluation"
    oracle_budget: bool = False
    straight_through: StraightThrough = "softmax"
    num_shared: int = 0
    """Number of shared experts: the first ones, always active at weight 1. `target_k` includes
    them."""

    @property
    def has_budget(self) -> bool:
        """True if a threshold decides how many experts a token activates, k on average."""
        return self.selection == "budget" or (self.selection == "oracle" and self.oracle_budget)

    @property
    def uses_margins(self) -> bool:
        """True if weights or their gradient depend on how far a probability is from a threshold."""
        return self.weighting == "ramp" or self.straight_through == "threshold"

    @property
    def num_active(self) -> int | None:
        """Number of experts of every token, shared ones included; None if it varies by token."""
        varies = self.has_budget or self.selection == "top_any"
        return None if varies else round(self.target_k)

    @classmethod
    def of_settings(cls, experts: ExpertsConfig, router: RouterConfig) -> "RoutingRule":
        """Return the rule that the settings of a run describe."""
        tables = {
            field.name: experts if hasattr(experts, field.name) else router for field in fields(cls)
        }
        return cls(**{name: getattr(table, name) for name, table in tables.items()})

    @classmethod
    def from_stored(cls, options: object) -> "RoutingRule":
        """Read the rule in a student's config.json; an option that is not there has its default.

        Raises:
            UserError: the options are no table, one is unknown, or a value is of another type.
        """
        if not isinstance(options, Mapping):
            raise UserError(
                f"routing: got {shown(options)}, expected a table of options; restore the student's"
                " config.json"
            )
        hints = get_type_hints(cls)
        for name in options:
            if name not in hints:
                raise UserError(
                    f"routing: got the unknown option {printable(repr(name))[:80]}, expected one of"
                    f" {', '.join(hints)}; load the student with the version of tiny-onn that saved"
                    " it, or remove the option from its config.json"
                )
        values: dict[str, Any] = {
            name: coerce(value, hints[name], f"routing.{name}") for name, value in options.items()
        }
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """The routing of one layer's tokens."""

    router_logits: Float[Tensor, "tokens experts"]
    """The router's float32 logits with its graph, without the selection bias."""
    scores: Float[Tensor, "tokens experts"]
    """The numbers that a budget compares with its threshold; infinite for the token's first choice
    and for shared experts."""
    active: Bool[Tensor, "tokens experts"]
    weights: Float[Tensor, "tokens experts"]
    """Routing weights with the graph of the weighting, 0 where inactive."""

    def detach(self) -> "Routing":
        """Return the routing without its graph."""
        return replace(
            self, router_logits=self.router_logits.detach(), weights=self.weights.detach()
        )


class Router(nn.Module):
    """The router of one layer, which scores the experts and selects.

    Parameters: `weight` (E, D) and `bias` (E), a linear map to one logit per expert. The bias is
    each expert's own threshold: without it a gate cannot say that an expert is useful for every
    token. With `top_any` they are prototypes and thresholds, and there is a `log_temperature`.

    Buffers, all of them in checkpoints:
        threshold, settled: the budget's threshold in training, and at evaluation.
        correction: the relative amount that the budget's integral control adds to the target.
        num_updates: the number of times that the budget was steered.
        selection_bias: added to the logits for selection, not for weights or the SMK loss.
        threshold_table: thresholds for a mean k of 1 ... E, measured when training ends; 0 before.
        unused_steps: number of steps since each expert was last used.
        window_loads, idle_input: with `top_any`, each expert's tokens in a window of steps, and the
            sum of the inputs that activated no expert.

    Two attributes change only within `temporary_rules`: `rule`, and `annealing`, which says whether
    thresholds move all the way (`thresholds.update_thresholds`). `follows` holds the call's
    sequences and the layer's number while the budget follows them (`sequence_budget.py`).
    """

    def __init__(self, hidden_dim: int, num_experts: int, rule: RoutingRule) -> None:
        super().__init__()
        self.rule = rule
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_dim))
        self.bias = nn.Parameter(torch.empty(num_experts))
        self.threshold = nn.Buffer(torch.empty(()))
        self.settled = nn.Buffer(torch.empty(()))
        self.correction = nn.Buffer(torch.empty(()))
        self.num_updates = nn.Buffer(torch.empty(()))
        self.selection_bias = nn.Buffer(torch.empty(num_experts))
        self.unused_steps = nn.Buffer(torch.empty(num_experts))
        self.threshold_table = nn.Buffer(torch.empty(num_experts))
        if rule.selection == "top_any":
            self.log_temperature = nn.Parameter(torch.empty(1))
            self.window_loads = nn.Buffer(torch.empty(num_experts))
            self.idle_input = nn.Buffer(torch.empty(hidden_dim))
        self.annealing = False
        self.follows: tuple[Sequences, int] | None = None
        self.reset(None)

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None, std: float = 0.02) -> None:
        """Set the gate to zero, or to random weights if a generator is given; reset all buffers.

        Random weights are normal with standard deviation `std`, or for `top_any` orthogonal
        prototypes. A budget's thresholds are set to those of a flat gate, all other buffers to 0.
        """
        num_experts, hidden_dim = self.weight.shape
        if generator is None:
            self.weight.zero_()
        elif self.rule.selection == "top_any":
            self.weight.copy_(dynmoe.orthogonal_prototypes(num_experts, hidden_dim, generator))
        else:
            self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * std)
        self.bias.zero_()
        for buffer in self.buffers():
            buffer.zero_()
        if self.rule.selection == "top_any":
            self.log_temperature.fill_(dynmoe.START_LOG_TEMPERATURE)
        num_routed = num_experts - self.rule.num_shared
        rank = self.rule.target_k - self.rule.num_shared - 0.5
        share = 1 - rank / num_routed
        tied = (1 - rank * TIE_BREAK) / num_routed
        self.threshold.fill_(share if self.rule.budget_form == "cumulative" else tied)
        self.settled.copy_(self.threshold)

    @without_autocast
    def forward(
        self,
        x_TD: Float[Tensor, "tokens hidden"],
        given_TE: Float[Tensor, "tokens experts"] | None = None,
        *,
        exploration: Exploration | None = None,
    ) -> Routing:
        """Return the routing of every token, by the gate's logits or by those that are given.

        `exploration` says which tokens try another expert, in training mode; None: no token does.
        """
        if self.rule.selection == "top_any":
            return self._top_any(x_TD.float())
        logits_TE = given_TE
        if logits_TE is None:
            logits_TE = F.linear(x_TD.float(), self.weight.float(), self.bias.float())
        threshold = self.threshold if self.training else self.settled
        exploration = exploration if self.training else None
        if self.follows is not None and not self.training and self.rule.has_budget:
            scores_TE = route(logits_TE, self.rule, threshold, self.selection_bias).scores
            sequences, layer = self.follows
            least, table_E = self.rule.num_shared + 1, self.threshold_table
            target_k = sequences.scaled(self.rule.target_k, least, len(table_E))
            threshold = sequences.thresholds(layer, scores_TE, table_E, target_k)
        return route(logits_TE, self.rule, threshold, self.selection_bias, exploration)

    def _top_any(self, x_TD: Float[Tensor, "tokens hidden"]) -> Routing:
        similarity_TE = dynmoe.similarity(x_TD, self.weight.float())
        tau, thresholds_E = dynmoe.temperature(self.log_temperature.float()), self.bias.float()
        logits_TE = tau * (similarity_TE - thresholds_E)
        selecting_TE = logits_TE.detach() + self.selection_bias
        always = self.rule.at_least_one == "always" or not self.training
        active_TE = dynmoe.activate(similarity_TE.detach(), selecting_TE, at_least_one=always)
        weights_TE = dynmoe.straight_weights(
            similarity_TE, thresholds_E, tau, active_TE, mean=self.rule.weighting == "mean"
        )
        return Routing(
            router_logits=logits_TE, scores=selecting_TE, active=active_TE, weights=weights_TE
        )

    @torch.no_grad()
    @without_autocast
    def record(
        self,
        x_TD: Float[Tensor, "tokens hidden"],
        routing: Routing,
        token_mask_T: Bool[Tensor, " tokens"],
    ) -> None:
        """Add to a `top_any` window: each expert's tokens, and the inputs that passed none."""
        passed_TE = (routing.scores > 0) & token_mask_T[:, None]
        idle_T = ~passed_TE.any(-1) & token_mask_T
        self.window_loads += passed_TE.sum(0)
        self.idle_input += idle_T.float() @ x_TD.float()

    @property
    def has_table(self) -> bool:
        """True if the thresholds of all budgets were measured: such a table ends at -1, not 0."""
        return bool(self.threshold_table[-1] != 0)

    @torch.no_grad()
    def set_budget(self, budget: float) -> None:
        """Use `budget` experts a token, S + 1 to E: exactly, or on average by measured thresholds.

        Between whole numbers the threshold is interpolated.

        Raises:
            UserError: the thresholds were never measured.
        """
        if self.rule.has_budget and not self.has_table:
            raise UserError(
                "--budget: got a student without measured thresholds (from the middle of its run),"
                " expected a finished one; take the run's newest, or finish it with `tiny-onn"
                " distill --resume --out RUN`, which measures them"
            )
        self.rule = replace(self.rule, target_k=float(budget))
        if self.rule.has_budget:
            self.settled.copy_(self.table_threshold())

    def table_threshold(self) -> Float[Tensor, ""]:
        """Return the table's threshold for the rule's budget, interpolated between whole ones."""
        below, above = math.floor(self.rule.target_k), math.ceil(self.rule.target_k)
        low, high = self.threshold_table[below - 1], self.threshold_table[above - 1]
        return low + (self.rule.target_k - below) * (high - low)


def follow_sequences(routers: Sequence[Router], sequences: Sequences | None) -> None:
    """Let routers follow the sequences of a call, or none, in evaluation mode.

    Raises:
        UserError: their thresholds were never measured.
    """
    if sequences is not None and not routers[0].has_table:
        raise UserError(UNMEASURED)
    for layer, router in enumerate(routers):
        router.follows = None if sequences is None else (sequences, layer)


@contextmanager
def temporary_rules(
    routers: Sequence[Router], rules: Sequence[RoutingRule], *, annealing: bool = False
) -> Iterator[None]:
    """Give each router a temporary rule within the context, and its own rule again afterwards.

    Args:
        routers: The routers.
        rules: A temporary rule for each router.
        annealing: Whether steering moves thresholds all the way to the last batch's.
    """
    before = [(router.rule, router.annealing) for router in routers]
    try:
        for router, rule in zip(routers, rules, strict=True):
            router.rule, router.annealing = rule, annealing
        yield
    finally:
        for router, (rule, was_annealing) in zip(routers, before, strict=True):
            router.rule, router.annealing = rule, was_annealing


@without_autocast
def route(
    logits_TE: Float[Tensor, "tokens experts"],
    rule: RoutingRule,
    threshold: Float[Tensor, ""] | Float[Tensor, "tokens 1"],
    selection_bias_E: Float[Tensor, " experts"] | None = None,
    exploration: Exploration | None = None,
) -> Routing:
    """Apply a rule to float32 logits.

    A `budget` in its cumulative form activates experts by falling probability until their sum
    passes p: an expert's score is the probability mass from its rank on (1 minus the mass before
    it), and the threshold is 1 - p. In its threshold form the score is the probability, and equal
    ones are ordered by expert. The token's first choice is always active.
    `top_k`, `static`, `random` and `oracle` activate the `target_k` largest logits (for the
    controls the logits come from a frozen gate, or from the experts). Weights of `top_k` with
    softmax weighting are the active probabilities, renormalised to sum to 1 (Mixtral, arXiv
    2401.04088, section 2.1; Qwen3-MoE). The selection bias is added to the logits that select;
    weights do not depend on it.
    All of this concerns the routed experts: shared experts have no probability, are active at
    weight 1, and their number is part of `target_k`.
    """
    num_shared = rule.num_shared
    routed_TR = routed(logits_TE, num_shared)
    selecting_TR = routed_TR.detach()
    if selection_bias_E is not None:
        selecting_TR = selecting_TR + routed(selection_bias_E, num_shared)
    order_TR = selecting_TR.argsort(dim=-1, descending=True, stable=True)
    if rule.has_budget:
        scores_TR = budget_scores(selecting_TR.softmax(-1), order_TR, rule.budget_form)
        active_TR = scores_TR > threshold
    else:
        scores_TR = selecting_TR
        active_TR = torch.zeros_like(scores_TR, dtype=torch.bool)
        active_TR.scatter_(-1, order_TR[:, : round(rule.target_k) - num_shared], True)
    if exploration is not None:
        active_TR = explore(active_TR, selecting_TR, exploration)
    margin_TR = None
    if rule.uses_margins:
        bias_R = 0.0 if selection_bias_E is None else routed(selection_bias_E, num_shared)
        margin_TR = margins(routed_TR + bias_R, threshold)
    weights_TR = routing_weights(
        routed_TR, active_TR, rule.weighting, rule.straight_through, margin_TR
    )
    return Routing(
        router_logits=logits_TE,
        scores=with_shared(scores_TR, num_shared, math.inf),
        active=with_shared(active_TR, num_shared, value=True),
        weights=with_shared(weights_TR, num_shared, 1.0),
    )


def budget_scores(
    probs_TE: Float[Tensor, "tokens experts"],
    order_TE: Tensor,
    form: Literal["cumulative", "threshold"],
) -> Float[Tensor, "tokens experts"]:
    """Return the scores to compare with a threshold; infinite for the token's first choice."""
    sorted_TE = probs_TE.gather(-1, order_TE)
    if form == "cumulative":
        # The sum starts at the small end: 1 - mass would round a sharp gate's later ranks to a tie
        # at 0. A product computes it, since torch's cumsum on a GPU does not repeat bit for bit.
        E = probs_TE.shape[-1]
        ranked_TE = sorted_TE @ sorted_TE.new_ones(E, E).tril()
    else:
        rank_E = torch.arange(probs_TE.shape[-1], device=probs_TE.device)
        ranked_TE = sorted_TE * (1 - rank_E * TIE_BREAK)
    if torch.are_deterministic_algorithms_enabled() and probs_TE.is_cuda:
        # Here a scatter would sort all indices of the table and take three times as long.
        rank_TE = order_TE.argsort(dim=-1)
        return ranked_TE.gather(-1, rank_TE).masked_fill_(rank_TE == 0, float("inf"))
    scores_TE = torch.empty_like(probs_TE).scatter_(-1, order_TE, ranked_TE)
    return scores_TE.scatter_(-1, order_TE[:, :1], float("inf"))
