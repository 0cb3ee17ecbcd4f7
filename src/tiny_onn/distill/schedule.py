"""Learning rate schedules of the two systems: a rise, a constant rate and a linear fall to zero."""

from typing import NamedTuple

import torch

from tiny_onn.config.schema import OptimConfig


class LrFactor(NamedTuple):
    """The current learning rates as shares of the peak rates."""

    experts: float
    gates: float

    @property
    def norms(self) -> float:
        """The share of the norms' gains, which follow the experts' schedule."""
        return self.experts


def lr_factor(progress: float, config: OptimConfig) -> LrFactor:
    """Return the shares of the peak rates at `progress` in [0, 1]: rise, constant, linear fall."""
    return LrFactor(
        experts=_trapezoid(progress, config.warmup_fraction, config.decay_fraction),
        gates=_trapezoid(progress, config.gate_warmup_fraction, config.gate_decay_fraction),
    )


def _trapezoid(progress: float, warmup: float, decay: float) -> float:
    rising = progress / warmup if warmup else 1.0
    falling = (1 - progress) / decay if decay else 1.0
    return max(0.0, min(1.0, rising, falling))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: LrFactor) -> None:
    """Set each group's learning rate to its system's share of the group's peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * getattr(factor, group["system"])
