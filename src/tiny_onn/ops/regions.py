"""The elementwise regions of the expert layer, shared by its paths: plain functions to compile.

Arithmetic is float32 (float64 for float64 inputs) whatever the inputs' number format.

Legend: T tokens, E experts, I expert width.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def activation_and_slope(
    activation: Activation, gate: Float[Tensor, "..."]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """`act(gate)` and `act'(gate)`, by differentiating any elementwise activation."""
    # Not torch.func.jvp: torch.compile cannot trace it with a symbolic number of tokens (2.13).
    value, pull_back = torch.func.vjp(activation, gate)  # pyright: ignore[reportAssignmentType]
    return value, pull_back(torch.ones_like(value))[0]


def hidden_region(
    gate_up_TE2I: Float[Tensor, "tokens experts 2 width"],
    weights_TE: Float[Tensor, "tokens experts"],
    activation: Activation,
) -> Float[Tensor, "tokens experts width"]:
    """Routed hidden activations: `weights * act(gate) * up`, in the inputs' number format."""
    gate, up = wide(gate_up_TE2I[:, :, 0]), wide(gate_up_TE2I[:, :, 1])
    hidden = activation(gate) * up * weights_TE[..., None].to(gate.dtype)
    return hidden.to(gate_up_TE2I.dtype)


def gradient_region(
    gate_up_TE2I: Float[Tensor, "tokens experts 2 width"],
    grad_hidden_TEI: Float[Tensor, "tokens experts width"],
    weights_TE: Float[Tensor, "tokens experts"],
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything elementwise in the backward pass, from the gradient at the unrouted hidden.

    Returns:
        Routed hidden (T, E, I); routed gradient of gate and up (T, E, 2, I); and, in float32, the
        sums over the width (T, E) of: the squared unrouted gradients of gate and up, the squared
        unrouted hidden, and hidden times its gradient (`<grad_y, expert_e(x)>`).
    """
    gate, up = wide(gate_up_TE2I[:, :, 0]), wide(gate_up_TE2I[:, :, 1])
    grad_hidden = wide(grad_hidden_TEI)
    value, slope = activation_and_slope(activation, gate)
    hidden = value * up
    grad_gate = grad_hidden * up * slope
    grad_up = grad_hidden * value
    weights_TE1 = weights_TE[..., None].to(gate.dtype)
    dtype = gate_up_TE2I.dtype
    # Rounded before they are stacked: the compiler would write the whole stack in float32 first.
    return (
        (hidden * weights_TE1).to(dtype),
        torch.stack(
            ((grad_gate * weights_TE1).to(dtype), (grad_up * weights_TE1).to(dtype)), dim=2
        ),
        (grad_gate.square() + grad_up.square()).sum(-1),
        hidden.square().sum(-1),
        (hidden * grad_hidden).sum(-1),
    )


def squared_norm_region(x_TD: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens 1"]:
    """Each row's squared L2 norm, in float32."""
    return wide(x_TD).square().sum(-1, keepdim=True)


def region_of(region: Callable[..., Any], *, compiled: bool) -> Callable[..., Any]:
    """The region as it is, or compiled."""
    return compiled_region(region) if compiled else region


@functools.cache
def compiled_region(region: Callable[..., Any]) -> Callable[..., Any]:
    """The region compiled, once per process and region."""
    separate_compiled_code()
    return torch.compile(region, fullgraph=True)


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


def wide(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """In float32, or float64 as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
