"""The functions of `decode.py` as operators of torch, which torch.compile takes as they are.

A compiled decoding step then has no graph breaks, and a CUDA graph of it holds the kernels of
`decode.py` between the compiled rest. Calls that are not compiled go to `decode.py` itself, which
spares the time of an operator's dispatch.
"""

from dataclasses import astuple, fields
from typing import Any

import torch
from torch import Tensor

from tiny_onn.ops import decode
from tiny_onn.ops.decode_launches import KernelBlocks, Selecting


def expert_layer(
    x_TD: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    weights_TE: Tensor,
    active_TE: Tensor,
    *,
    activation: str,
    expert_scale_E: Tensor | None = None,
    mean_outputs_ED: Tensor | None = None,
    blocks: KernelBlocks | None = None,
) -> Tensor:
    """Return what `decode.expert_layer` returns."""
    return _experts(
        x_TD,
        gate_up_EJD,
        down_EDI,
        weights_TE,
        active_TE,
        activation,
        expert_scale_E,
        mean_outputs_ED,
        _numbers(blocks),
    )


def routed_expert_layer(
    x_TD: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    gate: decode.Gate,
    *,
    rule: Selecting,
    activation: str,
    expert_scale_E: Tensor | None = None,
    mean_outputs_ED: Tensor | None = None,
    blocks: KernelBlocks | None = None,
) -> decode.Decoded:
    """Return what `decode.routed_expert_layer` returns."""
    y_TD, logits_TE, scores_TE, active_TE, weights_TE = _routed_experts(
        x_TD,
        gate_up_EJD,
        down_EDI,
        gate.weight_ED,
        gate.bias_E,
        gate.selection_bias_E,
        gate.threshold,
        rule.num_active,
        rule.num_shared,
        rule.weighting,
        rule.tie_break,
        activation,
        expert_scale_E,
        mean_outputs_ED,
        _numbers(blocks),
    )
    return decode.Decoded(y_TD, logits_TE, scores_TE, active_TE, weights_TE)


@torch.library.custom_op("tiny_onn::decode_experts", mutates_args=())
def _experts(  # noqa: PLR0917 - an operator's arguments
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    active: Tensor,
    activation: str,
    expert_scale: Tensor | None,
    mean_outputs: Tensor | None,
    blocks: list[int],
) -> Tensor:
    return decode.expert_layer(
        x,
        gate_up,
        down,
        weights,
        active,
        activation=activation,
        expert_scale_E=expert_scale,
        mean_outputs_ED=mean_outputs,
        blocks=_blocks(blocks),
    )


@torch.library.register_fake("tiny_onn::decode_experts")
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("tiny_onn::decode_routed_experts", mutates_args=())
def _routed_experts(  # noqa: PLR0917 - an operator's arguments
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate: Tensor,
    bias: Tensor,
    selection_bias: Tensor,
    threshold: Tensor,
    num_active: int,
    num_shared: int,
    weighting: str,
    tie_break: float,
    activation: str,
    expert_scale: Tensor | None,
    mean_outputs: Tensor | None,
    blocks: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rule = Selecting(
        num_active=num_active,
        num_shared=num_shared,
        weighting=weighting,  # pyright: ignore[reportArgumentType] - an operator takes any text
        tie_break=tie_break,
    )
    decoded = decode.routed_expert_layer(
        x,
        gate_up,
        down,
        decode.Gate(gate, bias, selection_bias, threshold),
        rule=rule,
        activation=activation,
        expert_scale_E=expert_scale,
        mean_outputs_ED=mean_outputs,
        blocks=_blocks(blocks),
    )
    return tuple(decoded)  # pyright: ignore[reportReturnType] - there are five of them


@torch.library.register_fake("tiny_onn::decode_routed_experts")
def _(x: Tensor, gate_up: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y_TD = torch.empty_like(x, memory_format=torch.contiguous_format)
    shape = (x.shape[0], gate_up.shape[0])
    logits_TE, scores_TE, weights_TE = (x.new_empty(shape, dtype=torch.float32) for _ in range(3))
    return y_TD, logits_TE, scores_TE, x.new_empty(shape, dtype=torch.bool), weights_TE


def _numbers(blocks: KernelBlocks | None) -> list[int]:
    """Return the sizes as an operator's argument; none of them stands for the default."""
    return [] if blocks is None else [int(value) for value in astuple(blocks)]


def _blocks(numbers: list[int]) -> KernelBlocks | None:
    """Return the sizes that `_numbers` gave."""
    if not numbers:
        return None
    values: dict[str, Any] = {
        field.name: field.type(number)  # pyright: ignore[reportCallIssue] - they are int and bool
        for field, number in zip(fields(KernelBlocks), numbers, strict=True)
    }
    return KernelBlocks(**values)
