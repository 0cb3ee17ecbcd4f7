"""The student as a Hugging Face model: any decoder with a gated MLP, its MLPs made of experts.

`TinyOnnForCausalLM` holds the dense architecture as `backbone`, whole, with each layer's `mlp`
replaced by an `ExpertBank`. Saving, loading, generation and caches are transformers' own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast

from tiny_onn.backbone_mode import in_mlp, set_backbone_mode
from tiny_onn.errors import UserError
from tiny_onn.experts import ExpertBank
from tiny_onn.model_config import TinyOnnConfig
from tiny_onn.old_layout import register_old_layout
from tiny_onn.ops.distillation_loss import Head

GATED_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GatedMlp:
    """One layer's dense MLP, `down_proj(act(gate_proj(x)) * up_proj(x))`, its parts by type."""

    module: nn.Module
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def hidden(
        self, x_TD: Float[Tensor, "tokens hidden"], activation: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "tokens neurons"]:
        """The neurons' hidden activations, `act(gate_proj(x)) * up_proj(x)`, without a gradient.

        They are computed in the inputs' number format, whatever the weights are stored in.
        """
        with torch.no_grad():
            gate_TF, up_TF = (
                F.linear(x_TD, linear.weight.to(x_TD.dtype))
                for linear in (self.gate_proj, self.up_proj)
            )
            return activation(gate_TF).mul_(up_TF)


class TinyOnnForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder whose MLPs are expert banks; its logits, losses and caches are the backbone's own.

    Raises:
        UserError: the backbone's layers hold no plain gated MLP, or its width is not E * I.
    """

    config_class = TinyOnnConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Masters: a bf16 expert would lose the small updates of distillation.
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "gate_up_proj",
        "down_proj",
        "router",
        "mean_outputs",
        "expert_scale",
    ]

    def __init__(self, config: TinyOnnConfig) -> None:
        super().__init__(config)
        self.backbone: PreTrainedModel = AutoModelForCausalLM.from_config(config.backbone)
        if self.backbone.config._attn_implementation == "sdpa":
            self.backbone.set_attn_implementation(generation_attention(self.backbone))
        mlps = gated_mlps(self.backbone)
        for layer, mlp in zip(decoder_layers(self.backbone), mlps, strict=True):
            layer.mlp = expert_bank(mlp, config)
        self.post_init()

    def forward(  # noqa: D102, PLR0917 - transformers' contract
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,  # noqa: ANN401 - the backbone's own arguments
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        # Spelled out because `generate` passes only what the signature names.
        return self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def train(self, mode: bool = True) -> "TinyOnnForCausalLM":
        """Set the mode of experts and routers, and of the backbone only where it is trained too.

        A frozen backbone stays in evaluation mode, so that no dropout of any name separates the
        student from its teacher. As soon as one of the backbone's own parameters requires a
        gradient (fine-tuning, LoRA on attention), all of it follows `mode`, as in any other model.
        Gradient checkpointing works in both cases.
        """
        super().train(mode)
        set_backbone_mode(self.backbone, decoder_layers(self.backbone), mode)
        return self

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super()._set_gradient_checkpointing(*args, **kwargs)
        self.train(self.training)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Save as transformers does, in today's layout whatever the layout that was loaded."""
        super().save_pretrained(*args, **{"save_original_format": False, **kwargs})

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Leave the class as it is: transformers would copy its source beside what is saved."""

    def get_input_embeddings(self) -> nn.Module:  # noqa: D102
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:  # noqa: D102
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:  # noqa: D102
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:  # noqa: D102
        self.backbone.set_output_embeddings(new_embeddings)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Give every tensor that no checkpoint filled its first values."""
        super().initialize_weights()
        # transformers hands a nested model to its own class, which knows no expert bank.
        std = getattr(self.config.get_text_config(), "initializer_range", 0.02)
        for bank in self.banks():
            initialization.normal_(bank.experts.gate_up_proj, std=std)
            initialization.normal_(bank.experts.down_proj, std=std)
            # Zero unless a checkpoint says otherwise: students of before these buffers have none.
            router = bank.router
            for buffer in (router.selection_bias, router.unused_steps, router.threshold_table):
                initialization.zeros_(buffer)
            if bank.mean_outputs is not None:
                initialization.zeros_(bank.mean_outputs)
            if bank.expert_scale is not None:
                initialization.ones_(bank.expert_scale)

    def banks(self) -> list[ExpertBank]:
        """The expert banks, first layer first."""
        mlps = [layer.mlp for layer in decoder_layers(self.backbone)]
        return [mlp for mlp in mlps if isinstance(mlp, ExpertBank)]

    @torch.no_grad()
    def round_experts(self) -> None:
        """Keep the experts' weights in the backbone's number format, for generation only.

        Every call rounds them to it anyway. Training needs their float32 masters, but a token that
        is decoded takes as long as its weights take to read.
        """
        for bank in self.banks():
            for weight in (*bank.experts.parameters(), bank.mean_outputs):
                if weight is not None:
                    weight.data = weight.data.to(self.dtype)
            bank.experts.store_by_neuron()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters of experts and routers, by name: what distillation trains."""
        return {name: p for name, p in self.named_parameters() if in_mlp(name)}

    def freeze_backbone(self) -> None:
        """Leave the experts alone trainable, for other training loops than this package's.

        A loaded student is trainable as a whole. Its routers never get a gradient from the loss of
        another loop, so they are frozen too and route as they do.
        """
        self.requires_grad_(False)
        for name, parameter in self.trainable().items():
            parameter.requires_grad_(".router." not in name)


class TinyOnnModel(TinyOnnForCausalLM):
    """The same model without the step from hidden states to logits, for `AutoModel`.

    Its tensors are those of `TinyOnnForCausalLM`, the head included.
    """

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:  # noqa: D102, ANN401 # pyright: ignore[reportIncompatibleMethodOverride]
        return self.backbone.base_model(input_ids=input_ids, **kwargs)


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """The dense architecture: what a student holds as `backbone`, or a dense model itself."""
    backbone: Any = model.backbone if model.config.model_type == "tiny_onn" else model
    return backbone


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers.

    Raises:
        UserError: the model keeps them under no `layers`.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise _unsupported(model, "its base model has no list of decoder layers named 'layers'")
    return list(layers)


def gated_mlps(model: PreTrainedModel) -> list[GatedMlp]:
    """The decoder layers' MLPs, each checked to be a plain gated one under `mlp`.

    Raises:
        UserError: one is not; the message names the architecture and the reason.
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
        # Linear attention, a state space and other recurrences, which know no document bounds.
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
    """The name of a dense model's MLP activation.

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
    """A bank of the shape that replaces a dense MLP, its experts uninitialised.

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
    )


