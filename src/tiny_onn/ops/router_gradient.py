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
from tiny_onn.ops.regions import region_of, squared_norm_region, wide
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

# The kinds that read the norms of the layer's input and of the gradient at its output.
NORMED = ("parameters", "output", "relative")


class SurpriseTally(NamedTuple):
    """What one layer's backward passes saw, summed on the device; `read` when logging."""

    counts_4: Tensor
    """`num_tokens`, `num_targets`, `num_agree` and `chance`."""
    sums_4E: Tensor
    """`surprise_E`, `active_surprise_E`, `pick_E` and `target_E`."""

    @staticmethod
    def of_layers(num_layers: int, num_experts: int, device: torch.device) -> list["SurpriseTally"]:
        """Empty tallies, in two allocations."""
        counts_L4 = torch.zeros(num_layers, 4, device=device)
        sums_L4E = torch.zeros(num_layers, 4, num_experts, device=device)
        return [SurpriseTally(*pair) for pair in zip(counts_L4, sums_L4E, strict=True)]

    @staticmethod
    def read(tallies: Sequence["SurpriseTally"]) -> list["SurpriseTally"]:
        """The same on the CPU: a GPU is waited for twice, not for every number."""
        if not tallies:
            return []
        parts = (torch.stack(part).cpu() for part in zip(*tallies, strict=True))
        return [SurpriseTally(*pair) for pair in zip(*parts, strict=True)]

    @property
    def num_tokens(self) -> Tensor:
        """Tokens that count (not masked)."""
        return self.counts_4[0]

    @property
    def num_targets(self) -> Tensor:
        """Of these, tokens whose surprise gave a target."""
        return self.counts_4[1]

    @property
    def num_agree(self) -> Tensor:
        """Of these, tokens whose largest candidate logit is at a target."""
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
        """The same over those of them that activated the expert."""
        return self.sums_4E[1]

    @property
    def pick_E(self) -> Tensor:  # noqa: N802
        """Tokens with a target whose largest candidate logit is the expert's."""
        return self.sums_4E[2]

    @property
    def target_E(self) -> Tensor:  # noqa: N802
        """Tokens whose target includes the expert."""
        return self.sums_4E[3]

    def shuffled_agreements(self) -> float:
        """How many tokens' largest candidate logit is at the target of another token, on average.

        Over all other tokens with a target, each as likely: what targets agree with by their
        frequencies alone. Of N tokens, pairs of pick and target meet `pick . target` times, of
        which `num_agree` are tokens with themselves, in N - 1 pairs each.
        """
        pairs = float(self.pick_E.double() @ self.target_E.double())
        return (pairs - float(self.num_agree)) / max(1.0, float(self.num_targets) - 1)


@dataclass(kw_only=True, slots=True)
class SmkStep:
    """What the backward pass needs to teach the gate."""

    rule: SmkRule
    """Which surprise points where."""
    grad_scale: float
    """The gate's gradient is `(softmax - target) * grad_scale`: coefficient / the step's tokens."""
    loss_scale: float = 1.0
    """Surprise is multiplied by it: the divisor of the loss, so that surprise is free of it."""
    tally: SurpriseTally | None = None
    """Where statistics go."""
    capture: list[Tensor] | None = field(default=None, repr=False)
    """Where whole (tokens, experts) surprise tensors go, for probing; None: nowhere."""
    num_shared: int = 0
    """Experts, the first ones, that the gate does not choose: no candidates, no gradient."""
    lesson_shift: int = 0
    """The `shift` of `lesson_tokens` for a rule that samples them."""

    def lesson_mask(self, num_tokens: int, device: torch.device) -> Bool[Tensor, " tokens"] | None:
        """Return the tokens whose candidates are all experts; None: all tokens are alike."""
        if not self.rule.samples_lesson:
            return None
        return lesson_tokens(num_tokens, self.rule.lesson_share, self.lesson_shift, device)

    def num_lesson_tokens(self, num_tokens: int) -> int:
        """Return how many tokens have all experts as candidates, where the rule's are `all`."""
        if not self.rule.samples_lesson:
            return num_tokens
        return num_lesson_tokens(num_tokens, self.rule.lesson_share, self.lesson_shift)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """What every surprise but the Gram ones is made of, at unit routing weight, in float32.

    Whole (T, E) tables, or one column of active pairs.
    """

    x_sq_T1: Tensor
    """Squared norm of the input; see `squared_norms`."""
    grad_y_sq_T1: Tensor
    """Squared norm of the gradient at the layer's output."""
    pre_sq_TE: Tensor
    """Squared gradients of gate and up pre-activations."""
    hidden_sq_TE: Tensor
    """Squared hidden activations."""
    dot_TE: Tensor
    """Hidden activations times their gradient, `<grad_y, expert(x)>`."""


