"""Mean outputs of experts on calibration text, which stand in for experts while they are inactive.

Legend: T tokens, D hidden, E experts, I expert width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_onn.data.packing import PackedRow
from tiny_onn.model.experts import ExpertBank
from tiny_onn.model.hooks import MlpInputs


@torch.no_grad()
def fit_compensation(inputs: MlpInputs, banks: Sequence[ExpertBank]) -> None:
    """Set each expert's `mean_outputs` to its mean output over the tokens that leave it inactive.

    Of all constants that could be added at those tokens, the mean leaves the smallest squared error
    of this expert alone. An expert that is active everywhere gets 0. Banks without the parameter
    are left alone. The sums take as much memory as the experts' hidden activations at one token.
    """
    device, shape = inputs.dense.device, banks[0].experts.down_proj.shape
    sums = [torch.zeros(shape[0], shape[2], device=device) for _ in banks]
    counts = [torch.zeros(shape[0], device=device) for _ in banks]

    def observe(index: int, x_TD: Tensor, row: PackedRow) -> None:
        bank, x_TD = banks[index], x_TD[row.router_mask[0]]
        E, _, I = bank.experts.down_proj.shape
        gate_up_FD = bank.experts.gate_up_proj.to(x_TD.dtype).flatten(0, 1)
        pre_TE2I = F.linear(x_TD, gate_up_FD).view(-1, E, 2, I)
        hidden_TEI = bank.activation(pre_TE2I[:, :, 0]) * pre_TE2I[:, :, 1]
        inactive_TE = (~bank.route(x_TD).active).float()
        sums[index] += torch.einsum("te,tei->ei", inactive_TE, hidden_TEI.float())
        counts[index] += inactive_TE.sum(0)

    inputs.visit(observe, "mean outputs of experts, rows")
    for bank, sum_EI, count_E in zip(banks, sums, counts, strict=True):
        if bank.mean_outputs is not None:
            mean_EI = sum_EI / count_E.clamp_min(1)[:, None]
            bank.mean_outputs.copy_((bank.experts.down_proj.float() @ mean_EI[..., None])[..., 0])
