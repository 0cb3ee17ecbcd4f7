"""Shared experts: the first S of a layer are active for every token at weight 1.

Everything that chooses, weighs or teaches works on the columns of the routed experts, `routed`, as
if there were no others; `with_shared` puts the shared ones' columns back.

Legend: T tokens, E experts, S of them shared, R = E - S routed, F neurons.
"""

import torch.nn.functional as F
from torch import Tensor


def routed(table: Tensor, num_shared: int) -> Tensor:
    """The part of a tensor (..., E) that belongs to the routed experts: (..., R), a view."""
    return table[..., num_shared:] if num_shared else table


def with_shared(table: Tensor, num_shared: int, value: float | bool) -> Tensor:
    """A tensor (..., R) of the routed experts with `value` put before it for each shared one."""
    return F.pad(table, (num_shared, 0), value=value) if num_shared else table
