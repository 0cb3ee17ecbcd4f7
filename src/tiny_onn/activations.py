"""What a step keeps in memory between its forward and backward pass, and how much of it.

`checkpoint_layers` trades memory for computation, layer by layer; the gradients are the same bits
in every mode. Kept per layer, for T tokens of width D and H heads of C channels, and computed again
in the backward pass:

    none       everything: some ten tensors of (T, D) and (T, 2F)        nothing
    layer      its input (T, D)                                          the layer
    selective  its input, attention's output (T, H, C), log-sum-exp (T, H)    all but attention
    offload    nothing on a GPU, its input in pinned host memory         the layer

Not done here: the expert layer's own chunks (`ops/dense_masked.py`), which shrink what is in use
while one layer is computed; this module shrinks what all the others keep meanwhile.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from tiny_onn.config.schema import Checkpointing, LossConfig
from tiny_onn.errors import UserError
from tiny_onn.modeling import TinyOnnForCausalLM, decoder_layers

# The fused attentions of the devices, by their names in torch.ops: a release may lack some.
ATTENTION_OPS = (
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_fused_attention_overrideable",
    "torch_attn._varlen_attn",
)
CPU_LOSS_CHUNK_TOKENS = 512
# Matrix products suffer below the smaller. Above the larger nothing is gained but memory spent:
# 32,768 tokens took an H100 121 ms and 0.93 GiB in chunks of 1,024, 119 ms and 1.80 GiB in chunks
# of 2,048 (`gpu.py --sections loss`, V 151,936).
GPU_LOSS_CHUNK_TOKENS = (128, 1024)
# The logits' share of the memory that is free before the first step.
LOSS_MEMORY_SHARE = 1 / 16


def checkpoint_layers(student: TinyOnnForCausalLM, mode: Checkpointing) -> None:
    """Set what the student's decoder layers compute again in the backward pass; see the module.

    Attention that runs in no fused kernel (a softcap, a window shorter than the document) is
    computed again in `selective` too.

    Raises:
        UserError: the backbone's layers do not support it.
    """
    keep_attention = partial(create_selective_checkpoint_contexts, attention_ops())
    recompute = {
        "none": None,
        "layer": partial(checkpoint, use_reentrant=False),
        "selective": partial(checkpoint, use_reentrant=False, context_fn=keep_attention),
        "offload": _checkpoint_offloaded,
    }[mode]
    # By hand: the model's own method has one name up to transformers 5.22 and another after it.
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
    # The student's own mode decides which layers are in training mode, which checkpointing needs.
    student.train(student.training)


def attention_ops() -> list[torch._ops.OpOverload]:
    """The fused attentions that this torch has."""
    spaces = (name.split(".") for name in ATTENTION_OPS)
    packets = (getattr(getattr(torch.ops, space), name, None) for space, name in spaces)
    return [packet.default for packet in packets if packet is not None]


def loss_chunk_tokens(loss: LossConfig, head_weight: Tensor) -> int:
    """`loss.chunk_tokens`, or where that is 0 what the head's device has room for now.

    It decides time and memory, and no more than last bits of the result: on a CPU (MKL) none as
    long as every chunk, the last one included, has 4 tokens or more; a GPU may pick another matrix
    product for another number of rows. Free memory differs from run to run, so a run asks once and
    writes the number down.
    """
    if loss.chunk_tokens:
        return loss.chunk_tokens
    device, free_bytes = head_weight.device, None
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free_bytes = torch.cuda.mem_get_info(device)[0] + unused
    return auto_chunk_tokens(head_weight.shape[0], head_weight.itemsize, free_bytes)


def auto_chunk_tokens(vocab_size: int, itemsize: int, free_bytes: int | None) -> int:
    """Tokens of a chunk of the loss: 512 on a CPU, on a GPU the power of two that fits.

    Args:
        vocab_size: V; a token has the logits of student and teacher.
        itemsize: bytes of a logit.
        free_bytes: the GPU's, before the first step; None: a CPU.
    """
    if free_bytes is None:
        return CPU_LOSS_CHUNK_TOKENS
    smallest, largest = GPU_LOSS_CHUNK_TOKENS
    fitting = int(free_bytes * LOSS_MEMORY_SHARE) // (2 * vocab_size * itemsize)
    return min(largest, max(smallest, 1 << fitting.bit_length() >> 1))


def _checkpoint_offloaded(function: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401 - a layer's own arguments and result
    # Inside, the checkpoint's own hooks come first: only the layer's inputs reach these.
    with saved_tensors_hooks(to_host, to_device):
        return checkpoint(function, *args, use_reentrant=False)


# Not `torch.autograd.graph.save_on_cpu(pin_memory=True)`: it copies host tensors too, and in older
# releases of torch the host waits for each copy (pytorch/pytorch#175421).
def to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """The tensor's device and its copy in pinned host memory; a host tensor itself."""
    if tensor.device.type == "cpu":
        return tensor.device, tensor
    # Both copies are queued on the stream that computes, so that neither side ever waits.
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return tensor.device, host.copy_(tensor, non_blocking=True)


def to_device(packed: tuple[torch.device, Tensor]) -> Tensor:
    """What `to_host` was given."""
    device, tensor = packed
    return tensor.to(device, non_blocking=True)
