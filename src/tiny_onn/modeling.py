"""The student as a Hugging Face model: any decoder with a gated MLP, its MLPs made of experts.

`TinyOnnForCausalLM` holds the dense architecture as `backbone`, whole, with each layer's `mlp`
replaced by an `ExpertBank`. Saving, loading, generation and caches are transformers' own.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from tiny_onn.config import Selection, Weighting
from tiny_onn.errors import UserError
from tiny_onn.experts import ExpertBank
from tiny_onn.losses import Head
from tiny_onn.router import RoutingRule

GATED_MLP = ("gate_proj", "up_proj", "down_proj")


class TinyOnnConfig(PretrainedConfig):
    """A dense decoder's configuration and the shape and routing of its experts.

    Args:
        backbone: the dense model's configuration, or its dictionary.
        num_experts: experts per layer, E.
        expert_dim: neurons per expert, I; E * I is the dense MLP's width.
        selection, weighting, target_k, budget_form: see `RoutingRule`.
    """

    model_type = "tiny_onn"
    sub_configs = {"backbone": AutoConfig}  # noqa: RUF012 - transformers' class-level protocol

    def __init__(
        self,
        backbone: PretrainedConfig | dict[str, Any] | None = None,
        num_experts: int = 32,
        expert_dim: int = 0,
        selection: Selection = "budget",
        weighting: Weighting = "unit",
        target_k: float = 16.0,
        budget_form: str = "cumulative",
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone, dict):
            backbone = CONFIG_MAPPING[backbone["model_type"]](**backbone)
        self.backbone = CONFIG_MAPPING["qwen3"]() if backbone is None else backbone
        self.num_experts = num_experts
        self.expert_dim = expert_dim or self.backbone.intermediate_size // num_experts
        self.selection = selection
        self.weighting = weighting
        self.target_k = target_k
        self.budget_form = budget_form
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.backbone, name, None))
        kwargs.setdefault("tie_word_embeddings", self.backbone.tie_word_embeddings)
        super().__init__(**kwargs)

    def get_text_config(self, *_: Any, **__: Any) -> PretrainedConfig:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The backbone's configuration: what caches and generation ask about layers and heads."""
        return self.backbone

    def routing_rule(self) -> RoutingRule:
        """The rule every layer's router follows."""
        return RoutingRule(
            selection=self.selection,
            weighting=self.weighting,
            target_k=self.target_k,
            budget_form=self.budget_form,  # pyright: ignore[reportArgumentType]
        )


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
    _keep_in_fp32_modules_strict = ["gate_up_proj", "down_proj", "router"]  # noqa: RUF012

    def __init__(self, config: TinyOnnConfig) -> None:
        super().__init__(config)
        self.backbone: PreTrainedModel = AutoModelForCausalLM.from_config(config.backbone)
        for layer in gated_mlp_layers(self.backbone):
            layer.mlp = expert_bank(layer.mlp, config)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - transformers' contract
        return self.backbone(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:  # noqa: D102
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:  # noqa: D102
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:  # noqa: D102
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:  # noqa: D102
        self.backbone.set_output_embeddings(new_embeddings)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ExpertBank):
            std = getattr(self.config.get_text_config(), "initializer_range", 0.02)
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
            module.router.reset(None)
        elif not isinstance(module, nn.modules.module.Module) or module is not self.backbone:
            self.backbone._init_weights(module)

    def banks(self) -> list[ExpertBank]:
        """The expert banks, first layer first."""
        return [layer.mlp for layer in decoder_layers(self.backbone)]  # pyright: ignore[reportReturnType]

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters of experts and routers, by name; everything else is frozen."""
        return {name: p for name, p in self.named_parameters() if ".mlp." in name}


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers.

    Raises:
        UserError: the model keeps them under no `layers`.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise _unsupported(model, "its base model has no list of decoder layers named 'layers'")
    return list(layers)


def gated_mlp_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers, each checked to hold a plain gated MLP under `mlp`.

    Raises:
        UserError: one does not; the message names the architecture and the reason.
    """
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        mlp = getattr(layer, "mlp", None)
        if isinstance(mlp, ExpertBank):
            raise _unsupported(model, "it is a Tiny-ONN student already")
        if mlp is None:
            raise _unsupported(model, f"layer {index} has no module named 'mlp'")
        missing = [n for n in GATED_MLP if not isinstance(getattr(mlp, n, None), nn.Linear)]
        if missing:
            raise _unsupported(model, f"layer {index}'s MLP has no linear {', '.join(missing)}")
        extra = [
            n for n, child in mlp.named_children() if next(child.parameters(), None) is not None
        ]
        if extra := sorted(set(extra) - set(GATED_MLP)):
            raise _unsupported(model, f"layer {index}'s MLP also holds {', '.join(extra)}")
        if any(getattr(mlp, name).bias is not None for name in GATED_MLP):
            raise _unsupported(model, f"layer {index}'s MLP has biases")
        widths = {mlp.gate_proj.out_features, mlp.up_proj.out_features, mlp.down_proj.in_features}
        if widths != {layers[0].mlp.gate_proj.out_features}:  # pyright: ignore
            raise _unsupported(model, f"layer {index}'s MLP width differs from layer 0's")
    return layers


def expert_bank(mlp: nn.Module, config: TinyOnnConfig) -> ExpertBank:
    """An uninitialised bank of the shape that replaces a dense MLP.

    Raises:
        UserError: E * I is not the MLP's width, or k is not in 1 ... E.
    """
    width = mlp.gate_proj.out_features  # pyright: ignore
    if config.num_experts * config.expert_dim != width:
        raise UserError(
            f"experts.num_experts x experts.expert_dim: got {config.num_experts} x "
            f"{config.expert_dim}, expected a product of {width}, the MLP's width; choose a "
            f"num_experts that divides {width} and leave expert_dim at 0"
        )
    if not 1 <= config.target_k <= config.num_experts:
        raise UserError(
            f"router.target_k: got {config.target_k:g}, expected 1 to {config.num_experts} (the "
            "number of experts); lower it"
        )
    backbone = config.backbone
    activation = getattr(backbone, "hidden_activation", None) or backbone.hidden_act
    return ExpertBank(
        mlp.gate_proj.in_features,  # pyright: ignore
        config.num_experts,
        config.expert_dim,
        activation,
        config.routing_rule(),
    )


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


def last_hidden_states(model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Tensor:
    """The hidden states (B, T, D) that the head reads, after the final norm."""
    backbone = model.backbone if isinstance(model, TinyOnnForCausalLM) else model
    output = backbone.base_model(input_ids=input_ids, use_cache=False, **kwargs)
    return output.last_hidden_state


def checkpoint_layers(student: TinyOnnForCausalLM) -> None:
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    for layer in decoder_layers(student.backbone):
        if not isinstance(layer, GradientCheckpointingLayer):
            raise _unsupported(student.backbone, "its layers do not support gradient checkpointing")
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def _unsupported(model: PreTrainedModel, reason: str) -> UserError:
    return UserError(
        f"architecture {type(model).__name__} (model_type {model.config.model_type!r}) cannot be "
        f"converted: {reason}; expected decoder layers whose mlp has bias-free gate_proj, up_proj "
        "and down_proj, as in Llama, Qwen3, Mistral or Gemma 2"
    )


AutoConfig.register("tiny_onn", TinyOnnConfig, exist_ok=True)
AutoModelForCausalLM.register(TinyOnnConfig, TinyOnnForCausalLM, exist_ok=True)
