"""The loss that matches the teacher's hidden states layer by layer, beside its predictions.

    loss_l = sum_t |s_l[t] - h_l[t]|^2 / sum_t |h_l[t] - mean h_l|^2

h_l is the teacher's residual stream after layer l, and s_l is the student's. The loss is the share
of the stream's variance that the student leaves unexplained. It tells a layer directly what to add
to the stream, which the logits tell only through all later layers. Source: SquareHead, arXiv
2310.06927, section 3.1, which divides by the mean square instead; there a few features that are
large and hardly vary would dominate.

In some families a few features also vary far more than all others. The share can therefore be taken
of each feature's own variance, and averaged over the features:

    loss_l = mean_d sum_t (s_l[t, d] - h_l[t, d])^2 / (v_d + FLOOR mean v)
    v_d = sum_t (h_l[t, d] - mean h_l[d])^2

A row of one repeated token has no variance but rounding. Both divisors therefore grow by what the
variance falls short of LEAST_VARIANCE times the sum of squares.

Legend: T tokens, D hidden, L layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn.ops.regions import region_of

FLOOR = 1e-3
"""The share of the mean variance that is added to each feature's, so that none is divided by 0."""
LEAST_VARIANCE = 0.01
"""The least variance as a share of the squares; the layers of SmolLM2-135M and Gemma-3-270M have
0.1 to 0.8 on prose and code."""


def unexplained_variance(
    student_states: Sequence[Float[Tensor, "1 tokens hidden"]],
    teacher_states: Sequence[Float[Tensor, "1 tokens hidden"]],
    token_mask_T: Bool[Tensor, " tokens"],
    *,
    by_feature: bool = False,
    compiled: bool = False,
) -> Float[Tensor, " layers"]:
    """Return each layer's share of the teacher's variance that the student leaves unexplained.

    The backward pass needs the states themselves, in their own number format; those of a student
    with checkpointed layers are in memory anyway.

    Args:
        student_states: The student's residual stream after each layer.
        teacher_states: The teacher's residual stream after each layer.
        token_mask_T: The tokens that count: all but padding and the first of each document.
        by_feature: Whether the share is of each feature's variance, averaged over features.
        compiled: Whether the elementwise work runs through torch.compile, from which a GPU gains.

    Returns:
        The shares in float32.
    """
    counts_T1 = token_mask_T[:, None].float()
    pairs = zip(student_states, teacher_states, strict=True)
    forward = feature_share_region if by_feature else share_region
    regions = [region_of(part, compiled=compiled) for part in (forward, share_gradient_region)]
    shares = [
        _UnexplainedVariance.apply(student.flatten(0, 1), teacher[0], counts_T1, regions)
        for student, teacher in pairs
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
        regions: Sequence[Callable[..., Any]],
    ) -> Tensor:
        share, variance = regions[0](student_TD, teacher_TD, counts_T1)
        ctx.save_for_backward(student_TD, teacher_TD, counts_T1, variance)
        ctx.gradient_region = regions[1]
        return share

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401
        grad: Tensor,
    ) -> tuple[Tensor, None, None, None]:
        return ctx.gradient_region(*ctx.saved_tensors, grad), None, None, None


def share_region(
    student_TD: Tensor, teacher_TD: Tensor, counts_T1: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a layer's unexplained share, and the teacher's variance summed over the tokens."""
    teacher_float_TD = teacher_TD.float()
    mean_D = (teacher_float_TD * counts_T1).sum(0) / counts_T1.sum().clamp_min(1)
    variance = ((teacher_float_TD - mean_D).square() * counts_T1).sum()
    squares = (teacher_float_TD.square() * counts_T1).sum()
    variance = variance + _lack(variance, squares)
    variance = variance.clamp_min(torch.finfo(torch.float32).tiny)
    errors_TD = student_TD.float() - teacher_float_TD
    return (errors_TD.square() * counts_T1).sum() / variance, variance


def feature_share_region(
    student_TD: Tensor, teacher_TD: Tensor, counts_T1: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the mean over features of their unexplained shares, and D times their divisors."""
    teacher_float_TD = teacher_TD.float()
    mean_D = (teacher_float_TD * counts_T1).sum(0) / counts_T1.sum().clamp_min(1)
    variance_D = ((teacher_float_TD - mean_D).square() * counts_T1).sum(0)
    mean_square = (teacher_float_TD.square() * counts_T1).sum(0).mean()
    mean_variance = variance_D.mean()
    divisor_D = variance_D + FLOOR * mean_variance + _lack(mean_variance, mean_square)
    divisor_D = divisor_D.clamp_min(torch.finfo(torch.float32).tiny) * len(divisor_D)
    errors_TD = student_TD.float() - teacher_float_TD
    return ((errors_TD.square() * counts_T1).sum(0) / divisor_D).sum(), divisor_D


def _lack(variance: Tensor, squares: Tensor) -> Tensor:
    """Return what a variance falls short of the least one for these squares."""
    return (LEAST_VARIANCE * squares - variance).clamp_min(0)


def share_gradient_region(
    student_TD: Tensor, teacher_TD: Tensor, counts_T1: Tensor, variance: Tensor, grad: Tensor
) -> Tensor:
    """Return the gradient of the share at the student's states.

    `variance` is what the share was divided by, one number or one for each feature.
    """
    errors_TD = (student_TD.float() - teacher_TD.float()) * counts_T1
    return (errors_TD * (2 * grad / variance)).to(student_TD.dtype)
