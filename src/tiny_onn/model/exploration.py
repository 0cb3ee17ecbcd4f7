"""Exploration: some tokens try an expert that they did not choose, so that it becomes known.

Legend: T tokens, E experts.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Exploration:
    """The tokens that try an expert which they did not choose, by random draws."""

    fraction: float
    """Share of tokens that try one."""
    seed: int
    """Seed of the draws: layers that are computed again use it again and repeat the draws."""


def explore(
    active_TE: Bool[Tensor, "tokens experts"],
    logits_TE: Float[Tensor, "tokens experts"],
    exploration: Exploration,
) -> Bool[Tensor, "tokens experts"]:
    """Swap the weakest active expert of some tokens for a random inactive one.

    The draws depend on the seed alone, the number of a token's experts does not change, and a
    token that uses all experts or none stays as it is.
    """
    generator = torch.Generator(active_TE.device).manual_seed(exploration.seed)
    draws_TE = torch.rand(active_TE.shape, generator=generator, device=active_TE.device)
    chance_T = torch.rand(len(active_TE), generator=generator, device=active_TE.device)
    some_T = active_TE.any(-1) & ~active_TE.all(-1) & (chance_T < exploration.fraction)
    weakest_T1 = logits_TE.masked_fill(~active_TE, float("inf")).argmin(-1, keepdim=True)
    stranger_T1 = draws_TE.masked_fill(active_TE, -1.0).argmax(-1, keepdim=True)
    swapped_TE = active_TE.scatter(-1, weakest_T1, False).scatter(-1, stranger_T1, True)
    return torch.where(some_T[:, None], swapped_TE, active_TE)
