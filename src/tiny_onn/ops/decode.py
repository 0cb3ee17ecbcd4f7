"""The expert layer for few tokens, without gradients: only active experts' weights are read.

Generating one token at a time is bound by memory bandwidth, so its time falls with the share of
active experts. Three Triton kernels (`decode_kernels.py`) compute the gate, the experts and the sum
of their outputs. No number comes back to the host and all launches have fixed sizes (programs
without work return), so that a CUDA graph of them follows the routing of whatever input it is
replayed on.

Each token reads k * 3 * I * D expert weights and the gate, and writes and reads back k * I /
`width` rows of D float32. Every token reads its experts anew, so many tokens are faster on another
path. Sums run in a fixed order, in float32 throughout: results repeat bit for bit, and differ from
those of the other paths by rounding. This path has no gradients and no surprise, knows the
activations in `ACTIVATIONS` alone, and at most `MAX_EXPERTS` experts.

Legend: T tokens, D hidden, E experts, I expert width, J = 2 * I gate and up rows, S rows of the
scratch.
"""

import functools
import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn.config.schema import Weighting
from tiny_onn.ops.layout import ExpertWeights

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
DTYPES = (torch.float32, torch.bfloat16)
MAX_TOKENS = 16
MAX_EXPERTS = 128


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


class Gate(NamedTuple):
    """The parameters of a linear gate."""

    weight_ED: Float[Tensor, "experts hidden"]
    bias_E: Float[Tensor, " experts"]
    selection_bias_E: Float[Tensor, " experts"]
    """Added to the logits for selection."""
    threshold: Float[Tensor, ""]
    """Evaluation threshold of a budget; not read if `num_active` > 0."""


class Decoded(NamedTuple):
    """Output and routing."""

    y_TD: Float[Tensor, "tokens hidden"]
    logits_TE: Float[Tensor, "tokens experts"]
    scores_TE: Float[Tensor, "tokens experts"]
    active_TE: Bool[Tensor, "tokens experts"]
    weights_TE: Float[Tensor, "tokens experts"]


@functools.cache
def triton_runs_on(device_type: str) -> bool:
    """Return whether triton runs on the device: on a GPU, or anywhere as interpreter in tests."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (device_type == "cuda" or interpreted) and find_spec("triton") is not None


def can_decode(
    x_TD: Float[Tensor, "tokens hidden"],
    gate_up_EJD: Float[Tensor, "experts rows hidden"],
    down_EDI: Float[Tensor, "experts hidden width"],
    activation: str,
) -> bool:
    """Return whether this path computes these inputs: few tokens, no gradients, a GPU's triton."""
    tensors = (x_TD, gate_up_EJD, down_EDI)
    return (
        not torch.is_grad_enabled()
        and 0 < len(x_TD) <= MAX_TOKENS
        and len(down_EDI) <= MAX_EXPERTS
        and activation in ACTIVATIONS
        and all(tensor.dtype in DTYPES for tensor in tensors)
        and gate_up_EJD.is_contiguous()
        and (down_EDI.is_contiguous() or down_EDI.mT.is_contiguous())
        # torch.compile can trace and fuse the other paths, but not these launches.
        and not torch.compiler.is_compiling()
        and triton_runs_on(x_TD.device.type)
    )


def expert_layer(
    x_TD: Float[Tensor, "tokens hidden"],
    gate_up_EJD: Float[Tensor, "experts rows hidden"],
    down_EDI: Float[Tensor, "experts hidden width"],
    weights_TE: Float[Tensor, "tokens experts"],
    active_TE: Bool[Tensor, "tokens experts"],
    *,
    activation: str,
    expert_scale_E: Float[Tensor, " experts"] | None = None,
    mean_outputs_ED: Float[Tensor, "experts hidden"] | None = None,
    blocks: KernelBlocks | None = None,
) -> Float[Tensor, "tokens hidden"]:
    """Return `y[t] = sum_e weights[t, e] * scale[e] * expert_e(x[t])` in x's number format.

    The sum runs over the active experts; mean outputs of the inactive ones are added to it.

    Args:
        x_TD: the layer's input, in one of `DTYPES`.
        gate_up_EJD: gate and up projections, contiguous, in one of `DTYPES`; they are not rounded
            to the format of x.
        down_EDI: down projections in one of `DTYPES`, contiguous, or contiguous when transposed,
            which is read faster.
        weights_TE: routing weights, float32.
        active_TE: the experts that are read and summed.
        activation: one of `ACTIVATIONS`.
        expert_scale_E: a factor of each expert's weights; None: 1.
        mean_outputs_ED: the vector that is added for an inactive expert; None: none.
        blocks: the kernels' block sizes; None: the fastest ones as measured.
    """
    weights_TE = weights_TE.contiguous()
    tensors = _Tensors(
        logits=weights_TE,
        selection_bias=weights_TE,
        threshold=weights_TE,
        scores=weights_TE,
        weights=weights_TE,
        active=active_TE.contiguous(),
    )
    weights = ExpertWeights(gate_up_EJD, down_EDI)
    launch = _Launch(None, activation, expert_scale_E, mean_outputs_ED, blocks or KernelBlocks())
    return _run(x_TD, weights, tensors, launch)


