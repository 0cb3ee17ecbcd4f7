"""What two processes wrote of their steps, and how it is compared with one process."""

import torch
from safetensors.torch import load_file


def results(folder, name):
    """What each of the two processes returned."""
    return [load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1)]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor.nan_to_num(7), other[name].nan_to_num(7)), name


def assert_weights_move_alike(first, expected):
    """Nearly all weights of experts and gates end at the same place.

    Adam divides a gradient by its size, so that an element whose gradient is rounding error may
    move the other way. All other elements move alike.
    """
    moved = close = 0
    for key, tensor in expected.items():
        if key.startswith("student") and (".experts." in key or key.endswith("router.weight")):
            close += int(torch.isclose(first[key], tensor, rtol=0, atol=1e-5).sum())
            moved += tensor.numel()
    assert close >= 0.999 * moved
