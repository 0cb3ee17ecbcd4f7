"""Steps of generation that torch.compile compiles and captures in a CUDA graph, on a GPU.

A small model's step launches some 60 small kernels a layer, and waits for the host that launches
them. transformers compiles and captures the step by itself where the cache of keys and values has a
fixed length, so that giving it such a cache is all there is to do.
"""

import torch
from transformers import PreTrainedModel, StaticCache

from tiny_onn.errors import UserError
from tiny_onn.model.quantized_experts import QuantizeTo
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.ops.block_sizes import power_of_two

MIN_CACHE_TOKENS = 512


def check_compiled(device: torch.device, quantize: QuantizeTo) -> None:
    """Refuse to compile on a device, or with quantised experts, where it does not work.

    Raises:
        UserError: the device is no GPU, or the experts are quantised.
    """
    if device.type != "cuda":
        raise UserError(
            f"--compile: got the device {device.type}, expected a GPU, cuda; leave --compile out"
        )
    if quantize != "none":
        raise UserError(
            f"--compile: got it with --quantize {quantize}, expected one of the two; leave one out"
        )


def check_controller(student: TinyOnnForCausalLM) -> None:
    """Refuse to compile the step of a student whose budget follows each sequence.

    Raises:
        UserError: it does.
    """
    if student.routing_controller != "none":
        raise UserError(
            f"--compile: got a student with the routing_controller {student.routing_controller!r},"
            " expected none, because this one's step cannot be compiled; leave --compile out"
        )


def fixed_cache(network: PreTrainedModel, num_tokens: int) -> StaticCache:
    """Return a cache of fixed length for at least `num_tokens` tokens.

    Lengths are powers of two, so that most answers of a conversation share a compiled step.
    """
    length = max(MIN_CACHE_TOKENS, power_of_two(num_tokens))
    return StaticCache(config=network.config.get_text_config(), max_cache_len=length)
