"""The elementwise parts of the expert layer, shared by its paths: plain functions to compile.

Their arithmetic is float32 (float64 for float64 inputs), whatever the inputs' number format is.

Legend: T tokens, E experts, I expert width.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tiny_onn.config.schema import Surprise
from tiny_onn.console import say
from tiny_onn.errors import printable

Activation = Callable[[Tensor], Tensor]


class NeuronState(NamedTuple):
    """The neurons of computed pairs of token and expert, as a backward pass knows them."""

    pre: Tensor
    """Pre-activations of gate and up, (..., 2, I)."""
    grad_hidden: Tensor
    """Gradient at the hidden activations, at unit routing weight, (..., I)."""
    activation: Activation


def activation_and_slope(
    activation: Activation, gate: Float[Tensor, "..."]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Return `act(gate)` and `act'(gate)` of any elementwise activation, by differentiating it."""
    # torch.compile cannot trace torch.func.jvp with a symbolic number of tokens (2.13).
    value, pull_back = torch.func.vjp(activation, gate)  # pyright: ignore[reportAssignmentType]
    return value, pull_back(torch.ones_like(value))[0]


def hidden_region(
    gate_up_TE2I: Float[Tensor, "tokens experts 2 width"],
    weights_TE: Float[Tensor, "tokens experts"],
    activation: Activation,
) -> Float[Tensor, "tokens experts width"]:
    """Return routed hidden activations, `weights * act(gate) * up`, in the inputs' format."""
    gate, up = to_math_dtype(gate_up_TE2I[:, :, 0]), to_math_dtype(gate_up_TE2I[:, :, 1])
    hidden = activation(gate) * up * weights_TE[..., None].to(gate.dtype)
    return hidden.to(gate_up_TE2I.dtype)


def gradient_region(
    gate_up_TE2I: Float[Tensor, "tokens experts 2 width"],
    grad_hidden_TEI: Float[Tensor, "tokens experts width"],
    weights_TE: Float[Tensor, "tokens experts"],
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return everything elementwise in the backward pass of the layer.

    `grad_hidden_TEI` is the gradient at the hidden activations before the routing weight.

    Returns:
        Routed hidden (T, E, I); routed gradient of gate and up (T, E, 2, I); and, in float32, the
        sums over the width (T, E) of: the squared unrouted gradients of gate and up, the squared
        unrouted hidden, and hidden times its gradient (`<grad_y, expert_e(x)>`).
    """
    gate, up = to_math_dtype(gate_up_TE2I[:, :, 0]), to_math_dtype(gate_up_TE2I[:, :, 1])
    grad_hidden = to_math_dtype(grad_hidden_TEI)
    value, slope = activation_and_slope(activation, gate)
    hidden = value * up
    grad_gate = grad_hidden * up * slope
    grad_up = grad_hidden * value
    weights_TE1 = weights_TE[..., None].to(gate.dtype)
    dtype = gate_up_TE2I.dtype
    # The parts are rounded before they are stacked: otherwise the compiler would first write the
    # whole stack in float32.
    return (
        (hidden * weights_TE1).to(dtype),
        torch.stack(
            ((grad_gate * weights_TE1).to(dtype), (grad_up * weights_TE1).to(dtype)), dim=2
        ),
        (grad_gate.square() + grad_up.square()).sum(-1),
        hidden.square().sum(-1),
        (hidden * grad_hidden).sum(-1),
    )


def gram_coefficients(kind: Surprise, neurons: NeuronState) -> Float[Tensor, "..."]:
    """Return the coefficients of the weight rows whose sum's norm is the surprise, in float32.

    They are the hidden activations (..., I), which weigh the rows of `down_proj`, for `magnitude`,
    and the gradients at the pre-activations (..., 2 I), which weigh those of `gate_up_proj`, for
    `input`.
    """
    gate, up = (to_math_dtype(part) for part in neurons.pre.unbind(-2))
    if kind == "magnitude":
        return neurons.activation(gate) * up
    value, slope = activation_and_slope(neurons.activation, gate)
    grad_hidden = to_math_dtype(neurons.grad_hidden)
    return torch.cat((grad_hidden * up * slope, grad_hidden * value), dim=-1)


def squared_norm_region(x_TD: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens 1"]:
    """Return each row's squared L2 norm, in float32."""
    return to_math_dtype(x_TD).square().sum(-1, keepdim=True)


def region_of(region: Callable[..., Any], *, compiled: bool) -> Callable[..., Any]:
    """Return the region compiled if `compiled` is true, else as it is."""
    return compiled_region(region) if compiled else region


@functools.cache
def compiled_region(region: Callable[..., Any]) -> Callable[..., Any]:
    """Return the region compiled, which happens once per process and region."""
    separate_compiled_code()
    return torch.compile(region, fullgraph=True)


@functools.cache
def cpu_compiles() -> bool:
    """Return True if torch.compile works on this CPU; if not, say so. The first call takes seconds.

    The compiler needs a C++ compiler and Python's headers, which not every machine has.
    """
    separate_compiled_code()
    try:
        torch.compile(torch.sin, fullgraph=True)(torch.ones(64))
    except RuntimeError as error:
        reason = printable(str(error).partition("\n")[0])
        say(
            "train.compile: steps run uncompiled and slower, as torch.compile fails here"
            f" ({reason}); install a C++ compiler and Python's headers"
        )
        return False
    return True


def separate_compiled_code() -> None:
    """Give compiled code a cache folder of its own for each CPU instruction set.

    torch's cache of compiled code (2.13) does not tell vector widths apart: code that was generated
    for AVX2 is also handed to a process that runs with AVX-512, where it writes past the ends of
    its arrays. Both can meet in one home folder that several machines share, or where the
    environment variable ATEN_CPU_CAPABILITY differs between runs.
    """
    # Naming the compiler imports it, which takes a second.
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # noqa: PLC0415

    amx = "-AMX" if torch.cpu._is_amx_tile_supported() else ""
    name = f"{torch.backends.cpu.get_cpu_capability()}{amx}".replace(" ", "-")
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir())
    if folder.name != name:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / name)


def to_math_dtype(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return the tensor in float32; a float64 tensor stays as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
