"""The router's gradient from the sums of an expert layer's kernels, by one kernel if possible.

Legend: T tokens, D hidden, E experts, B blocks of tokens.
"""

from importlib import import_module
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn.config.routing_checks import SPARSE_SURPRISES
from tiny_onn.ops.block_sizes import power_of_two
from tiny_onn.ops.router_gradient import (
    RoutingTables,
    SmkStep,
    SurpriseTerms,
    closed_form_surprise,
    router_gradient,
    squared_norms,
)

# These kinds of surprise need no Gram matrix.
KINDS = SPARSE_SURPRISES
# A program of the kernel holds so many tokens and features at once.
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
    """Return `router_gradient` of the surprise that follows from the sums; add to the tally.

    Args:
        smk: the instructions for the router's gradient.
        x_TD: the layer's input.
        grad_y_TD: the gradient at the layer's output.
        sums_3TE: `pre_sq`, `hidden_sq` and `dot` of `SurpriseTerms`, a view of a (3, E, T) table.
        weights_TE: routing weights.
        logits_TE: the router's logits.
        active_TE: active experts.
        token_mask_T: tokens that count in targets and statistics.
        lesson_T: tokens whose candidates are all experts: all of them, or `smk.lesson_mask`; the
            candidates of other tokens are their active experts. None: the rule says `active`.
        compiled: whether small operations are fused in the cases that the kernel does not know.
    """
    if smk.rule.targets == "single" and smk.capture is None and not smk.num_shared:
        tensors = (sums_3TE, weights_TE, logits_TE, active_TE, token_mask_T)
        return _in_one_launch(smk, x_TD, grad_y_TD, *tensors, lesson_T)
    x_sq, grad_y_sq = squared_norms(smk.rule.surprise, x_TD, grad_y_TD, compiled=compiled)
    sums = SurpriseTerms(
        x_sq_T1=x_sq,
        grad_y_sq_T1=grad_y_sq,
        pre_sq_TE=sums_3TE[0],
        hidden_sq_TE=sums_3TE[1],
        dot_TE=sums_3TE[2],
    )
    surprise_TE = closed_form_surprise(smk.rule.surprise, sums)
    routing = RoutingTables(weights_TE, logits_TE, active_TE, token_mask_T)
    return router_gradient(smk, surprise_TE, routing, compiled=compiled)


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
            _scales(smk, x_TD.device),
            T,
            D=D,
            E=E,
            BLOCK_T=_BLOCK_T,
            BLOCK_D=_BLOCK_D,
            BLOCK_E=power_of_two(E),
            KIND=smk.rule.surprise,
            SMALLEST=smk.rule.direction == "min",
            ALL=lesson_T is not None,
        )
    if smk.tally is not None:
        smk.tally.counts_4.add_(counts_B4.sum(0))
        smk.tally.sums_4E.add_(tallies_B4E.sum(0))
    return grad_TE


def _scales(smk: SmkStep, device: torch.device) -> Float[Tensor, " 2"]:
    """Return both scales in the device's memory, from which a captured graph reads them anew."""
    scales = (smk.grad_scale, smk.loss_scale)
    on_device = [torch.as_tensor(scale, dtype=torch.float32, device=device) for scale in scales]
    return torch.stack(on_device)