def routed_expert_layer(
    x_TD: Float[Tensor, "tokens hidden"],
    gate_up_EJD: Float[Tensor, "experts rows hidden"],
    down_EDI: Float[Tensor, "experts hidden width"],
    gate: Gate,
    *,
    rule: Selecting,
    activation: str,
    expert_scale_E: Float[Tensor, " experts"] | None = None,
    mean_outputs_ED: Float[Tensor, "experts hidden"] | None = None,
    blocks: KernelBlocks | None = None,
) -> Decoded:
    """Return the output of `expert_layer` and the routing, which a linear gate and a rule give.

    The routing is that of `router.route`, with logits summed in another order. The rule says how
    many experts are active, and their weights; the other arguments are those of `expert_layer`.
    """
    T, D = x_TD.shape
    E = len(gate.weight_ED)
    x_TD = x_TD.contiguous()
    logits_TE, scores_TE, weights_TE = x_TD.new_empty(3, T, E, dtype=torch.float32).unbind(0)
    active_TE = x_TD.new_empty(T, E, dtype=torch.bool)
    with torch.cuda.device_of(x_TD):
        _kernels().gate_kernel[T, E](
            x_TD,
            gate.weight_ED,
            gate.bias_E,
            logits_TE,
            D=D,
            E=E,
            BLOCK_D=min(_power_of_two(D), 1024),
            num_warps=4,
        )
    tensors = _Tensors(
        logits_TE, gate.selection_bias_E, gate.threshold, scores_TE, weights_TE, active_TE
    )
    weights = ExpertWeights(gate_up_EJD, down_EDI)
    launch = _Launch(rule, activation, expert_scale_E, mean_outputs_ED, blocks or KernelBlocks())
    y_TD = _run(x_TD, weights, tensors, launch)
    return Decoded(y_TD, logits_TE, scores_TE, active_TE, weights_TE)


class _Tensors(NamedTuple):
    """The routing's tensors: the experts kernel writes the last three if it has a rule.

    Without a rule it reads weights and active experts, and none of the others.
    """

    logits: Tensor
    selection_bias: Tensor
    threshold: Tensor
    scores: Tensor
    weights: Tensor
    active: Tensor


class _Launch(NamedTuple):
    """The options of a call; without a rule the routing is given."""

    rule: Selecting | None
    activation: str
    expert_scale_E: Tensor | None
    mean_outputs_ED: Tensor | None
    blocks: KernelBlocks


def _run(x_TD: Tensor, weights: ExpertWeights, tensors: _Tensors, launch: _Launch) -> Tensor:
    gate_up_EJD, down_EDI = weights
    rule, activation, expert_scale_E, mean_outputs_ED, blocks = launch
    x_TD = x_TD.contiguous()
    E, D, I = down_EDI.shape
    T = len(x_TD)
    block_i = min(blocks.width, _power_of_two(I))
    num_blocks = -(-I // block_i)
    max_active = rule.num_active + rule.num_shared if rule and rule.num_active else E
    max_rows = max_active * num_blocks
    active_TE = tensors.active.view(torch.uint8)
    partial_TSD = x_TD.new_empty(T, E * num_blocks, D, dtype=torch.float32)
    y_TD = torch.empty_like(x_TD)
    sizes = {"D": D, "E": E, "N": num_blocks, "BLOCK_E": _power_of_two(E)}
    part = min(blocks.sum_hidden, _power_of_two(D))
    with torch.cuda.device_of(x_TD):
        _kernels().experts_kernel[T, max_rows](
            x_TD,
            gate_up_EJD,
            down_EDI,
            tensors.logits,
            tensors.selection_bias,
            tensors.threshold,
            tensors.weights if expert_scale_E is None else expert_scale_E,
            tensors.scores,
            tensors.weights,
            active_TE,
            partial_TSD,
            **sizes,
            I=I,
            STRIDE_D=down_EDI.stride(1),
            STRIDE_I=down_EDI.stride(2),
            BLOCK_D=min(blocks.hidden, _power_of_two(D)),
            BLOCK_I=block_i,
            ROUTED=rule is not None,
            SCALED=expert_scale_E is not None,
            NUM_ACTIVE=rule.num_active if rule else 0,
            NUM_SHARED=rule.num_shared if rule else 0,
            WEIGHTING=rule.weighting if rule else "unit",
            TIE_BREAK=rule.tie_break if rule else 0.0,
            ACTIVATION=activation,
            num_warps=blocks.warps,
        )
        _kernels().combine_kernel[T, -(-D // part)](
            partial_TSD,
            active_TE,
            partial_TSD if mean_outputs_ED is None else mean_outputs_ED,
            y_TD,
            **sizes,
            BLOCK_D=part,
            BLOCK_S=min(blocks.sum_rows, _power_of_two(max_rows)),
            MAX_ROWS=max_rows,
            COMPENSATED=mean_outputs_ED is not None,
            num_warps=4,
        )
    return y_TD


def _kernels() -> Any:  # noqa: ANN401 - triton's types are known where it is installed
    # The import stands here because torch for CPUs comes without triton.
    from tiny_onn.ops import decode_kernels  # noqa: PLC0415

    return decode_kernels


def _power_of_two(size: int) -> int:
    """Return the smallest power of two that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()
