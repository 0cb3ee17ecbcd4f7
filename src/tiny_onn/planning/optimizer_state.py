"""Memory of the state of the experts' optimizers, and memory and FLOPs of a step of Muon.

Legend: D hidden, E experts, I expert width.
"""

from collections.abc import Sequence
from math import prod
from types import MappingProxyType
from typing import Literal

from tiny_onn.config.schema import DType, OptimizerName

DeviceType = Literal["cpu", "cuda"]

# Muon steps experts together whose weights have about so many numbers: a GPU waits for the host to
# launch the products of each such group, and on a CPU small groups stay in caches.
MUON_ELEMENTS = MappingProxyType({"cpu": 2**23, "cuda": 2**25})
# The iterations of its step in each of two parts, which begin with gram matrices.
MUON_ITERATIONS = (2, 3)
# bitsandbytes keeps 32-bit state of tensors below this size, a scale for each block of numbers, and
# a quantisation map for each of Adam's two moments.
MIN_8BIT_SIZE = 4096
BLOCK_SIZE_8BIT = 256
_QMAP_BYTES = 256 * 4


def state_bytes(name: OptimizerName, shape: Sequence[int]) -> int:
    """Return the bytes of optimizer state of one expert tensor, counters left out.

    The shape is what the optimizer sees, (2, E, I, D) or (E, I, D), or that of vectors.
    """
    size = prod(shape)
    if name == "muon" and len(shape) > 2:
        return 4 * size
    if name == "adafactor":
        return 4 * (size // shape[-1] + size // shape[-2])
    if name in ("adamw", "muon") or size < MIN_8BIT_SIZE:
        return 8 * size
    return 2 * (size + 4 * -(-size // BLOCK_SIZE_8BIT) + _QMAP_BYTES)


def muon_bytes(
    num_layers: int,
    num_experts: int,
    width: int,
    hidden_dim: int,
    master_dtype: DType,
    *,
    device: DeviceType,
) -> int:
    """Return the most bytes that Muon adds to weights, gradients, state and rounding.

    Its step needs two float32 copies of the weights that are stepped together and four of their
    square products, then three and one. Those of bfloat16 masters are of one weight at a time, and
    freed before the random bits of its rounding are drawn.
    """
    expert, is_rounded = 2 * width * hidden_dim, master_dtype == "bfloat16"
    together = num_experts * (1 if is_rounded else num_layers)
    number = max(1, min(together, MUON_ELEMENTS[device] // expert))
    least, most = sorted((width, hidden_dim))
    held = 4 * number * expert * max(3 * most + least, 2 * most + 4 * least) // most
    return max(0, held - 4 * num_experts * expert) if is_rounded else held


def muon_flops(num_experts: int, width: int, hidden_dim: int) -> int:
    """Return the FLOPs of a layer's step, three matrices an expert, in float32."""
    least, most = sorted((width, hidden_dim))
    # A part multiplies squares once for its first iteration and four times for each other one, and
    # the wide matrices at its beginning and end.
    num_squares = sum(4 * number - 3 for number in MUON_ITERATIONS)
    num_wide = 2 * len(MUON_ITERATIONS)
    return 3 * num_experts * 2 * (num_wide * least**2 * most + num_squares * least**3)
