"""Activation checkpointing: the memory that layers keep between forward and backward pass.

`checkpoint_layers` trades memory for computation, layer by layer; the gradients are the same bits
in every mode. For T tokens of width D, H heads of C channels and MLPs of width F, a layer

    mode       keeps in memory                                           computes again
    none       everything: some ten tensors of (T, D) and (T, 2F)        nothing
    layer      its input (T, D)                                          the layer
    selective  its input, attention's output (T, H, C), log-sum-exp (T, H)    all but attention
    offload    nothing on a GPU, its input in pinned host memory         the layer

This module shrinks the memory that all layers keep together. The expert layer's own chunks
(`ops/dense_masked.py`) shrink the memory in use while one layer is computed.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from tiny_onn.config.schema import Checkpointing
from tiny_onn.errors import UserError
from tiny_onn.model.backbone import decoder_layers
from tiny_onn.model.student import TinyOnnForCausalLM

# Nothing in a layer draws random numbers, and a captured graph cannot store a generator's state.
EXACT: Mapping[str, Any] = MappingProxyType({"use_reentrant": False, "preserve_rng_state": False})
# Fused attentions of all devices by their names in torch.ops; a release of torch may lack some.
ATTENTION_OPS = (
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_fused_attention_overrideable",
    "torch_attn._varlen_attn",
)


def checkpoint_layers(student: TinyOnnForCausalLM, mode: Checkpointing) -> None:
    """Set what the student's decoder layers compute again in the backward pass.

    The mode `selective` keeps only attention that runs in a fused kernel; attention with a softcap,
    or a window shorter than the document, is computed again.

    Args:
        student: A converted model, changed in place.
        mode: A row of the module's table.

    Raises:
        UserError: The backbone's layers do not support checkpointing.
    """
    keep_attention = partial(create_selective_checkpoint_contexts, attention_ops())
    recompute = {
        "none": None,
        "layer": partial(checkpoint, **EXACT),
        "selective": partial(checkpoint, context_fn=keep_attention, **EXACT),
        "offload": _checkpoint_offloaded,
    }[mode]
    # The model's own method has one name up to transformers 5.22 and another after it, so the
    # layers are set one by one.
    for layer in decoder_layers(student.backbone):
        if not isinstance(layer, GradientCheckpointingLayer):
            if recompute is None:
                continue
            raise UserError(
                f"train.checkpointing: got {mode!r}, which the layers of "
                f"{type(student.backbone).__name__} do not support; set it to 'none'"
            )
        layer.gradient_checkpointing = recompute is not None
        layer._gradient_checkpointing_func = recompute  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    # Layers recompute only in training mode, in which they are if the student is.
    student.train(student.training)


def attention_ops() -> list[torch._ops.OpOverload]:
    """Return the fused attentions that the installed torch has."""
    spaces = (name.split(".") for name in ATTENTION_OPS)
    packets = (getattr(getattr(torch.ops, space), name, None) for space, name in spaces)
    return [packet.default for packet in packets if packet is not None]


def _checkpoint_offloaded(function: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401 - a layer's own arguments and result
    # The checkpoint's own hooks handle everything inside the layer; these get its inputs alone.
    with saved_tensors_hooks(to_host, to_device):
        return checkpoint(function, *args, **EXACT)


# `torch.autograd.graph.save_on_cpu(pin_memory=True)` would copy host tensors too, and in older
# releases of torch it lets the host wait for each copy (pytorch/pytorch#175421).
def to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """Return the device of the tensor and a copy in pinned host memory; host tensors stay."""
    if tensor.device.type == "cpu":
        return tensor.device, tensor
    # Both copies are queued on the computing stream, so that host and device never wait.
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return tensor.device, host.copy_(tensor, non_blocking=True)


def to_device(packed: tuple[torch.device, Tensor]) -> Tensor:
    """Return the tensor that `to_host` was given."""
    device, tensor = packed
    return tensor.to(device, non_blocking=True)
