"""Matching the teacher's hidden states layer by layer, beside its predictions.

    loss_l = sum_t |s_l[t] - h_l[t]|^2 / sum_t |h_l[t] - mean h_l|^2

h_l is the teacher's residual stream after layer l and s_l the student's: the share of the stream's
variance that the student leaves unexplained. Logits alone tell a layer little about what it should
have added; this tells it directly. Source: SquareHead, arXiv 2310.06927, section 3.1, which divides
by the plain power instead; a few features that are large and hardly vary would then decide it.

Legend: T tokens, D hidden, L layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def unexplained_variance(
    student_states: Sequence[Float[Tensor, "1 tokens hidden"]],
    teacher_states: Sequence[Float[Tensor, "1 tokens hidden"]],
    token_mask_T: Bool[Tensor, " tokens"],
) -> Float[Tensor, " layers"]:
    """Each layer's share of the teacher's variance that the student does not match, float32.

    The tokens are those that count: all but padding and the first of each document. Kept for the
    backward pass are the states themselves, in their own number format, of which a checkpointed
    student's are there anyway.
    """
    counts_T1 = token_mask_T[:, None].float()
    pairs = zip(student_states, teacher_states, strict=True)
    shares = [_UnexplainedVariance.apply(own[0], theirs[0], counts_T1) for own, theirs in pairs]
    return torch.stack(shares)  # pyright: ignore[reportArgumentType]


class _UnexplainedVariance(torch.autograd.Function):
    """One layer's share; float32 copies of the states live within a call."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401 - torch names no type with these attributes
        own_TD: Tensor,
        theirs_TD: Tensor,
        counts_T1: Tensor,
    ) -> Tensor:
        wide_TD = theirs_TD.float()
        mean_D = (wide_TD * counts_T1).sum(0) / counts_T1.sum().clamp_min(1)
        variance = ((wide_TD - mean_D).square() * counts_T1).sum()
        variance = variance.clamp_min(torch.finfo(torch.float32).tiny)
        ctx.save_for_backward(own_TD, theirs_TD, counts_T1, variance)
        return ((own_TD.float() - wide_TD).square() * counts_T1).sum() / variance

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401
        grad: Tensor,
    ) -> tuple[Tensor, None, None]:
        own_TD, theirs_TD, counts_T1, variance = ctx.saved_tensors
        errors_TD = (own_TD.float() - theirs_TD.float()) * counts_T1
        return (errors_TD * (2 * grad / variance)).to(own_TD.dtype), None, None
