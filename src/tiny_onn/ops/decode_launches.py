"""The launches of `decode.py`: the sizes of the kernels' programs, and which kernels are taken.

Legend: T tokens, D hidden, E experts, I expert width, J = 2 * I gate and up rows, S rows of the
scratch.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiny_onn.config.schema import Weighting
from tiny_onn.ops.block_sizes import power_of_two
from tiny_onn.ops.layout import ExpertWeights


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelBlocks:
    """The kernels' block sizes, all powers of two; results differ by rounding only."""

    width: int = 8
    """Neurons per program of the experts kernel."""
    hidden: int = 1024
    """Features that a program of the experts kernel holds at once."""
    warps: int = 4
    """Warps per program of the experts kernel."""
    sum_hidden: int = 16
    """Features per program of the combine kernel."""
    sum_rows: int = 256
    """Scratch rows that a program of the combine kernel reads at once."""
    tile_tokens: int = 8
    """Number of tokens from which on experts are computed for all tokens at once."""
    tile_width: int = 32
    """Neurons per program of the tile kernel, at least 16."""
    tile_hidden: int = 128
    """Features that a program of the tile kernel multiplies at once, at least 16."""
    overlap: bool = True
    """True if with fewer than `tile_tokens` tokens each kernel is started while the one before it
    ends, which needs a GPU of compute capability 9.0 or higher; others ignore it. No bit depends
    on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selecting:
    """The rule by which the kernels select, as `router.route` does."""

    num_active: int
    """Number of routed experts, those of the largest logits; 0: a budget's threshold decides."""
    num_shared: int
    """Number of shared experts: the first ones, which are always active."""
    weighting: Weighting
    tie_break: float
    """Share by which a probability falls with its rank, see `router.TIE_BREAK`."""


class RoutingTensors(NamedTuple):
    """The routing's tensors: the experts kernel writes the last three if it has a rule.

    Without a rule it reads weights and active experts, and none of the others.
    """

    logits: Tensor
    selection_bias: Tensor
    threshold: Tensor
    scores: Tensor
    weights: Tensor
    active: Tensor


class Launch(NamedTuple):
    """The options of a call; without a rule the routing is given."""

    rule: Selecting | None
    activation: str
    expert_scale_E: Tensor | None
    mean_outputs_ED: Tensor | None
    blocks: KernelBlocks


def run(x_TD: Tensor, weights: ExpertWeights, tensors: RoutingTensors, launch: Launch) -> Tensor:
    """Launch the kernels of experts and their sum, and return the output (T, D)."""
    x_TD = x_TD.contiguous()
    with torch.cuda.device_of(x_TD):
        formats = {x_TD.dtype, *(weight.dtype for weight in weights)}
        if len(x_TD) >= launch.blocks.tile_tokens and len(formats) == 1:
            return _tiles(x_TD, weights, tensors, launch)
        return _tokens(x_TD, weights, tensors, launch)


