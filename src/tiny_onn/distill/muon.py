"""Muon: each expert's matrices move by their momentum made orthogonal.

`torch.optim.Muon` takes one matrix at a time, which for the thousands of small ones of a student is
thousands of launches. Here matrices of one shape are stepped together.

Legend: N weights, E experts, R rows, C columns.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tiny_onn.planning.optimizer_state import MUON_ELEMENTS

# Coefficients of a x + b x^3 + c x^5, which in 5 steps brings singular values from 0.01 to 1 of the
# largest near 1 (Jordan et al., below).
QUINTIC = (3.4445, -4.7750, 2.0315)
NUM_STEPS = 5
# The root mean square of a step at rate 1. Steps of AdamW have 0.2 to 0.4 (arXiv 2502.16982,
# section 2.2), so that about the same rate fits both.
STEP_RMS = 0.4


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum, for weights (E, H R, C) that stack H matrices of each expert.

    The state of a weight is its momentum. The group's weights have one shape.

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
            lr, decay, num_stacked = (group[k] for k in ("lr", "momentum", "num_stacked"))
            for weights in _batches([p for p in group["params"] if p.grad is not None]):
                ahead = torch.stack([self._ahead(p, decay) for p in weights])
                steps = orthogonal(ahead.unflatten(-2, (num_stacked, -1)))
                size = STEP_RMS * max(steps.shape[-2:]) ** 0.5
                for p, step in zip(weights, steps, strict=True):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(step.reshape(p.shape), alpha=-lr * size)

    def _ahead(self, weight: Tensor, decay: float) -> Tensor:
        """Return the momentum, updated, as far ahead as Nesterov's method looks."""
        assert weight.grad is not None
        if "momentum_buffer" not in self.state[weight]:
            self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        momentum = self.state[weight]["momentum_buffer"].lerp_(weight.grad, 1 - decay)
        return weight.grad.lerp(momentum, decay)


def orthogonal(
    matrices: Float[Tensor, "*batch rows columns"],
) -> Float[Tensor, "*batch rows columns"]:
    """Return about `U V^T` for each matrix `U S V^T`, with singular values of 0.7 to 1.2.

    A matrix of zeros stays one, and singular values below 0.01 of the matrix's norm become smaller.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    # The gradient of an expert that no token has used for long may be too small for its norm.
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-12)
    shape, x = x.shape, x.flatten(0, -3)
    a, b, c = QUINTIC
    for _ in range(NUM_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.view(shape)
    return x if wide else x.mT


def _batches(weights: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    number = max(1, MUON_ELEMENTS // weights[0].numel()) if weights else 1
    return (weights[first : first + number] for first in range(0, len(weights), number))
