"""The global norms of a step's gradients, and their clipping."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tiny_onn.distill.optim import SplitOptimizer
from tiny_onn.distill.units import norm_in_units
from tiny_onn.model.full_sharding import is_sharded, local_part
from tiny_onn.model.norms import norm_gains
from tiny_onn.model.student import TinyOnnForCausalLM, split_parameters
from tiny_onn.parallel import ALONE, World


def clip_gradients(
    student: TinyOnnForCausalLM, clip_norm: float, optimizer: torch.optim.Optimizer | None = None
) -> tuple[Tensor | float, Tensor | float]:
    """Clip the gradients of experts and of gates apart, each by its global L2 norm.

    Gains of norms that learn are clipped with the experts.

    Args:
        student: The model with its gradients.
        clip_norm: The largest norm.
        optimizer: The student's optimizer; gradients of weights to which it gives a unit count, and
            are measured, as those of the weight in units.

    Returns:
        The norms before clipping, of the experts and of the gates; float32 in every format.
    """
    ours = isinstance(optimizer, SplitOptimizer)
    unit_of = optimizer.unit if ours else lambda _: None
    world = optimizer.world if ours else ALONE
    experts, gates = (list(system.values()) for system in split_parameters(student))
    experts += norm_gains(student).values()
    return _clip(experts, clip_norm, unit_of, world), _clip(gates, clip_norm, unit_of, world)


def _clip(
    parameters: list[nn.Parameter],
    clip_norm: float,
    unit_of: Callable[[nn.Parameter], Tensor | None],
    world: World,
) -> Tensor | float:
    learning = [p for p in parameters if p.grad is not None]
    if not learning:
        return 0.0
    parts, norms = [local_part(p) for p in learning], []
    for p, part in zip(learning, parts, strict=True):
        assert part.grad is not None
        unit = unit_of(p)
        if unit is None:
            norms.append(torch.linalg.vector_norm(part.grad, dtype=torch.float32)[None])
        else:
            norms.append(norm_in_units(part.grad, unit))
    shares = [norm for norm, p in zip(norms, learning, strict=True) if is_sharded(p)]
    if shares:
        # The squares of a weight's shares add up to its own.
        squares = torch.cat(shares).square_()
        world.all_reduce_sum([squares])
        sizes = [len(share) for share in shares]
        for share, square in zip(shares, squares.split(sizes), strict=True):
            share.copy_(square.sqrt())
    norm = torch.linalg.vector_norm(torch.cat(norms))
    nn.utils.clip_grads_with_norm_(parts, clip_norm, norm, foreach=True)
    return norm
