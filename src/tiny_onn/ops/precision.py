"""Autocast and the operators: each operator chooses its number formats once, by its input's.

`torch.autocast` casts the inputs of single matrix products, which is no use to an operator that
writes into tensors of its own and keeps sums in float32. An operator takes its input in autocast's
format, as a linear layer would, and runs, forward and backward, with autocast off.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def autocast_is_on(tensor: Tensor) -> bool:
    """Return whether autocast is on for the tensor's device."""
    kind = tensor.device.type
    # Asking raises for `meta`, which has no autocast. Asking whether a device has one would keep
    # torch 2.11 from compiling the code around it.
    return kind != "meta" and torch.is_autocast_enabled(kind)


def in_autocast_format(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return the tensor in autocast's number format.

    It stays as it is where autocast is off, and in float64, which torch's own casts leave alone.
    """
    if not autocast_is_on(tensor) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def without_autocast(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return the function with autocast off for the device of its first tensor argument."""

    @functools.wraps(function)
    def plain(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        tensors = (arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))
        first = next(tensors, None)
        if first is None or not autocast_is_on(first):
            return function(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return plain
