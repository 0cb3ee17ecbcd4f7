"""Shared experts: the first S of a layer are active for every token at weight 1.

Everything that chooses, weighs or teaches works on the columns of the routed experts, `routed`, as
if there were no others; `with_shared` puts the shared ones' columns back.

Legend: T tokens, E experts, S of them shared, R = E - S routed, F neurons.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def routed(table: Tensor, num_shared: int) -> Tensor:
    """The part of a tensor (..., E) that belongs to the routed experts: (..., R), a view."""
    return table[..., num_shared:] if num_shared else table


def with_shared(table: Tensor, num_shared: int, value: float | bool) -> Tensor:
    """A tensor (..., R) of the routed experts with `value` put before it for each shared one."""
    return F.pad(table, (num_shared, 0), value=value) if num_shared else table


def split_neurons(
    score_F: Float[Tensor, " neurons"], kept: Sequence[int], num_shared: int
) -> tuple[Int[Tensor, " shared"], Int[Tensor, " rest"]]:
    """The neurons of the shared experts, and all others by rising index; both on the CPU.

    Args:
        score_F: of each neuron; the largest are shared.
        kept: neurons that are shared before those.
        num_shared: how many neurons are shared, S * I.
    """
    ranked_F = kept_first(score_F.argsort(descending=True, stable=True).cpu(), kept)
    return ranked_F[:num_shared], ranked_F[num_shared:].sort().values


def kept_first(order_F: Int[Tensor, " neurons"], kept: Sequence[int]) -> Int[Tensor, " neurons"]:
    """The same neurons with `kept` moved to the front."""
    kept_K = torch.tensor(kept, dtype=order_F.dtype, device=order_F.device)
    return torch.cat((kept_K, order_F[~torch.isin(order_F, kept_K)]))
