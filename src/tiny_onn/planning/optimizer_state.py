"""The memory that optimizers of experts take: their state, and what one step of Muon holds."""

from collections.abc import Sequence
from math import prod

from tiny_onn.config.schema import OptimizerName

# Muon steps weights together, of about so many numbers.
MUON_ELEMENTS = 2**24
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
