"""The gate's gradient from the sums of an expert layer's kernels, in one launch where it can be.

Legend: T tokens, D hidden, E experts, B blocks of tokens.
"""

from importlib import import_module
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn.ops.router_gradient import SmkStep, Sums, closed_form, squared_norms, teach

# The kinds of surprise that need no Gram matrix.
KINDS = ("parameters", "output", "gain", "relative")
# Tokens and features that a program of the kernel holds at once.
_BLOCK_T, _BLOCK_D = 16, 256


def lesson(  # noqa: PLR0917
    smk: SmkStep,
    x_TD: Float[Tensor, "tokens hidden"],
    grad_y_TD: Float[Tensor, "tokens hidden"],
    sums_3TE: Float[Tensor, "3 tokens experts"],
    weights_TE: Float[Tensor, "tokens experts"],
    logits_TE: Float[Tensor, "tokens experts"],
    active_TE: Bool[Tensor, "tokens experts"],
    token_mask_T: Bool[Tensor, " tokens"],
    lesson_T: Bool[Tensor, " tokens"] | None,
    compiled: bool,
) -> Float[Tensor, "tokens experts"]:
    """`teaching.teach` by the surprise that follows from the sums; fills the tally.

    Args:
        smk: how the gate is taught.
        x_TD: the layer's input.
        grad_y_TD: the gradient at its output.
        sums_3TE: `pre_sq`, `hidden_sq` and `dot` of `Sums`, a view of a (3, E, T) table.
        weights_TE: routing weights.
        logits_TE: the gate's logits.
        active_TE: active experts.
        token_mask_T: tokens that count.
        lesson_T: the tokens whose candidates are all experts, all of them or `smk.lesson_mask`;
            the other tokens' are their active ones. None: the rule's candidates are `active`.
        compiled: fuse the small operations of the cases that the kernel does not know.
    """
    if smk.rule.targets == "single" and smk.capture is None and not smk.num_shared:
        tensors = (sums_3TE, weights_TE, logits_TE, active_TE, token_mask_T)
        return _in_one_launch(smk, x_TD, grad_y_TD, *tensors, lesson_T)
    x_sq, grad_y_sq = squared_norms(smk.rule.surprise, x_TD, grad_y_TD, compiled=compiled)
    sums = Sums(
        x_sq_T1=x_sq,
        grad_y_sq_T1=grad_y_sq,
        pre_sq_TE=sums_3TE[0],
        hidden_sq_TE=sums_3TE[1],
        dot_TE=sums_3TE[2],
    )
    routing = (closed_form(smk.rule.surprise, sums), weights_TE, logits_TE, active_TE)
    return teach(smk, *routing, token_mask_T, compiled=compiled)


def _in_one_launch(  # noqa: PLR0917
    smk: SmkStep,
    x_TD: Tensor,
    grad_y_TD: Tensor,
    sums_3TE: Tensor,
    weights_TE: Tensor,
    logits_TE: Tensor,
    active_TE: Tensor,
    token_mask_T: Tensor,
    lesson_T: Tensor | None,
) -> Float[Tensor, "tokens experts"]:
    # Naming the kernel imports triton.
    kernel: Any = import_module("tiny_onn.ops.lesson_kernels").lesson_kernel
    (T, D), E = x_TD.shape, weights_TE.shape[1]
    num_blocks = -(-T // _BLOCK_T)
    grad_TE = torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
    counts_B4, tallies_B4E = (
        weights_TE.new_empty(size, dtype=torch.float32)
        for size in ((num_blocks, 4), (num_blocks, 4, E))
    )
    with torch.cuda.device_of(x_TD):
        kernel[num_blocks,](
            x_TD,
            grad_y_TD,
            sums_3TE.mT.contiguous(),
            weights_TE.contiguous(),
            logits_TE.contiguous(),
            active_TE.contiguous().view(torch.uint8),
            token_mask_T.contiguous().view(torch.uint8),
            (token_mask_T if lesson_T is None else lesson_T).contiguous().view(torch.uint8),
            grad_TE,
            counts_B4,
            tallies_B4E,
            float(smk.grad_scale),
            float(smk.loss_scale),
            T,
            D=D,
            E=E,
            BLOCK_T=_BLOCK_T,
            BLOCK_D=_BLOCK_D,
            BLOCK_E=1 << max(0, E - 1).bit_length(),
            KIND=smk.rule.surprise,
            SMALLEST=smk.rule.direction == "min",
            ALL=lesson_T is not None,
        )
    if smk.tally is not None:
        smk.tally.counts_4.add_(counts_B4.sum(0))
        smk.tally.sums_4E.add_(tallies_B4E.sum(0))
    return grad_TE
