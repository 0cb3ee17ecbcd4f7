"""From surprise to the gate's gradient inside a backward pass, shared by the expert layer's paths.

Legend: T tokens, E experts, S of them shared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn.config.schema import Surprise
from tiny_onn.ops.regions import region_of, squared_norm_region, to_math_dtype
from tiny_onn.ops.shared_experts import routed, with_shared
from tiny_onn.ops.surprise import (
    SmkRule,
    label_logits_grad,
    lesson_tokens,
    num_lesson_tokens,
    regression_grad,
    smk_logits_grad,
    smk_targets,
)

# These kinds read the norms of the layer's input and of the gradient at its output.
NORMED = ("parameters", "output", "relative")
# These kinds need a Gram matrix of each expert's weights.
GRAM_KINDS = ("input", "magnitude")


class SurpriseTally(NamedTuple):
    """Sums over one layer's backward passes, kept on the device until `read` fetches them."""

    counts_4: Tensor
    """`num_tokens`, `num_targets`, `num_agree` and `chance`."""
    sums_4E: Tensor
    """`surprise_E`, `active_surprise_E`, `pick_E` and `target_E`."""

    @staticmethod
    def of_layers(num_layers: int, num_experts: int, device: torch.device) -> list["SurpriseTally"]:
        """Return a tally of zeros for each layer, all in two allocations."""
        counts_L4 = torch.zeros(num_layers, 4, device=device)
        sums_L4E = torch.zeros(num_layers, 4, num_experts, device=device)
        return [SurpriseTally(*pair) for pair in zip(counts_L4, sums_L4E, strict=True)]

    @staticmethod
    def read(tallies: Sequence["SurpriseTally"]) -> list["SurpriseTally"]:
        """Return the tallies on the CPU; the device is waited for twice, not at every number."""
        if not tallies:
            return []
        parts = (torch.stack(part).cpu() for part in zip(*tallies, strict=True))
        return [SurpriseTally(*pair) for pair in zip(*parts, strict=True)]

    @property
    def num_tokens(self) -> Tensor:
        """Number of tokens that count (those not masked)."""
        return self.counts_4[0]

    @property
    def num_targets(self) -> Tensor:
        """Number of counted tokens whose surprise gave a target."""
        return self.counts_4[1]

    @property
    def num_agree(self) -> Tensor:
        """Number of tokens with a target whose largest candidate logit is at one."""
        return self.counts_4[2]

    @property
    def chance(self) -> Tensor:
        """Sum over tokens with a target of the agreement expected from a random candidate."""
        return self.counts_4[3]

    @property
    def surprise_E(self) -> Tensor:  # noqa: N802
        """Sum over counted tokens of each expert's surprise, in units of the per-token loss.

        Tokens outside the lesson (`SmkRule.lesson_share`) add that of their active experts.
        """
        return self.sums_4E[0]

    @property
    def active_surprise_E(self) -> Tensor:  # noqa: N802
        """Sum of each expert's surprise over the counted tokens that activated the expert."""
        return self.sums_4E[1]

    @property
    def pick_E(self) -> Tensor:  # noqa: N802
        """Number of tokens with a target whose largest candidate logit is the expert's."""
        return self.sums_4E[2]

    @property
    def target_E(self) -> Tensor:  # noqa: N802
        """Number of tokens whose target includes the expert."""
        return self.sums_4E[3]

    def shuffled_agreements(self) -> float:
        """Return the agreements to expect if tokens exchanged their targets at random.

        The agreement that remains comes from the experts' frequencies alone. A token's pick (its
        largest candidate logit) is compared with the target of every other token that has one.
        Among all pairs of N tokens, pick and target meet `pick . target` times; `num_agree` of
        these pair a token with itself; the rest is divided by the N - 1 partners of a token.
        """
        pairs = float(self.pick_E.double() @ self.target_E.double())
        return (pairs - float(self.num_agree)) / max(1.0, float(self.num_targets) - 1)


