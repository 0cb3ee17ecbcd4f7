"""The expert layer for few tokens, without gradients: only active experts' weights are read.

Generating one token at a time is bound by memory bandwidth, so here a share of active experts is a
share of the time. Three Triton kernels (`decode_kernels.py`): the gate, the experts, their sum. No
number comes back to the host and all launches have fixed sizes (programs without work return), so
that a CUDA graph of them follows the routing of whatever input it is replayed on.

Reads at each token: (k * 3 * I * D) expert weights and the gate; beside them, k * I / `width` rows
of D float32 are written and read back. Every token reads its experts anew: not for many tokens.
Sums run in a fixed order, in float32 throughout: results repeat bit for bit, and differ from the
other paths by their rounding. What it does not do: gradients, surprise, other activations than
`ACTIVATIONS`, more than `MAX_EXPERTS` experts.

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

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
DTYPES = (torch.float32, torch.bfloat16)
MAX_TOKENS = 16
MAX_EXPERTS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelBlocks:
    """How the work is cut into programs; results differ by rounding only."""

    width: int = 8
    """Neurons of a program, a power of two."""
    hidden: int = 1024
    """Features that it holds at once, a power of two."""
    warps: int = 4
    """Of such a program."""
    sum_hidden: int = 16
    """Features that a program of the last kernel sums up, a power of two."""
    sum_rows: int = 256
    """Rows of the scratch that it reads at once, a power of two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selecting:
    """The rule by which the kernels select: that of `router.route`."""

    num_active: int
    """Routed experts, of largest logits; 0: those whose probability passes the threshold."""
    num_shared: int
    """Experts, the first ones, that are active whatever their logits."""
    weighting: Weighting
    tie_break: float
    """Share by which a probability falls with its rank."""


class Gate(NamedTuple):
    """A linear gate."""

    weight_ED: Float[Tensor, "experts hidden"]
    bias_E: Float[Tensor, " experts"]
    selection_bias_E: Float[Tensor, " experts"]
    """Added to the logits for selection."""
    threshold: Float[Tensor, ""]
    """Of a budget."""


class Decoded(NamedTuple):
    """Output and routing."""

    y_TD: Float[Tensor, "tokens hidden"]
    logits_TE: Float[Tensor, "tokens experts"]
    scores_TE: Float[Tensor, "tokens experts"]
    active_TE: Bool[Tensor, "tokens experts"]
    weights_TE: Float[Tensor, "tokens experts"]


@functools.cache
def triton_runs_on(device_type: str) -> bool:
    """Whether there is a triton for the device: a GPU's, or its interpreter (for tests)."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (device_type == "cuda" or interpreted) and find_spec("triton") is not None


def can_decode(
    x_TD: Float[Tensor, "tokens hidden"],
    gate_up_EJD: Float[Tensor, "experts rows hidden"],
    down_EDI: Float[Tensor, "experts hidden width"],
    activation: str,
) -> bool:
    """Whether this path computes these inputs: few tokens, no gradients, a GPU with triton."""
    tensors = (x_TD, gate_up_EJD, down_EDI)
    return (
        not torch.is_grad_enabled()
        and 0 < len(x_TD) <= MAX_TOKENS
        and len(down_EDI) <= MAX_EXPERTS
        and activation in ACTIVATIONS
        and all(tensor.dtype in DTYPES for tensor in tensors)
        and gate_up_EJD.is_contiguous()
        and (down_EDI.is_contiguous() or down_EDI.mT.is_contiguous())
        # The compiler traces the other paths, and fuses them.
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
    """The layer's output, `y[t] = sum_e weights[t, e] * scale[e] * expert_e(x[t])`, in x's format.

    The sum runs over the active experts; mean outputs of the inactive ones are added to it.

    Args:
        x_TD: the layer's input, one of `DTYPES`.
        gate_up_EJD: gate and up projections, contiguous, one of `DTYPES`; not rounded to x's.
        down_EDI: down projections, likewise, or contiguous when transposed, which is read faster.
        weights_TE: routing weights, float32.
        active_TE: which experts are read.
        activation: one of `ACTIVATIONS`.
        expert_scale_E: a factor of the weights; None: 1.
        mean_outputs_ED: what is added for an inactive expert; None: nothing.
        blocks: how the work is cut; None: as measured.
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
    corrections = (expert_scale_E, mean_outputs_ED)
    return _run(x_TD, gate_up_EJD, down_EDI, tensors, None, activation, corrections, blocks)


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
    """`expert_layer` of the routing that a linear gate and a rule give, and that routing.

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
    corrections = (expert_scale_E, mean_outputs_ED)
    y_TD = _run(x_TD, gate_up_EJD, down_EDI, tensors, rule, activation, corrections, blocks)
    return Decoded(y_TD, logits_TE, scores_TE, active_TE, weights_TE)


class _Tensors(NamedTuple):
    """What the experts' kernel selects by, or weights and active experts that it is given."""

    logits: Tensor
    selection_bias: Tensor
    threshold: Tensor
    scores: Tensor
    weights: Tensor
    active: Tensor


def _run(  # noqa: PLR0917
    x_TD: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    tensors: _Tensors,
    rule: Selecting | None,
    activation: str,
    corrections: tuple[Tensor | None, Tensor | None],
    blocks: KernelBlocks | None,
) -> Tensor:
    blocks = blocks or KernelBlocks()
    expert_scale_E, mean_outputs_ED = corrections
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
    # Here and not at the top: a CPU's torch comes without triton.
    from tiny_onn.ops import decode_kernels  # noqa: PLC0415

    return decode_kernels


def _power_of_two(size: int) -> int:
    """The smallest that is not below it."""
    return 1 << max(size - 1, 0).bit_length()
