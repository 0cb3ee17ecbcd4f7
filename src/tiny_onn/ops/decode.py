"""The expert layer for few tokens, without gradients: only active experts' weights are read.

Generating one token at a time is bound by memory bandwidth, so its time falls with the share of
active experts. Triton kernels (`decode_kernels.py`) compute the gate, the experts and the sum of
their outputs. No number comes back to the host and all launches have fixed sizes (programs without
work return), so that a CUDA graph of them follows the routing of whatever input it is replayed on.

For few tokens each token reads its own k * 3 * I * D expert weights. From `tile_tokens` tokens on,
a program reads a block of an expert's neurons once for all tokens, and computes it by matrix
products. Either way every block of an active expert's neurons writes a row of D float32 for a token
(`width` neurons, or `tile_width`), which is read back. Sums run in a fixed order, in float32
throughout: results repeat bit for bit, and differ from those of the other paths by rounding. This
path has no gradients and no surprise, knows the activations in `ACTIVATIONS` alone, and at most
`MAX_EXPERTS` experts. torch.compile cannot trace the launches: `decode_operators.py` offers the
same functions as operators, which it takes as they are.

Legend: T tokens, D hidden, E experts, I expert width, J = 2 * I gate and up rows, S rows of the
scratch.
"""

import os
from importlib.util import find_spec
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn.ops.block_sizes import power_of_two
from tiny_onn.ops.decode_launches import (
    KernelBlocks,
    Launch,
    RoutingTensors,
    Selecting,
    kernels,
    overlap_options,
    run,
)
from tiny_onn.ops.layout import ExpertWeights

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
DTYPES = (torch.float32, torch.bfloat16)
MAX_TOKENS = 16
MAX_EXPERTS = 128
# torch.compile can trace neither call. Triton reads the variable once too.
_HAS_TRITON = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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


def triton_runs_on(device_type: str) -> bool:
    """Return whether triton runs on the device: on a GPU, or anywhere as interpreter in tests."""
    return _HAS_TRITON and (device_type == "cuda" or _INTERPRETED)


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
    tensors = RoutingTensors(
        logits=weights_TE,
        selection_bias=weights_TE,
        threshold=weights_TE,
        scores=weights_TE,
        weights=weights_TE,
        active=active_TE.contiguous(),
    )
    weights = ExpertWeights(gate_up_EJD, down_EDI)
    launch = Launch(None, activation, expert_scale_E, mean_outputs_ED, blocks or KernelBlocks())
    return run(x_TD, weights, tensors, launch)


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
    logits_TE, scores_TE, weights_TE = (x_TD.new_empty(T, E, dtype=torch.float32) for _ in range(3))
    active_TE = x_TD.new_empty(T, E, dtype=torch.bool)
    blocks = blocks or KernelBlocks()
    with torch.cuda.device_of(x_TD):
        kernels().gate_kernel[T, E](
            x_TD,
            gate.weight_ED,
            gate.bias_E,
            logits_TE,
            D=D,
            E=E,
            BLOCK_D=min(power_of_two(D), 1024),
            num_warps=4,
            **overlap_options(x_TD, blocks),
        )
    tensors = RoutingTensors(
        logits_TE, gate.selection_bias_E, gate.threshold, scores_TE, weights_TE, active_TE
    )
    weights = ExpertWeights(gate_up_EJD, down_EDI)
    launch = Launch(rule, activation, expert_scale_E, mean_outputs_ED, blocks)
    y_TD = run(x_TD, weights, tensors, launch)
    return Decoded(y_TD, logits_TE, scores_TE, active_TE, weights_TE)
