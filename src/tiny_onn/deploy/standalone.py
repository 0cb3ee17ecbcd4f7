"""A Tiny-ONN student for inference: a dense decoder whose MLPs are banks of small experts.

A router gives each token the experts that it activates, and their number differs from token to
token. The decoder's attention, embeddings and norms are transformers' own. All code that this
model needs stands in this file; its weights are in the safetensors files beside it.

Legend: T tokens, D hidden, E experts, S of them shared, K places for a token's experts, I expert
width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.activations import ACT2FN

from tiny_onn.model.router import budget_scores, routing_weights
from tiny_onn.ops.shared_experts import routed, with_shared


class TinyOnnConfig(LlamaConfig):
    """The dense decoder's configuration with the fields of its experts."""

    model_type = "tiny_onn_llama"

    num_experts: int = 32
    num_experts_per_tok: int = 32
    """Largest number of experts that a token can activate; most tokens activate fewer."""
    moe_intermediate_size: int = 48
    routing: dict | None = None
    """The rule by which a router selects experts and weighs them."""
    has_mean_outputs: bool = False
    has_expert_scale: bool = False
    expert_activation: str = "silu"


class Experts(nn.Module):
    """E gated experts: `gate_up_proj` (E, 2 I, D), gate rows first, and `down_proj` (E, D, I)."""

    def __init__(self, config: Any) -> None:  # noqa: ANN401 - the configuration above
        super().__init__()
        E, I, D = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.num_experts, self.hidden_dim, self.intermediate_dim = E, D, I
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, I))
        self.act_fn = ACT2FN[config.expert_activation]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, (T, D).

        Args:
            hidden_states: (T, D).
            top_k_index: (T, K), each token's experts without repetition.
            top_k_weights: (T, K), their weights; an expert of weight 0 is not computed.
        """
        y_TD = torch.zeros_like(hidden_states, dtype=torch.float32)
        used_TK = top_k_weights != 0
        for expert in top_k_index[used_TK].unique().tolist():
            token_N, place_N = ((top_k_index == expert) & used_TK).nonzero(as_tuple=True)
            pre_NJ = F.linear(hidden_states[token_N], self.gate_up_proj[expert])
            gate_NI, up_NI = pre_NJ.chunk(2, dim=-1)
            out_ND = F.linear(self.act_fn(gate_NI) * up_NI, self.down_proj[expert])
            weight_N1 = top_k_weights[token_N, place_N, None].float()
            y_TD.index_add_(0, token_N, out_ND * weight_N1)
        return y_TD.to(hidden_states.dtype)


class Router(nn.Module):
    """A linear gate with a bias, and the rule that turns its logits into experts and weights."""

    def __init__(self, config: Any) -> None:  # noqa: ANN401 - the configuration above
        super().__init__()
        self.routing = config.routing or {}
        self.top_k = config.num_experts_per_tok
        float32 = torch.float32
        self.weight = nn.Parameter(
            torch.empty(config.num_experts, config.hidden_size, dtype=float32)
        )
        self.bias = nn.Parameter(torch.empty(config.num_experts, dtype=float32))
        # These two are parameters since some engines load no buffers.
        self.selection_bias = nn.Parameter(torch.empty(config.num_experts, dtype=float32))
        self.threshold = nn.Parameter(torch.empty(1, dtype=float32))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each token's experts (T, K), their weights (T, K), and all active ones (T, E).

        A token with fewer than K active experts gets inactive ones at weight 0 for the rest.
        """
        logits_TE = F.linear(x_TD.float(), self.weight.float(), self.bias.float())
        num_shared = self.routing["num_shared"]
        logits_TR = routed(logits_TE, num_shared)
        selecting_TR = logits_TR + routed(self.selection_bias.float(), num_shared)
        order_TR = selecting_TR.argsort(dim=-1, descending=True, stable=True)
        if self.routing["selection"] == "budget":
            probs_TR = selecting_TR.softmax(-1)
            scores_TR = budget_scores(probs_TR, order_TR, self.routing["budget_form"])
            active_TR = scores_TR > self.threshold.float()
        else:
            chosen_TR = order_TR[:, : self.top_k - num_shared]
            active_TR = torch.zeros_like(logits_TR, dtype=torch.bool).scatter(-1, chosen_TR, True)
        weighting = self.routing["weighting"]
        weights_TR = routing_weights(logits_TR, active_TR, weighting)
        active_TE = with_shared(active_TR, num_shared, value=True)
        weights_TE = with_shared(weights_TR, num_shared, 1.0)
        index_TK = active_TE.float().topk(self.top_k, dim=-1).indices
        return index_TK, weights_TE.gather(-1, index_TK), active_TE


class ExpertBank(nn.Module):
    """The experts in the place of one dense MLP, and their router.

    `mean_outputs` (E, D), where the student has them, are added for inactive experts, and
    `expert_scale` (E,) multiplies the experts' weights.
    """

    mean_outputs: nn.Parameter | None
    expert_scale: nn.Parameter | None

    def __init__(self, config: Any) -> None:  # noqa: ANN401 - the configuration above
        super().__init__()
        E, D = config.num_experts, config.hidden_size
        self.experts = Experts(config)
        self.router = Router(config)
        means = nn.Parameter(torch.empty(E, D)) if config.has_mean_outputs else None
        scale = nn.Parameter(torch.empty(E)) if config.has_expert_scale else None
        self.register_parameter("mean_outputs", means)
        self.register_parameter("expert_scale", scale)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the routed sum of the active experts' outputs, in the shape of the input."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        index_TK, weights_TK, active_TE = self.router(x_TD)
        if self.expert_scale is not None:
            weights_TK = weights_TK * self.expert_scale.float()[index_TK]
        y_TD = self.experts(x_TD, index_TK, weights_TK)
        if self.mean_outputs is not None:
            inactive_TE = (~active_TE).to(y_TD.dtype)
            y_TD = y_TD + inactive_TE @ self.mean_outputs.to(y_TD.dtype)
        return y_TD.view_as(hidden_states)


class TinyOnnModel(LlamaModel):
    """The decoder without the step from hidden states to logits."""

    config_class = TinyOnnConfig
    # A threshold on rounded logits would activate other experts.
    _keep_in_fp32_modules_strict = ["router", "expert_scale"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:  # noqa: ANN401 - the configuration above
        super().__init__(config)
        layers: Any = self.layers
        for layer in layers:
            layer.mlp = ExpertBank(config)


class TinyOnnForCausalLM(LlamaForCausalLM):
    """The decoder with the step from hidden states to logits."""

    config_class = TinyOnnConfig
    _keep_in_fp32_modules_strict = ["router", "expert_scale"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:  # noqa: ANN401 - the configuration above
        super().__init__(config)
        self.model = TinyOnnModel(config)