def _tokens(
    x_TD: Tensor, weights: ExpertWeights, tensors: RoutingTensors, launch: Launch
) -> Tensor:
    """Launch a program per token and block of an active expert's neurons."""
    gate_up_EJD, down_EDI = weights
    rule, blocks = launch.rule, launch.blocks
    E, D, I = down_EDI.shape
    T = len(x_TD)
    block_i = min(blocks.width, power_of_two(I))
    num_blocks = -(-I // block_i)
    max_active = rule.num_active + rule.num_shared if rule and rule.num_active else E
    max_rows = max_active * num_blocks
    partial_TSD = x_TD.new_empty(T, E * num_blocks, D, dtype=torch.float32)
    scale_E = launch.expert_scale_E
    kernels().experts_kernel[T, max_rows](
        x_TD,
        gate_up_EJD,
        down_EDI,
        tensors.logits,
        tensors.selection_bias,
        tensors.threshold,
        tensors.weights if scale_E is None else scale_E,
        tensors.scores,
        tensors.weights,
        tensors.active.view(torch.uint8),
        partial_TSD,
        BLOCK_D=min(blocks.hidden, power_of_two(D)),
        BLOCK_E=power_of_two(E),
        BLOCK_I=block_i,
        ROUTED=rule is not None,
        num_warps=blocks.warps,
        **_sizes(down_EDI, num_blocks, launch),
        **_selecting(rule),
        **overlap_options(x_TD, blocks),
    )
    return _combine(partial_TSD, x_TD, tensors, launch, max_rows=max_rows, compact=True)


def _tiles(x_TD: Tensor, weights: ExpertWeights, tensors: RoutingTensors, launch: Launch) -> Tensor:
    """Launch a program per block of an expert's neurons, which computes it for all tokens."""
    gate_up_EJD, down_EDI = weights
    rule, blocks = launch.rule, launch.blocks
    E, D, I = down_EDI.shape
    T = len(x_TD)
    active_TE = tensors.active.view(torch.uint8)
    if rule is not None:
        kernels().select_kernel[(T,)](
            tensors.logits,
            tensors.selection_bias,
            tensors.threshold,
            tensors.scores,
            tensors.weights,
            active_TE,
            E=E,
            BLOCK_E=power_of_two(E),
            num_warps=4,
            **_selecting(rule),
        )
    num_blocks = -(-I // blocks.tile_width)
    partial_TSD = x_TD.new_empty(T, E * num_blocks, D, dtype=torch.float32)
    scale_E = launch.expert_scale_E
    kernels().tile_kernel[(E * num_blocks,)](
        x_TD,
        gate_up_EJD,
        down_EDI,
        tensors.weights if scale_E is None else scale_E,
        tensors.weights,
        active_TE,
        partial_TSD,
        T,
        # A matrix product needs 16 rows and columns.
        BLOCK_T=max(power_of_two(T), 16),
        BLOCK_D=min(blocks.tile_hidden, max(power_of_two(D), 16)),
        BLOCK_I=blocks.tile_width,
        num_warps=4,
        num_stages=4,
        **_sizes(down_EDI, num_blocks, launch),
    )
    rows = E * num_blocks
    return _combine(partial_TSD, x_TD, tensors, launch, max_rows=rows, compact=False)


def _combine(
    partial_TSD: Tensor,
    x_TD: Tensor,
    tensors: RoutingTensors,
    launch: Launch,
    *,
    max_rows: int,
    compact: bool,
) -> Tensor:
    """Launch the sum of each token's rows, which are its first ones if they are compact."""
    (T, E), D = tensors.active.shape, x_TD.shape[1]
    means_ED, blocks = launch.mean_outputs_ED, launch.blocks
    y_TD = torch.empty_like(x_TD)
    part = min(blocks.sum_hidden, power_of_two(D))
    kernels().combine_kernel[T, -(-D // part)](
        partial_TSD,
        tensors.active.view(torch.uint8),
        partial_TSD if means_ED is None else means_ED,
        y_TD,
        D=D,
        E=E,
        N=partial_TSD.shape[1] // E,
        BLOCK_E=power_of_two(E),
        BLOCK_D=part,
        BLOCK_S=min(blocks.sum_rows, power_of_two(max_rows)),
        MAX_ROWS=max_rows,
        COMPACT=compact,
        COMPENSATED=means_ED is not None,
        num_warps=4,
        **overlap_options(x_TD, blocks),
    )
    return y_TD


def _sizes(down_EDI: Tensor, num_blocks: int, launch: Launch) -> dict[str, Any]:
    """Return the constants of kernels that compute experts in so many blocks of neurons each."""
    E, D, I = down_EDI.shape
    return {
        "D": D,
        "E": E,
        "N": num_blocks,
        "I": I,
        "STRIDE_D": down_EDI.stride(1),
        "STRIDE_I": down_EDI.stride(2),
        "SCALED": launch.expert_scale_E is not None,
        "ACTIVATION": launch.activation,
    }


def _selecting(rule: Selecting | None) -> dict[str, Any]:
    """Return a rule as the kernels' constants."""
    return {
        "NUM_ACTIVE": rule.num_active if rule else 0,
        "NUM_SHARED": rule.num_shared if rule else 0,
        "WEIGHTING": rule.weighting if rule else "unit",
        "TIE_BREAK": rule.tie_break if rule else 0.0,
    }


def overlap_options(x_TD: Tensor, blocks: KernelBlocks) -> dict[str, bool]:
    """Return the options of a launch that begins while the kernel before it ends."""
    few = len(x_TD) < blocks.tile_tokens
    if not (few and blocks.overlap and x_TD.is_cuda and can_overlap(x_TD.device)):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Return whether a GPU knows programmatic dependent launches."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def kernels() -> Any:  # noqa: ANN401 - triton's types are known where it is installed
    """Return the module of the kernels."""
    # The import stands here because torch for CPUs comes without triton.
    from tiny_onn.ops import decode_kernels  # noqa: PLC0415

    return decode_kernels
