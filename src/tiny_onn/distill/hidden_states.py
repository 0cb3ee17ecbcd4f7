"""The loss that matches the teacher's hidden states layer by layer, beside its predictions.

    loss_l = sum_t |s_l[t] - h_l[t]|^2 / sum_t |h_l[t] - mean h_l|^2

h_l is the teacher's residual stream after layer l, and s_l is the student's. The loss is the share
of the stream's variance that the student leaves unexplained. It tells a layer directly what to add
to the stream, which the logits tell only through all later layers. Source: SquareHead, arXiv
2310.06927, section 3.1, which divides by the mean square instead; there a few features that are
large and hardly vary would dominate.

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
    """Return each layer's share of the teacher's variance that the student leaves unexplained.

    The backward pass needs the states themselves, in their own number format; those of a student
    with checkpointed layers are in memory anyway.

    Args:
        student_states: The student's residual stream after each layer.
        teacher_states: The teacher's residual stream after each layer.
        token_mask_T: The tokens that count: all but padding and the first of each document.

    Returns:
        The shares in float32.
    """
    counts_T1 = token_mask_T[:, None].float()
    pairs = zip(student_states, teacher_states, strict=True)
    shares = [
        _UnexplainedVariance.apply(student[0], teacher[0], counts_T1) for student, teacher in pairs
    ]
    return torch.stack(shares)  # pyright: ignore[reportArgumentType]


class _UnexplainedVariance(torch.autograd.Function):
    """The share of one layer, whose float32 copies of the states are in memory in a call only."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401 - torch names no type with these attributes
        student_TD: Tensor,
        teacher_TD: Tensor,
        counts_T1: Tensor,
    ) -> Tensor:
        teacher_float_TD = teacher_TD.float()
        mean_D = (teacher_float_TD * counts_T1).sum(0) / counts_T1.sum().clamp_min(1)
        variance = ((teacher_float_TD - mean_D).square() * counts_T1).sum()
        variance = variance.clamp_min(torch.finfo(torch.float32).tiny)
        ctx.save_for_backward(student_TD, teacher_TD, counts_T1, variance)
        return ((student_TD.float() - teacher_float_TD).square() * counts_T1).sum() / variance

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401
        grad: Tensor,
    ) -> tuple[Tensor, None, None]:
        student_TD, teacher_TD, counts_T1, variance = ctx.saved_tensors
        errors_TD = (student_TD.float() - teacher_TD.float()) * counts_T1
        return (errors_TD * (2 * grad / variance)).to(student_TD.dtype), None, None