@dataclass(kw_only=True, slots=True)
class SmkStep:
    """A step's instructions for the router's gradient, which the backward pass computes."""

    rule: SmkRule
    """The rule by which surprise points at targets."""
    grad_scale: float | Tensor
    """Factor of the router's gradient: the loss' coefficient over the tokens of the step."""
    loss_scale: float | Tensor = 1.0
    """Factor of surprise: the number of tokens by which the loss was divided, taken back here."""
    tally: SurpriseTally | None = None
    """Statistics to add to; None: none are kept."""
    capture: list[Tensor] | None = field(default=None, repr=False)
    """List that receives whole (tokens, experts) surprise tensors, for probing; None: none."""
    num_shared: int = 0
    """Number of shared experts: the first ones, which are no candidates and get no gradient."""
    lesson_shift: int | Tensor = 0
    """The `shift` of `lesson_tokens` for a rule that samples them."""
    mean_outputs_ED: Tensor | None = field(default=None, repr=False)
    """The mean outputs that stand in for inactive experts, for a gain that counts what an active
    expert takes away with its own; None: the gain is that of the expert's output alone."""

    def lesson_mask(self, num_tokens: int, device: torch.device) -> Bool[Tensor, " tokens"] | None:
        """Return the tokens whose candidates are all experts; None: all tokens are alike."""
        if not self.rule.samples_lesson:
            return None
        return lesson_tokens(num_tokens, self.rule.lesson_share, self.lesson_shift, device)

    def num_lesson_tokens(self, num_tokens: int) -> int | None:
        """Return how many tokens have all experts as candidates, where the rule's are `all`.

        Returns:
            The number; None if it depends on a shift that is a tensor.
        """
        if not self.rule.samples_lesson:
            return num_tokens
        return num_lesson_tokens(num_tokens, self.rule.lesson_share, self.lesson_shift)


@dataclass(frozen=True, kw_only=True, slots=True)
class SurpriseTerms:
    """The terms of every surprise that needs no Gram matrix, at unit routing weight, in float32.

    The tables are whole (T, E), or they have one row per active pair and a single column.
    """

    x_sq_T1: Tensor
    """Squared norm of the input; see `squared_norms`."""
    grad_y_sq_T1: Tensor
    """Squared norm of the gradient at the layer's output."""
    pre_sq_TE: Tensor
    """Sum over neurons of the squared gradients at the gate and up pre-activations."""
    hidden_sq_TE: Tensor
    """Sum over neurons of the squared hidden activations."""
    dot_TE: Tensor
    """Sum of hidden activations times their gradients, `<grad_y, expert(x)>`."""


def routing_masks(
    weights_TE: Float[Tensor, "tokens experts"],
    active_TE: Bool[Tensor, "tokens experts"] | None,
    token_mask_T: Bool[Tensor, " tokens"] | None,
) -> tuple[Bool[Tensor, "tokens experts"], Bool[Tensor, " tokens"]]:
    """Return active experts and counted tokens; None means nonzero weights, and all tokens."""
    if active_TE is None:
        active_TE = weights_TE != 0
    if token_mask_T is None:
        token_mask_T = torch.ones(len(weights_TE), dtype=torch.bool, device=weights_TE.device)
    return active_TE, token_mask_T


def squared_norms(
    kind: Surprise,
    x_TD: Float[Tensor, "tokens hidden"],
    grad_y_TD: Float[Tensor, "tokens hidden"],
    *,
    compiled: bool,
) -> tuple[Float[Tensor, "tokens 1"], Float[Tensor, "tokens 1"]]:
    """Return both tensors' squared norms by token, or zeros for a kind that reads neither.

    Passes over (T, D) that nothing needs are skipped: two cost a GPU a tenth of the layer's time.
    """
    if kind not in NORMED:
        zeros_T1 = to_math_dtype(x_TD.new_zeros(len(x_TD), 1))
        return zeros_T1, zeros_T1
    norm = region_of(squared_norm_region, compiled=compiled)
    return norm(x_TD.detach()), norm(grad_y_TD.detach())


def closed_form_surprise(kind: Surprise, terms: SurpriseTerms) -> Float[Tensor, "tokens experts"]:
    """Return `reference.surprise` of a kind that needs no Gram matrix (see `GRAM_KINDS`).

    A token's gradient of a linear map is an outer product, whose norm is the product of two vector
    norms. Source: Goodfellow, "Efficient Per-Example Gradient Computations", arXiv 1510.01799.
    """
    if kind == "gain":
        return -terms.dot_TE
    if kind == "output":
        return terms.grad_y_sq_T1.sqrt().expand_as(terms.dot_TE)
    squared_TE = terms.x_sq_T1 * terms.pre_sq_TE + terms.hidden_sq_TE * terms.grad_y_sq_T1
    if kind == "relative":
        ratio_TE = squared_TE / terms.hidden_sq_TE
        return torch.where(terms.hidden_sq_TE > 0, ratio_TE, 0).sqrt()
    return squared_TE.sqrt()


class SmkUpdate(NamedTuple):
    """The router's gradient in one layer, and the addends of its `SurpriseTally`."""

    grad_TE: Tensor
    counts_4: Tensor
    sums_4E: Tensor


class RoutingTables(NamedTuple):
    """The routing of a layer's tokens, as far as the router's gradient depends on it."""

    weights_TE: Float[Tensor, "tokens experts"]
    """Routing weights, 0 where inactive."""
    logits_TE: Float[Tensor, "tokens experts"]
    """The router's logits."""
    active_TE: Bool[Tensor, "tokens experts"]
    token_mask_T: Bool[Tensor, " tokens"]
    """Tokens that count in targets and statistics."""


