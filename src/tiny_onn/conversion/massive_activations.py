"""Massive activations, the few huge values that single MLP neurons write into hidden states.

Legend: T tokens, D hidden, F neurons.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from tiny_onn.data.packing import PackedRow
from tiny_onn.errors import UserError
from tiny_onn.model.backbone import activation_name, gated_mlps
from tiny_onn.model.hooks import MlpInputs

# Sun et al., arXiv 2402.17762, section 2, call a value massive if it is above 100 and about 1,000
# times the median magnitude of its hidden state or more. The ratio here is to the median of one
# MLP's output, which shows the layer that writes the value.
MIN_VALUE = 100.0
MIN_RATIO = 1000.0
MIN_SHARE = 0.1
"""Share of a massive value that a neuron must contribute to be named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MassiveActivation:
    """The largest value that one layer's MLP writes, where it is massive."""

    layer: int
    feature: int
    """Index in the hidden state."""
    value: float
    ratio: float
    """The value over the median magnitude of the MLP's output at that token."""
    first_token: bool
    """True if that token begins a document."""
    neurons: tuple[int, ...]
    """Neurons that contribute a tenth of the value or more, largest first."""


@torch.no_grad()
def massive_activations(inputs: MlpInputs) -> list[MassiveActivation]:
    """Return the massive activations in the MLPs' outputs on this text, at most one a layer.

    First tokens of documents are searched too, because most models write massive activations there.
    """
    mlps = gated_mlps(inputs.dense)
    activation = ACT2FN[activation_name(inputs.dense.config.get_text_config())]
    found: dict[int, MassiveActivation] = {}

    def observe(index: int, x_TD: Tensor, row: PackedRow) -> None:
        first_T = row.position_ids[0] == 0
        # Padding has no router and no label; a fragment's last token has a router alone.
        text_T = row.router_mask[0] | (first_T & row.loss_mask[0])
        hidden_TF = mlps[index].hidden(x_TD, activation)
        sizes_TD = mlps[index].down_proj(hidden_TF).float().abs()
        # Only tokens with a value that is large enough need their median.
        token_U = (text_T & (sizes_TD.amax(1) > MIN_VALUE)).nonzero()[:, 0]
        if len(token_U) == 0:
            return
        sizes_UD = sizes_TD[token_U]
        ratio_UD = sizes_UD / _median(sizes_UD).clamp_min(1e-30)
        ratio_UD = torch.where(sizes_UD > MIN_VALUE, ratio_UD, 0.0)
        ratio, place = ratio_UD.max(), int(ratio_UD.argmax())
        if ratio < MIN_RATIO or (index in found and found[index].ratio >= ratio):
            return
        token, feature = divmod(place, x_TD.shape[1])
        token = int(token_U[token])
        parts_F = hidden_TF[token].float() * mlps[index].down_proj.weight[feature].float()
        value = parts_F.sum()
        order_F = (parts_F * value.sign()).argsort(descending=True)
        large = [f for f in order_F[:32].tolist() if parts_F[f] / value >= MIN_SHARE]
        found[index] = MassiveActivation(
            layer=index,
            feature=feature,
            value=value.item(),
            ratio=ratio.item(),
            first_token=bool(first_T[token]),
            neurons=tuple(large),
        )

    inputs.visit(observe, "looking for massive activations, rows")
    return [found[layer] for layer in sorted(found)]


def massive_neurons(
    found: Sequence[MassiveActivation], num_layers: int, max_neurons: int
) -> list[tuple[int, ...]]:
    """Return per layer the neurons that write its massive activation, largest first.

    Most layers have no massive activation and get no neurons.

    Args:
        found: the massive activations, at most one a layer.
        num_layers: layers of the model.
        max_neurons: neurons that a layer's shared experts hold.

    Raises:
        UserError: a layer has more such neurons than `max_neurons`.
    """
    neurons = {each.layer: each.neurons for each in found}
    for layer, named in neurons.items():
        if len(named) > max_neurons:
            raise UserError(
                f"experts.num_shared: got experts that hold {max_neurons} neurons, expected at "
                f"least {len(named)}, those that write layer {layer}'s massive activation; raise it"
                " or set experts.keep_massive = false"
            )
    return [neurons.get(layer, ()) for layer in range(num_layers)]


def _median(values_UD: Tensor) -> Tensor:
    """Return the lower median of each row, (U, 1); a GPU's own median does not repeat its bits."""
    return values_UD.sort(dim=1).values[:, (values_UD.shape[1] - 1) // 2, None]
