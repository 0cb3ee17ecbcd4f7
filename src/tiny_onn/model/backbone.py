"""Access to a dense decoder's layers, gated MLPs, head and hidden states."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from tiny_onn.errors import UserError
from tiny_onn.model.configuration import TinyOnnConfig
from tiny_onn.model.experts import ExpertBank
from tiny_onn.ops.distillation_loss import Head

GATED_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GatedMlp:
    """A layer's dense MLP, `down_proj(act(gate_proj(x)) * up_proj(x))`, and its linear parts."""

    module: nn.Module
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def hidden(
        self, x_TD: Float[Tensor, "tokens hidden"], activation: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "tokens neurons"]:
        """Return the hidden activations `act(gate_proj(x)) * up_proj(x)`, without a gradient.

        They are computed in the inputs' number format, whatever the weights are stored in.
        """
        with torch.no_grad():
            gate_TF, up_TF = (
                F.linear(x_TD, linear.weight.to(x_TD.dtype))
                for linear in (self.gate_proj, self.up_proj)
            )
            return activation(gate_TF).mul_(up_TF)


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the dense architecture: a student's `backbone`, or a dense model itself."""
    backbone: Any = model.backbone if model.config.model_type == "tiny_onn" else model
    return backbone


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's layers.

    Raises:
        UserError: the model keeps them under no `layers`.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise _unsupported(model, "its base model has no list of decoder layers named 'layers'")
    return list(layers)


def gated_mlps(model: PreTrainedModel) -> list[GatedMlp]:
    """Return the decoder layers' MLPs, each checked to be a plain gated one under `mlp`.

    Raises:
        UserError: an MLP is not; the message names the architecture and the reason.
    """
    mlps = [_gated_mlp(model, layer, i) for i, layer in enumerate(decoder_layers(model))]
    if not mlps or mlps[0].gate_proj.out_features == 0:
        raise _unsupported(model, "it has no layers, or they have no neurons")
    for index, mlp in enumerate(mlps):
        widths = {mlp.gate_proj.out_features, mlp.up_proj.out_features, mlp.down_proj.in_features}
        if widths != {mlps[0].gate_proj.out_features}:
            raise _unsupported(model, f"layer {index}'s MLP width differs from layer 0's")
    return mlps


def _gated_mlp(model: PreTrainedModel, layer: nn.Module, index: int) -> GatedMlp:
    mlp = getattr(layer, "mlp", None)
    if not isinstance(getattr(layer, "self_attn", None), nn.Module):
        # Such a layer holds linear attention, a state space or another recurrence, and these do not
        # know document bounds.
        names = [n for n, _ in layer.named_children() if n != "mlp" and "norm" not in n]
        there = f", expected attention; it has {', '.join(names)}" if names else ""
        raise _unsupported(model, f"layer {index} has no module named 'self_attn'{there}")
    if isinstance(mlp, ExpertBank):
        raise _unsupported(model, "it is a Tiny-ONN student already")
    if not isinstance(mlp, nn.Module):
        raise _unsupported(model, f"layer {index} has no module named 'mlp'")
    children = dict(mlp.named_children())
    linears = {n: m for n, m in children.items() if n in GATED_MLP and isinstance(m, nn.Linear)}
    if missing := [name for name in GATED_MLP if name not in linears]:
        raise _unsupported(model, f"layer {index}'s MLP has no linear {', '.join(missing)}")
    own = [name for name, _ in mlp.named_parameters() if name.partition(".")[0] not in GATED_MLP]
    if own:
        extra = ", ".join(sorted({name.partition(".")[0] for name in own}))
        raise _unsupported(model, f"layer {index}'s MLP also holds {extra}")
    if any(linear.bias is not None for linear in linears.values()):
        raise _unsupported(model, f"layer {index}'s MLP has biases")
    return GatedMlp(module=mlp, **linears)


def activation_name(config: PretrainedConfig) -> str:
    """Return the name of a dense model's MLP activation.

    Raises:
        UserError: the configuration names none.
    """
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if not isinstance(name, str) or name not in ACT2FN:
        raise UserError(
            f"model_type {config.model_type!r} cannot be converted: its configuration names the "
            f"activation {name!r}, expected one that transformers knows in hidden_act or "
            "hidden_activation"
        )
    return name


def expert_bank(mlp: GatedMlp, config: TinyOnnConfig) -> ExpertBank:
    """Make a bank of the shape that replaces a dense MLP, its experts uninitialised.

    Raises:
        UserError: E * I is not the MLP's width, or k is not in 1 ... E.
    """
    width = mlp.gate_proj.out_features
    if config.num_experts * config.moe_intermediate_size != width:
        raise UserError(
            f"experts.num_experts x experts.expert_dim: got {config.num_experts} x "
            f"{config.moe_intermediate_size}, expected a product of {width}, the MLP's width; "
            f"choose a num_experts that divides {width} and leave expert_dim at 0"
        )
    rule = config.routing_rule()
    if rule.num_shared not in range(config.num_experts):
        raise UserError(
            f"experts.num_shared: got {rule.num_shared}, expected 0 to {config.num_experts - 1} "
            "(one fewer than there are experts); lower it"
        )
    least = rule.num_shared + 1
    if not least <= rule.target_k <= config.num_experts:
        raise UserError(
            f"router.target_k: got {rule.target_k:g}, expected {least} to {config.num_experts} "
            "(the number of experts); change it"
        )
    return ExpertBank(
        mlp.gate_proj.in_features,
        config.num_experts,
        config.moe_intermediate_size,
        activation_name(config.backbone),
        rule,
        compensated=config.compensation != "none",
        scaled=config.learn_scale,
        token_scaled=config.token_scale,
    )


def generation_attention(dense: PreTrainedModel) -> str:
    """Return the attention to generate with: torch's own ("sdpa") where it fits, else "eager".

    torch's attention has no softcap on its scores. Before transformers 5.23, families with a
    softcap claim to support it all the same, and would go without their softcap.
    """
    softcap = getattr(dense.config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if dense._supports_sdpa and softcap is None else "eager"


def head_of(model: PreTrainedModel) -> Head:
    """Return the head by which a causal LM turns its last hidden states into logits.

    Raises:
        UserError: the model has no linear output head.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise _unsupported(model, "it has no linear output head")
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", 1) or 1)
    return Head(
        weight=head.weight,
        bias=head.bias,
        scale=float(scale),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def last_hidden_states(model: PreTrainedModel, input_ids: Tensor, **kwargs: object) -> Tensor:
    """Return the hidden states (B, T, D) that the head reads, after the final norm."""
    output = backbone_of(model).base_model(input_ids=input_ids, use_cache=False, **kwargs)
    return output.last_hidden_state


def _unsupported(model: PreTrainedModel, reason: str) -> UserError:
    return UserError(
        f"architecture {type(model).__name__} (model_type {model.config.model_type!r}) cannot be "
        f"converted: {reason}; expected decoder layers with self_attn and an mlp of bias-free "
        "gate_proj, up_proj and down_proj, as in Llama, Qwen3, Mistral or Gemma 2"
    )