def router_gradient(
    smk: SmkStep,
    surprise_TE: Float[Tensor, "tokens experts"],
    routing: RoutingTables,
    *,
    compiled: bool = False,
) -> Float[Tensor, "tokens experts"]:
    """Return the gradient of the SMK loss at the router's logits, and add to the tally.

    Where the rule samples its lesson, the gradient is that of the sampled tokens with all experts
    as candidates plus that of the other tokens with their active ones, each as if the tokens of the
    other kind were masked.

    Args:
        smk: how the router is taught in this step.
        surprise_TE: surprise at unit routing weight. It is multiplied by the loss' divisor and,
            where only active experts are candidates, by the routing weight.
        routing: the layer's routing.
        compiled: whether some forty small operations are fused, which happens on a GPU alone.
    """
    lesson_T = smk.lesson_mask(len(surprise_TE), surprise_TE.device)
    if lesson_T is None:
        return _masked_gradient(smk, surprise_TE, routing, compiled=compiled)
    mask_T = routing.token_mask_T
    sampled = routing._replace(token_mask_T=mask_T & lesson_T)
    sampled_TE = _masked_gradient(smk, surprise_TE, sampled, compiled=compiled)
    others = replace(smk, rule=replace(smk.rule, candidates="active"), capture=None)
    rest = routing._replace(token_mask_T=mask_T & ~lesson_T)
    return sampled_TE + _masked_gradient(others, surprise_TE, rest, compiled=compiled)


def _masked_gradient(
    smk: SmkStep,
    surprise_TE: Tensor,
    routing: RoutingTables,
    *,
    compiled: bool,
) -> Float[Tensor, "tokens experts"]:
    weights_TE, logits_TE, active_TE, token_mask_T = routing
    if smk.rule.surprise != "magnitude":
        surprise_TE = surprise_TE * smk.loss_scale
    if smk.rule.candidates == "active":
        surprise_TE = surprise_TE * weights_TE
    if smk.capture is not None:
        smk.capture.append(surprise_TE)
    region = region_of(smk_update_region, compiled=compiled and surprise_TE.is_cuda)
    S = smk.num_shared
    tables = (routed(table_TE, S) for table_TE in (surprise_TE, logits_TE, active_TE))
    update: SmkUpdate = region(smk.rule, *tables, token_mask_T)
    if smk.tally is not None:
        smk.tally.counts_4.add_(update.counts_4)
        smk.tally.sums_4E[:, S:].add_(update.sums_4E)
        if S:
            # Shared experts are always active, so both sums (of all counted tokens and of those
            # that activated the expert) grow by the same value.
            shared_S = torch.where(token_mask_T[:, None], surprise_TE[:, :S], 0).sum(0)
            smk.tally.sums_4E[:2, :S] += shared_S
    return with_shared((update.grad_TE * smk.grad_scale).to(logits_TE.dtype), S, 0.0)


def smk_update_region(
    rule: SmkRule, surprise_TE: Tensor, logits_TE: Tensor, active_TE: Tensor, token_mask_T: Tensor
) -> SmkUpdate:
    """Compute targets from surprise, their gradient at the logits and the counts; to compile."""
    targets_TE = smk_targets(surprise_TE, active_TE, token_mask_T, rule)
    candidates_TE = active_TE if rule.candidates == "active" else torch.ones_like(active_TE)
    pick_T1 = logits_TE.masked_fill(~candidates_TE, float("-inf")).argmax(-1, keepdim=True)
    is_target_TE = targets_TE > 0
    chosen_T, choices_T = is_target_TE.sum(-1), candidates_TE.sum(-1).clamp_min(1)
    experts_E = torch.arange(logits_TE.shape[-1], device=logits_TE.device)
    picked_TE = (experts_E == pick_T1) & (chosen_T > 0)[:, None]
    counted_TE = torch.where(token_mask_T[:, None], surprise_TE, 0)
    if rule.targets in ("regress", "log"):
        grad_TE = regression_grad(logits_TE, surprise_TE, active_TE, token_mask_T, rule)
    elif rule.targets in ("member", "helpful"):
        grad_TE = label_logits_grad(logits_TE, targets_TE, candidates_TE)
    else:
        grad_TE = smk_logits_grad(logits_TE, targets_TE)
    counts = (
        token_mask_T.sum(),
        (chosen_T > 0).sum(),
        (picked_TE & is_target_TE).sum(),
        (chosen_T / choices_T).sum(),
    )
    sums = (
        counted_TE.sum(0),
        torch.where(active_TE, counted_TE, 0).sum(0),
        picked_TE.sum(0),
        is_target_TE.sum(0),
    )
    dtype = surprise_TE.dtype
    return SmkUpdate(
        grad_TE=grad_TE,
        counts_4=torch.stack([count.to(dtype) for count in counts]),
        sums_4E=torch.stack([sum_E.to(dtype) for sum_E in sums]),
    )
