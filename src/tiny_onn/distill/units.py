"""Units of learning: each weight measured by its own root mean square at the start of the run.

A rate of 0.001 is a change of a thousandth of a weight in every model only if weights are measured
by their own scale, which families of models choose differently: the MLP weights of SmolLM2-135M
have a root mean square of 0.19, those of Gemma-3-270M of 0.013 to 0.04. With units u, an optimizer
sees the weights w / u and the gradients u g. Rates, weight decay, the optimizers' eps and the norm
to which gradients are clipped are then free of scale: a factor on a teacher's `up_proj` that is
taken back in its `down_proj` changes no loss of the run.

Source: Adafactor's parameter scaling (arXiv 1804.04235, section 8), with the scale of the start in
place of the current one, so that a step's size does not feed on the steps before.

Legend: E experts, I expert width, D hidden.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tiny_onn.model.full_sharding import full_tensor

Units = Mapping[nn.Parameter, Tensor]
STACKED = "gate_up_proj"
"""The weight that holds two, gates and ups, in its rows."""


@torch.no_grad()
def start_units(parameters: Mapping[str, nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Return the root mean square of each weight, for an expert's gate and up rows apart.

    Vectors (biases, thresholds, experts' scales) are factors or logits, whose size does not depend
    on a model's scale, and have no unit. A weight that is 0 everywhere has the unit 1.

    Returns:
        Float32 tensors: (2,) for `gate_up_proj`, gates first, and one number for any other weight.
    """
    units = {}
    for name, parameter in parameters.items():
        if parameter.ndim < 2:
            continue
        norm = _norm(full_tensor(parameter.detach()), stacked=name.endswith(STACKED))
        unit = norm / (parameter.numel() / norm.numel()) ** 0.5
        units[parameter] = torch.where(unit > 0, unit, 1.0)
    return units


def norm_in_units(
    gradient: Tensor, unit: Float[Tensor, "#halves"] | Float[Tensor, ""]
) -> Float[Tensor, " halves"]:
    """Return the L2 norm of a gradient with respect to a weight in units; one for each unit."""
    return (_norm(gradient, stacked=unit.ndim > 0) * unit).reshape(-1)


def in_units_(weight: Tensor, gradient: Tensor, unit: Tensor) -> None:
    """Turn a weight and its gradient, in place, into those of the weight divided by its unit.

    Args:
        weight: The weight as it is stored, or gate and up weights neuron by neuron, (2, E, I, D).
        gradient: The loss' gradient, of the same shape.
        unit: The weight's unit.
    """
    # The quotient times the unit is the weight again, but for a rounding that does not repeat. The
    # product with 1 / unit could drift by a rounding at every step.
    for tensor, operation in ((weight, "div_"), (gradient, "mul_")):
        view, factor = _broadcast(tensor, unit)
        getattr(view, operation)(factor)


def out_of_units_(weight: Tensor, unit: Tensor) -> None:
    """Multiply a weight, in place, by its unit."""
    view, factor = _broadcast(weight, unit)
    view.mul_(factor)


def _broadcast(tensor: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Return a view of the tensor and a view of the unit that broadcasts to it."""
    if unit.ndim == 0:
        return tensor, unit
    halves_first = tensor.ndim == 4
    return (
        (tensor, unit[:, None, None, None])
        if halves_first
        else (tensor.unflatten(1, (2, -1)), unit[:, None, None])
    )


def _norm(tensor: Tensor, *, stacked: bool) -> Tensor:
    if not stacked:
        return torch.linalg.vector_norm(tensor, dtype=torch.float32)
    halves = tensor.unflatten(1, (2, -1))
    return torch.linalg.vector_norm(halves, dim=(0, 2, 3), dtype=torch.float32)
