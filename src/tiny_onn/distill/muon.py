"""Muon: each expert's matrices move by their momentum made orthogonal.

`torch.optim.Muon` takes one matrix at a time, which for the thousands of small ones of a student is
thousands of launches. Here matrices of one shape are stepped together.

Legend: E experts, R rows, C columns.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tiny_onn.planning.optimizer_state import MUON_ELEMENTS, MUON_ITERATIONS

# Coefficients of a x + b x^3 + c x^5, which in 5 iterations brings singular values between 0.01 and
# 1 near 1 (Jordan et al., below).
QUINTIC = (3.4445, -4.7750, 2.0315)
# The root mean square of a step at rate 1. Steps of AdamW have 0.2 to 0.4 (arXiv 2502.16982,
# section 2.2), so that about the same rate fits both.
STEP_RMS = 0.4


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum, for weights (E, H R, C) that stack H matrices of each expert.

    The state of a weight is its momentum, and may have a `unit`, () or (H,), by which the steps of
    its matrices are multiplied. The group's weights have one shape, and all or none of them a unit.
    A matrix without a gradient other than 0 takes no step: made orthogonal, its fading momentum
    would give a step as large as any.

    Args:
        group: Weights, a learning rate and a decoupled weight decay.
        momentum: The decay of the momentum.
        num_stacked: H, the number of an expert's matrices whose rows a weight stacks.

    Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon. The size of a step is
    that of Liu et al., arXiv 2502.16982, section 2.2.
    """

    def __init__(self, group: dict[str, Any], momentum: float, num_stacked: int) -> None:
        super().__init__([group], {"momentum": momentum, "num_stacked": num_stacked})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            for weights, experts in _batches([p for p in group["params"] if p.grad is not None]):
                self._step(weights, experts, group)

    def _step(self, weights: Sequence[Tensor], experts: slice, group: dict[str, Any]) -> None:
        """Update the same experts of some weights together."""
        states = [self.state[p] for p in weights]
        for p, state in zip(weights, states, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
        gradients = [p.grad[experts] for p in weights if p.grad is not None]
        momenta = [state["momentum_buffer"][experts] for state in states]
        momentum, H = group["momentum"], group["num_stacked"]
        factors = torch.cat(gradients).unflatten(1, (H, -1)).ne(0).any((-2, -1))
        if "unit" in states[0]:
            units = torch.stack([state["unit"].expand(H) for state in states])
            factors = factors * units.repeat_interleave(len(gradients[0]), 0)
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
        ahead = torch.cat(
            torch._foreach_lerp(gradients, momenta, momentum)  # pyright: ignore[reportPrivateImportUsage]
        )
        steps = orthogonal(ahead.unflatten(1, (H, -1)))
        size = group["lr"] * STEP_RMS * max(steps.shape[-2:]) ** 0.5
        steps = steps.mul_(factors[..., None, None]).reshape(ahead.shape)
        parts = [p[experts] for p in weights]
        if decay := group["lr"] * group["weight_decay"]:
            torch._foreach_mul_(parts, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_sub_(parts, steps.split(len(parts[0])), alpha=size)  # pyright: ignore[reportPrivateImportUsage]


def orthogonal(
    matrices: Float[Tensor, "*batch rows columns"],
) -> Float[Tensor, "*batch rows columns"]:
    """Return about `U V^T` for each matrix `U S V^T`, with singular values of 0.7 to 1.2.

    A matrix of zeros stays one, and singular values below 0.01 of the matrix's norm become smaller.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).flatten(0, -3)
    # The norm of tiny numbers may round to 0.
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-12)
    # An iteration multiplies x by a polynomial of its gram matrix from the left, and these commute:
    # small square matrices stand for the wide ones. Iterations enlarge the rounding errors of the
    # smallest eigenvalues, above all those of TF32. New gram matrices half way keep them small.
    # A polynomial is held without its constant, which products add.
    a, b, c = QUINTIC
    for number in MUON_ITERATIONS:
        gram = torch.bmm(x, x.mT)
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = p.clone()
        product.diagonal(dim1=-2, dim2=-1).add_(a)
        for _ in range(number - 1):
            gram = torch.baddbmm(gram, p, gram, beta=a)
            gram = torch.baddbmm(gram, p, gram, beta=a)
            p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            product = torch.baddbmm(product, p, product, beta=a)
        del gram, p
        x = torch.bmm(product, x)
    return (x if wide else x.mT).view(matrices.shape)


def _batches(weights: Sequence[Tensor]) -> Iterator[tuple[Sequence[Tensor], slice]]:
    """Yield weights and the experts in them that are stepped together."""
    if not weights:
        return
    num_experts = len(weights[0])
    at_once = max(1, MUON_ELEMENTS[weights[0].device.type] // weights[0][0].numel())
    number = max(1, at_once // num_experts)
    for first in range(0, len(weights), number):
        for expert in range(0, num_experts, at_once):
            yield weights[first : first + number], slice(expert, expert + at_once)
