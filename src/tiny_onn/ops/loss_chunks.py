"""The choice of the number of tokens that the distillation loss projects at once."""

import torch
from torch import Tensor

from tiny_onn.config.schema import LossConfig

CPU_LOSS_CHUNK_TOKENS = 512
# Matrix products are slow below the smaller number. Above the larger one more memory buys no time:
# 32,768 tokens took an H100 121 ms and 0.93 GiB in chunks of 1,024, 119 ms and
# 1.80 GiB in chunks of 2,048 (`gpu.py --sections loss`, V 151,936).
GPU_LOSS_CHUNK_TOKENS = (128, 1024)
# The logits may take this share of the memory that is free before the first step.
LOSS_MEMORY_SHARE = 1 / 16


def loss_chunk_tokens(loss: LossConfig, head_weight: Tensor) -> int:
    """Return `loss.chunk_tokens`, or where that is 0 as many as the head's device has room for now.

    The number decides time and memory, and at most the last bits of the result. On a CPU (MKL) it
    changes no bit as long as every chunk, the last one included, has 4 tokens or more; a GPU may
    pick another matrix product for another number of rows. Free memory differs from run to run, so
    a run asks once and writes the number down.
    """
    if loss.chunk_tokens:
        return loss.chunk_tokens
    device, free_bytes = head_weight.device, None
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free_bytes = torch.cuda.mem_get_info(device)[0] + unused
    return auto_chunk_tokens(head_weight.shape[0], head_weight.itemsize, free_bytes)


def auto_chunk_tokens(vocab_size: int, itemsize: int, free_bytes: int | None) -> int:
    """Return the tokens of a chunk of the loss: 512 on a CPU, the power of two that fits on a GPU.

    Args:
        vocab_size: number of logits V that a token has of the student, and of the teacher.
        itemsize: bytes of a logit.
        free_bytes: free memory of the GPU before the first step; None: a CPU.
    """
    if free_bytes is None:
        return CPU_LOSS_CHUNK_TOKENS
    smallest, largest = GPU_LOSS_CHUNK_TOKENS
    fitting = int(free_bytes * LOSS_MEMORY_SHARE) // (2 * vocab_size * itemsize)
    return min(largest, max(smallest, 1 << fitting.bit_length() >> 1))
