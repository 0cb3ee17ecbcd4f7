"""The stacked expert weights as matrix products want them, and their gradients as they are stored.

Legend: D hidden, E experts, I expert width, J = 2 * I gate and up rows, F = E * I neurons.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class ExpertWeights(NamedTuple):
    """The stacked weights of one layer's experts."""

    gate_up_EJD: Float[Tensor, "experts rows hidden"]
    down_EDI: Float[Tensor, "experts hidden width"]


def joined_down(
    down_EDI: Float[Tensor, "experts hidden width"], dtype: torch.dtype
) -> Float[Tensor, "hidden neurons"]:
    """Return all experts' down projections side by side, as a dense MLP has them, in `dtype`.

    The copy moves whole rows of I numbers. Weights that are stored a row per neuron
    (`Experts.store_by_neuron`) need no copy but the cast.
    """
    E, D, I = down_EDI.shape
    if down_EDI.mT.is_contiguous():
        return down_EDI.mT.to(dtype).view(E * I, D).T
    return cast_copy(down_EDI.transpose(0, 1), dtype).view(D, E * I)


def parted_down(
    joined_DF: Float[Tensor, "hidden neurons"], like_EDI: Float[Tensor, "experts hidden width"]
) -> Float[Tensor, "experts hidden width"]:
    """Undo `joined_down`: return a contiguous copy in the shape and number format of `like_EDI`."""
    E, D, I = like_EDI.shape
    return cast_copy(joined_DF.view(D, E, I).transpose(0, 1), like_EDI.dtype)


def cast_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous copy in the number format `dtype`, made in one pass."""
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)
