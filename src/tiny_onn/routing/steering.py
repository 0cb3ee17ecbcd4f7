"""Router changes without a gradient: budget thresholds, balance, revival and re-seeding.

All state is in the router's buffers and parameters, so that checkpoints hold it, and changes on the
device without waiting for it. Training alone changes it, except for the thresholds that
`fitted_eval_thresholds` measures for an evaluation.

Legend: T tokens, D hidden, E experts, L layers.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn.config.schema import BudgetScope, RouterConfig
from tiny_onn.data.packing import PackedRow
from tiny_onn.model import dynmoe
from tiny_onn.model.experts import ExpertBank
from tiny_onn.model.router import Router, Routing
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.ops.shared_experts import routed, with_shared
from tiny_onn.parallel import ALONE, World
from tiny_onn.routing.budgets import fit_eval_thresholds
from tiny_onn.routing.thresholds import corrected_targets, exact_thresholds, update_thresholds

# Revival raises an unused expert's selection logit until REVIVED_SHARE of the tokens would choose
# it, by REVIVED_MARGIN.
REVIVED_SHARE = 0.01
REVIVED_MARGIN = 1e-3


class Steering:
    """A step's sums over its rows, and the update of the routers that follows from them.

    Args:
        banks: The layers.
        router: The settings.
        router_tokens: Number of tokens of the step that count, a tensor on a GPU.
        step: Number of steps before this one.
    """

    def __init__(
        self,
        banks: Sequence[ExpertBank],
        router: RouterConfig,
        router_tokens: float | Tensor,
        step: int,
    ) -> None:
        self.banks, self.router, self.step, self._tokens = banks, router, step, router_tokens
        first, L = banks[0].router, len(banks)
        device, E = first.weight.device, first.weight.shape[0]
        self._threshold_L = torch.zeros(L, device=device)
        self._lift_LE = torch.zeros(L, E, device=device)
        self._scores: list[Tensor] = []
        # Rows add to a window in their forward pass; `undo` takes that back.
        self._windows = [
            (bank.router.window_loads.clone(), bank.router.idle_input.clone())
            for bank in banks
            if router.reseed_every_steps
        ]

    @torch.no_grad()
    def observe(
        self,
        routings: Sequence[Routing],
        token_mask_T: Bool[Tensor, " tokens"],
        first_layer: int = 0,
    ) -> None:
        """Record how some layers, from `first_layer` on, routed a row.

        With revival that is what unused experts lack to be chosen; with a budget it is the
        thresholds that would have met its target.
        """
        layers = slice(first_layer, first_layer + len(routings))
        if self.router.revive_after_steps:
            pairs = zip(self.banks[layers], routings, strict=True)
            lifts = [revival_lift(bank.router, routing, token_mask_T) for bank, routing in pairs]
            self._lift_LE[layers] = torch.stack(lifts)
        if not self.banks[0].router.rule.has_budget:
            return
        scores = [routing.scores for routing in routings]
        if self.router.budget_scope == "global":
            # The layers share one threshold, which needs the scores of all of them.
            self._scores += scores
            if len(self._scores) < len(self.banks):
                return
            scores, self._scores, layers = self._scores, [], slice(None)
        targets_L = corrected_targets([bank.router for bank in self.banks[layers]])
        thresholds_L = exact_thresholds(scores, token_mask_T, targets_L, self.router.budget_scope)
        self._threshold_L[layers] += token_mask_T.sum() / self._tokens * thresholds_L

    @torch.no_grad()
    def add(self, row: "Steering") -> None:
        """Add what another instance observed of a row, all of its layers."""
        self._threshold_L += row._threshold_L
        self._lift_LE.copy_(row._lift_LE)

    @torch.no_grad()
    def sums(self, world: World) -> list[Tensor]:
        """Return what is a sum over several processes; add up their windows of re-seeding at once.

        The lifts are those of the step's last row, which the last process has.
        """
        if world.rank < world.size - 1:
            self._lift_LE.zero_()
        if self._windows:
            windows = [(b.router.window_loads, b.router.idle_input) for b in self.banks]
            pairs = [
                pair
                for now, before in zip(windows, self._windows, strict=True)
                for pair in zip(now, before, strict=True)
            ]
            added = [now - before for now, before in pairs]
            world.all_reduce_sum(added)
            for (now, before), sum_of_all in zip(pairs, added, strict=True):
                now.copy_(before + sum_of_all)
        return [self._threshold_L, self._lift_LE]

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the routers' state from before the step."""
        for bank, (loads_E, idle_D) in zip(self.banks, self._windows, strict=False):
            bank.router.window_loads.copy_(loads_E)
            bank.router.idle_input.copy_(idle_D)

    @torch.no_grad()
    def update(self, load_LE: Float[Tensor, "layers experts"]) -> None:
        """Update the routers, after the optimizer.

        Args:
            load_LE: Number of counted tokens of the step that activated each expert.
        """
        mean_k_L = load_LE.sum(-1) / self._tokens
        if self.router.budget_scope == "global":
            mean_k_L = mean_k_L.mean().expand_as(mean_k_L)
        routers = [bank.router for bank in self.banks]
        if routers[0].rule.has_budget:
            update_thresholds(routers, self._threshold_L, self.router.budget_rate, mean_k_L)
        for router, load_E, lift_E in zip(routers, load_LE, self._lift_LE, strict=True):
            if self.router.balance_rate:
                balance(router, load_E, self.router.balance_rate)
            if self.router.revive_after_steps:
                revive(router, load_E, lift_E, self.router.revive_after_steps)
            every = self.router.reseed_every_steps
            if every and (self.step + 1) % every == 0:
                reseed(router)


