"""The experts' weights, under the names and in the shapes of transformers' own MoE blocks.

Legend: T tokens, K experts of a token, D hidden, E experts, I expert width, J = 2 * I rows.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN

# A function of a layer's input (T, D), its `gate_up_proj` and its `down_proj`.
Layer = Callable[[Tensor, Tensor, Tensor], Any]


KINDS = ("gate_up_proj", "down_proj")


def by_neuron(kind: str, weight: Tensor) -> Tensor:
    """Return a view of a weight with a row per neuron: (2, E, I, D), gates first, or (E, I, D).

    Args:
        kind: `gate_up_proj` or `down_proj`.
        weight: the stacked weight, (E, 2 I, D) or (E, D, I).
    """
    if kind == "down_proj":
        return weight.mT
    E, J, D = weight.shape
    return weight.view(E, 2, J // 2, D).transpose(0, 1)


def stacked(kind: str, neurons: Tensor) -> Tensor:
    """Return the contiguous weight whose view `by_neuron` is `neurons`."""
    if kind == "down_proj":
        return neurons.mT.contiguous()
    _, E, I, D = neurons.shape
    return neurons.transpose(0, 1).reshape(E, 2 * I, D)


class Experts(nn.Module):
    """E gated experts of width I, stacked: `gate_up_proj` (E, 2 I, D) and `down_proj` (E, D, I).

    An expert's gate rows come first in `gate_up_proj`, then its up rows. The attributes' names and
    `forward` are those of the `experts` of transformers' MoE blocks (`Qwen3MoeExperts`), so that
    engines, quantisers and PEFT's `target_parameters` find what they look for.

    `stored_as` names the number format of weights that `quantized_experts.py` quantised, and is
    None otherwise.
    """

    has_gate = True
    has_bias = False
    is_transposed = False
    is_concatenated = True

    def __init__(
        self, hidden_dim: int, num_experts: int, intermediate_dim: int, activation: str
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_dim = hidden_dim
        self.intermediate_dim = intermediate_dim
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_dim, hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_dim, intermediate_dim))
        self.act_fn = ACT2FN[activation]
        self.stored_as: str | None = None

    @torch.no_grad()
    def reset(self, generator: torch.Generator, std: float) -> None:
        """Set every weight to a random number, normal with the given standard deviation."""
        E, I, D = self.num_experts, self.intermediate_dim, self.hidden_dim
        # All gates are drawn first, then all ups, then downs neuron by neuron: a seed gives the
        # same experts as it gave when they were stored in that order.
        for kind, shape in zip(KINDS, ((2, E, I, D), (E, I, D)), strict=True):
            drawn = torch.randn(shape, generator=generator) * std
            by_neuron(kind, self.get_parameter(kind)).copy_(drawn)

    @torch.no_grad()
    def store_by_neuron(self) -> None:
        """Keep `down_proj` in memory neuron after neuron; its shape and values stay.

        Decoding then reads it without waste, and the dense path without a copy at every call.
        """
        self.down_proj.data = self.down_proj.data.mT.contiguous().mT

    @torch.no_grad()
    def store_for_generation(self) -> None:
        """Keep both weights in memory as generation reads them; their shapes and values stay.

        The decoding kernels of a GPU read `gate_up_proj` row by row. A CPU reads it column by
        column, because it then computes all active experts in one call (`ops/active_experts.py`).
        """
        self.store_by_neuron()
        if self.gate_up_proj.device.type == "cpu":
            self.gate_up_proj.data = self.gate_up_proj.data.mT.contiguous().mT

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        top_k_index: Int[Tensor, "tokens k"] | None = None,
        top_k_weights: Float[Tensor, "tokens k"] | None = None,
        *,
        layer: Layer | None = None,
        used: Int[Tensor, " used"] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever `layer` returns
        """Call `layer` on the inputs and the weights, or return the weighted sum of chosen experts.

        Everything that is computed from the weights is computed within such a call, because a
        wrapper around this module, such as PEFT's, changes the weights only while it runs.

        Args:
            hidden_states: the inputs.
            top_k_index: without `layer`, each token's experts; the index E stands for no expert.
            top_k_weights: without `layer`, the weights of these experts.
            layer: a function of the inputs, `gate_up_proj` and `down_proj`.
            used: the experts whose weights `layer` gets, which spares dequantising the others;
                None: all of them.

        Returns:
            The result of `layer`; without it, (T, D) in the format of `hidden_states`.
        """
        if layer is not None:
            return layer(hidden_states, *(self._weight(kind, used) for kind in KINDS))
        assert top_k_index is not None
        assert top_k_weights is not None
        gate_up_EJD, down_EDI = self.gate_up_proj, self.down_proj
        y_TD = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert == self.num_experts:
                continue
            token_N, place_N = (top_k_index == expert).nonzero(as_tuple=True)
            pre_NJ = F.linear(hidden_states[token_N], gate_up_EJD[expert])
            gate_NI, up_NI = pre_NJ.chunk(2, dim=-1)
            out_ND = F.linear(self.act_fn(gate_NI) * up_NI, down_EDI[expert])
            out_ND = out_ND * top_k_weights[token_N, place_N, None]
            y_TD = y_TD.index_add(0, token_N, out_ND.to(y_TD.dtype))
        return y_TD

    def _weight(self, kind: str, used: Tensor | None) -> Tensor:
        if used is None:
            return getattr(self, kind)
        table: Any = getattr(self, "parametrizations", {})
        # A weight that is not quantised, or that PEFT changes as well, can only be read whole.
        if self.stored_as is None or len(table[kind]) > 1:
            return getattr(self, kind)[used]
        return table[kind][0].of(table[kind].original, used)
