"""Autocast and the operators: each chooses its number formats itself, once, from its input's.

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
    """Whether autocast is on for the tensor's device."""
    kind = tensor.device.type
    # A device without autocast, such as `meta`, may not be asked.
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def in_autocast_format(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The tensor in autocast's number format; as it is where autocast is off, or in float64.

    As torch's own casts do, which leave float64 alone.
    """
    if not autocast_is_on(tensor) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def without_autocast(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function with autocast off, whatever the caller has on for the first tensor's device."""

    @functools.wraps(function)
    def plain(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        tensors = (arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))
        first = next(tensors, None)
        if first is None or not autocast_is_on(first):
            return function(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return plain