def squared_norms(
    kind: Surprise,
    x_TD: Float[Tensor, "tokens hidden"],
    grad_y_TD: Float[Tensor, "tokens hidden"],
    *,
    compiled: bool,
) -> tuple[Float[Tensor, "tokens 1"], Float[Tensor, "tokens 1"]]:
    """Both tensors' squared norms by token, or zeros for a kind that reads neither.

    They are two passes over (T, D), which cost a GPU a tenth of the layer.
    """
    if kind not in NORMED:
        zeros_T1 = wide(x_TD.new_zeros(len(x_TD), 1))
        return zeros_T1, zeros_T1
    norm = region_of(squared_norm_region, compiled=compiled)
    return norm(x_TD.detach()), norm(grad_y_TD.detach())


def closed_form(kind: Surprise, sums: Sums) -> Float[Tensor, "tokens experts"]:
    """`reference.surprise` of a kind that needs no Gram matrix (not `input`, not `magnitude`).

    A token's gradient of a linear map is an outer product, whose norm is the product of two vector
    norms. Source: Goodfellow, "Efficient Per-Example Gradient Computations", arXiv 1510.01799.
    """
    if kind == "gain":
        return -sums.dot_TE
    if kind == "output":
        return sums.grad_y_sq_T1.sqrt().expand_as(sums.dot_TE)
    squared_TE = sums.x_sq_T1 * sums.pre_sq_TE + sums.hidden_sq_TE * sums.grad_y_sq_T1
    if kind == "relative":
        ratio_TE = squared_TE / sums.hidden_sq_TE
        return torch.where(sums.hidden_sq_TE > 0, ratio_TE, 0).sqrt()
    return squared_TE.sqrt()


class Lesson(NamedTuple):
    """What one layer's surprise says: the gate's gradient, and what a `SurpriseTally` adds up."""

    grad_TE: Tensor
    counts_4: Tensor
    sums_4E: Tensor


def teach(  # noqa: PLR0917
    smk: SmkStep,
    surprise_TE: Tensor,
    weights_TE: Tensor,
    logits_TE: Tensor,
    active_TE: Tensor,
    token_mask_T: Tensor,
    *,
    compiled: bool = False,
) -> Float[Tensor, "tokens experts"]:
    """The SMK gradient of the router logits, from surprise at unit weight; fills the tally.

    Surprise is multiplied by the loss' divisor and, where only active experts are candidates, by
    the routing weight. `compiled` fuses some forty small operations, on a GPU alone.

    Where the rule samples its lesson, the gradient is that of its tokens with all experts as
    candidates plus that of the other tokens with their active ones, each as if the tokens of the
    other kind were masked.
    """
    routing = (surprise_TE, weights_TE, logits_TE, active_TE)
    lesson_T = smk.lesson_mask(len(surprise_TE), surprise_TE.device)
    if lesson_T is None:
        return _teach(smk, *routing, token_mask_T, compiled=compiled)
    sampled_TE = _teach(smk, *routing, token_mask_T & lesson_T, compiled=compiled)
    others = replace(smk, rule=replace(smk.rule, candidates="active"), capture=None)
    return sampled_TE + _teach(others, *routing, token_mask_T & ~lesson_T, compiled=compiled)


def _teach(  # noqa: PLR0917
    smk: SmkStep,
    surprise_TE: Tensor,
    weights_TE: Tensor,
    logits_TE: Tensor,
    active_TE: Tensor,
    token_mask_T: Tensor,
    *,
    compiled: bool,
) -> Float[Tensor, "tokens experts"]:
    if smk.rule.surprise != "magnitude":
        surprise_TE = surprise_TE * smk.loss_scale
    if smk.rule.candidates == "active":
        surprise_TE = surprise_TE * weights_TE
    if smk.capture is not None:
        smk.capture.append(surprise_TE)
    region = region_of(lesson_region, compiled=compiled and surprise_TE.is_cuda)
    S = smk.num_shared
    tables = (routed(table_TE, S) for table_TE in (surprise_TE, logits_TE, active_TE))
    lesson: Lesson = region(smk.rule, *tables, token_mask_T)
    if smk.tally is not None:
        smk.tally.counts_4.add_(lesson.counts_4)
        smk.tally.sums_4E[:, S:].add_(lesson.sums_4E)
        if S:
            # Always active: what they surprise by, they surprise by as active ones.
            shared_S = torch.where(token_mask_T[:, None], surprise_TE[:, :S], 0).sum(0)
            smk.tally.sums_4E[:2, :S] += shared_S
    return with_shared((lesson.grad_TE * smk.grad_scale).to(logits_TE.dtype), S, 0.0)


def lesson_region(
    rule: SmkRule, surprise_TE: Tensor, logits_TE: Tensor, active_TE: Tensor, token_mask_T: Tensor
) -> Lesson:
    """Targets from surprise, their gradient at the logits, and the counts: to compile."""
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
    return Lesson(
        grad_TE=grad_TE,
        counts_4=torch.stack([count.to(dtype) for count in counts]),
        sums_4E=torch.stack([sum_E.to(dtype) for sum_E in sums]),
    )
