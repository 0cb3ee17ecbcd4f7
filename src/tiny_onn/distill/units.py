"""Units of learning: each weight measured by its own root mean square at the start of the run.

A rate of 0.001 is a change of a thousandth of a weight in every model only if weights are measured
by their own scale, which families of models choose differently: the MLP weights of SmolLM2-135M
have a root mean square of 0.19, those of Gemma-3-270M of 0.013 to 0.04. With units u, an optimizer
sees the weights w / u and the gradients u g, except for Muon, which multiplies its steps by u: they
do not depend on the scale of gradients. Rates, weight decay, the optimizers' eps and the norm
to which gradients are clipped are then free of scale: a factor on a teacher's `up_proj` that is
taken back in its `down_proj` changes no loss of the run.

Source: Adafactor's parameter scaling (arXiv 1804.04235, section 8), with the scale of the start in
place of the current one, so that a step's size does not feed on the steps before.

Legend: E experts, I expert width, D hidden.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tiny_onn.model.full_sharding import full_tensor
from tiny_onn.model.norms import gain_unit, learned_norms
from tiny_onn.model.student import TinyOnnForCausalLM

Units = Mapping[nn.Parameter, Tensor]
STACKED = "gate_up_proj"
"""The weight that holds two, gates and ups, in its rows."""


@torch.no_grad()
def start_units(parameters: Mapping[str, nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Return the root mean square of each weight, for an expert's gate and up rows apart.

    Vectors (biases, thresholds, experts' scales) are factors or logits, whose size does not depend
    on a model's scale, and have no unit; gains of norms have one by `norm_units`. A weight that is
    0 everywhere has the unit 1.

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


def norm_units(student: TinyOnnForCausalLM) -> dict[nn.Parameter, Tensor]:
    """Return the unit of each gain that learns: the root mean square of its norm's factors.

    Unlike other vectors gains have a scale of their own, which families choose differently.
    """
    norms = learned_norms(student).values()
    return {norm.get_parameter("weight"): gain_unit(norm) for norm in norms}


def norm_in_units(
    gradient: Tensor, unit: Float[Tensor, "#halves"] | Float[Tensor, ""]
) -> Float[Tensor, " halves"]:
    """Return the L2 norm of a gradient with respect to a weight in units; one for each unit."""
    return (_norm(gradient, stacked=unit.ndim > 0) * unit).reshape(-1)


def in_units_(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], units: Sequence[Tensor]
) -> None:
    """Turn weights and their gradients, in place, into those of the weights divided by their units.

    Args:
        weights: Weights as they are stored, or gate and up weights neuron by neuron, (2, E, I, D).
        gradients: The loss' gradients, of the same shapes.
        units: The weights' units.
    """
    # The quotient times the unit is the weight again, but for a rounding that does not repeat. The
    # product with 1 / unit could drift by a rounding at every step.
    if weights:
        torch._foreach_div_(*_broadcast(weights, units))  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(*_broadcast(gradients, units))  # pyright: ignore[reportPrivateImportUsage]


def out_of_units_(weights: Sequence[Tensor], units: Sequence[Tensor]) -> None:
    """Multiply weights, in place, by their units."""
    if weights:
        torch._foreach_mul_(*_broadcast(weights, units))  # pyright: ignore[reportPrivateImportUsage]


def _broadcast(
    tensors: Sequence[Tensor], units: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return views of tensors and views of their units that broadcast to them."""
    views, factors = [], []
    for tensor, unit in zip(tensors, units, strict=True):
        halves_last = unit.ndim > 0 and tensor.ndim < 4
        views.append(tensor.unflatten(1, (2, -1)) if halves_last else tensor)
        factors.append(
            unit if unit.ndim == 0 else unit.view(2, 1, 1, *(() if halves_last else (1,)))
        )
    return views, factors


def _norm(tensor: Tensor, *, stacked: bool) -> Tensor:
    if not stacked:
        return torch.linalg.vector_norm(tensor, dtype=torch.float32)
    halves = tensor.unflatten(1, (2, -1))
    return torch.linalg.vector_norm(halves, dim=(0, 2, 3), dtype=torch.float32)
