"""Shared experts: the first S of a layer are active for every token at weight 1.

Selection, routing weights and the router's gradient are computed on the columns of the routed
experts (`routed`), as if there were no others; `with_shared` puts the shared ones' columns back.

Legend: T tokens, E experts, S of them shared, R = E - S routed, F neurons.
"""

import torch.nn.functional as F
from torch import Tensor


def routed(table: Tensor, num_shared: int) -> Tensor:
    """Return the view (..., R) of a tensor (..., E) that belongs to the routed experts."""
    return table[..., num_shared:] if num_shared else table


def with_shared(table: Tensor, num_shared: int, value: float | bool) -> Tensor:
    """Return (..., E): a tensor (..., R) of routed experts after `value` for each shared one."""
    return F.pad(table, (num_shared, 0), value=value) if num_shared else table