def balance(router: Router, load_E: Float[Tensor, " experts"], rate: float) -> None:
    """Raise the selection bias of experts used less than the mean by `rate`, lower the others'.

    `b_e += rate * sign(mean load - load_e)`, and then b is centred, so that it changes which
    experts are active and not how many. Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2, which
    adds b to sigmoid affinities; it is added to the logits here, because all selections have them.
    """
    S = router.rule.num_shared
    load_R = routed(load_E, S)
    bias_R = routed(router.selection_bias, S) + rate * torch.sign(load_R.mean() - load_R)
    router.selection_bias.copy_(with_shared(bias_R - bias_R.mean(), S, 0.0))


def revival_lift(
    router: Router, routing: Routing, token_mask_T: Bool[Tensor, " tokens"]
) -> Float[Tensor, " experts"]:
    """Return how much each expert's selection logit lacks for 1 % of the counted tokens.

    A token chooses an expert whose logit reaches the lowest one among its active experts, or 0 with
    `top_any`. The 1 % are at least one token. The result is 0 for experts that are shared or are
    chosen that often already, and where no token counts.
    """
    S = router.rule.num_shared
    logits_TE = routed(routing.router_logits.detach() + router.selection_bias, S)
    cutoff_T1 = logits_TE.masked_fill(~routed(routing.active, S), math.inf).amin(-1, keepdim=True)
    if router.rule.selection == "top_any":
        cutoff_T1 = torch.zeros_like(cutoff_T1)
    lack_TE = torch.where(token_mask_T[:, None], cutoff_T1 - logits_TE, math.inf)
    ranked_TE = lack_TE.sort(dim=0).values
    rank = (token_mask_T.sum() * REVIVED_SHARE).ceil().long().clamp_min(1) - 1
    lack_E = ranked_TE.index_select(0, rank[None])[0] + REVIVED_MARGIN
    return with_shared(torch.where(lack_E.isfinite(), lack_E, 0.0).clamp_min(0.0), S, 0.0)


def revive(
    router: Router,
    load_E: Float[Tensor, " experts"],
    lift_E: Float[Tensor, " experts"],
    after_steps: int,
) -> None:
    """Raise the selection bias of experts that were unused for `after_steps` steps by `lift_E`.

    The bias is not taken back. The gate learns about an expert from the tokens that now reach it.
    """
    router.unused_steps.copy_(torch.where(load_E > 0, 0.0, router.unused_steps + 1))
    due_E = router.unused_steps >= after_steps
    router.selection_bias.add_(torch.where(due_E, lift_E, 0.0))
    router.unused_steps.masked_fill_(due_E, 0.0)


def reseed(router: Router) -> None:
    """Re-seed one unused expert from the recorded window (`dynmoe.reseed`), and begin a new one."""
    weight_ED, bias_E = dynmoe.reseed(
        router.weight, router.bias, router.window_loads, router.idle_input
    )
    router.weight.copy_(weight_ED)
    router.bias.copy_(bias_E)
    router.window_loads.zero_()
    router.idle_input.zero_()


@contextmanager
def fitted_eval_thresholds(
    student: TinyOnnForCausalLM,
    rows: Sequence[PackedRow],
    scope: BudgetScope = "layer",
    world: World = ALONE,
) -> Iterator[None]:
    """Fit the evaluation thresholds for an evaluation in the context; they stay afterwards.

    If an exception ends the evaluation, the thresholds from before are restored, because a later
    fit depends on them.
    """
    routers = [bank.router for bank in student.banks()]
    before, completed = [router.settled.clone() for router in routers], False
    try:
        fit_eval_thresholds(student, rows, scope, world)
        yield
        completed = True
    finally:
        if not completed:
            for router, threshold in zip(routers, before, strict=True):
                router.settled.copy_(threshold)
