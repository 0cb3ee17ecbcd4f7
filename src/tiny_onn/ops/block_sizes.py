"""The sizes of blocks that kernels compute, which are powers of two."""


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()