def generation_attention(dense: PreTrainedModel) -> str:
    """The attention that generates with caches: torch's own where it computes the family's.

    It has no softcap on its scores. Before transformers 5.23, families with one claim to support
    it all the same, and would go without their softcap.
    """
    softcap = getattr(dense.config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if dense._supports_sdpa and softcap is None else "eager"


def head_of(model: PreTrainedModel) -> Head:
    """How a causal LM turns its last hidden states into logits.

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
    """The hidden states (B, T, D) that the head reads, after the final norm."""
    output = backbone_of(model).base_model(input_ids=input_ids, use_cache=False, **kwargs)
    return output.last_hidden_state


def _unsupported(model: PreTrainedModel, reason: str) -> UserError:
    return UserError(
        f"architecture {type(model).__name__} (model_type {model.config.model_type!r}) cannot be "
        f"converted: {reason}; expected decoder layers with self_attn and an mlp of bias-free "
        "gate_proj, up_proj and down_proj, as in Llama, Qwen3, Mistral or Gemma 2"
    )


AutoConfig.register("tiny_onn", TinyOnnConfig, exist_ok=True)
AutoModel.register(TinyOnnConfig, TinyOnnModel, exist_ok=True)
AutoModelForCausalLM.register(TinyOnnConfig, TinyOnnForCausalLM, exist_ok=True)
register_old_layout(TinyOnnConfig.model_type)
