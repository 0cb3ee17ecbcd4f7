"""The student as a Hugging Face model: any decoder with a gated MLP, its MLPs made of experts.

`TinyOnnForCausalLM` holds the dense architecture as `backbone`, whole, with each layer's `mlp`
replaced by an `ExpertBank`. Saving, loading, generation and caches are transformers' own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from tiny_onn.model.backbone import decoder_layers, expert_bank, gated_mlps, generation_attention
from tiny_onn.model.backbone_mode import in_mlp, set_backbone_mode
from tiny_onn.model.configuration import TinyOnnConfig
from tiny_onn.model.experts import ExpertBank
from tiny_onn.model.old_layout import register_old_layout


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
    # These are float32 masters: a bf16 expert would lose the small updates of distillation.
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
        # The arguments are spelled out because `generate` passes only those that a signature names.
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
        """Save as transformers does, in today's layout even if an older one was loaded."""
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
            # These buffers start at zero: students saved by earlier versions do not have them.
            router = bank.router
            for buffer in (router.selection_bias, router.unused_steps, router.threshold_table):
                initialization.zeros_(buffer)
            if bank.mean_outputs is not None:
                initialization.zeros_(bank.mean_outputs)
            if bank.expert_scale is not None:
                initialization.ones_(bank.expert_scale)

    def banks(self) -> list[ExpertBank]:
        """Return the expert banks, first layer first."""
        mlps = [layer.mlp for layer in decoder_layers(self.backbone)]
        return [mlp for mlp in mlps if isinstance(mlp, ExpertBank)]

    @torch.no_grad()
    def round_experts(self) -> None:
        """Keep the experts' weights in the backbone's number format, for generation only.

        Every call rounds the weights to that format anyway. Training needs their float32 masters,
        but decoding a token takes as long as reading its weights.
        """
        for bank in self.banks():
            for weight in (*bank.experts.parameters(), bank.mean_outputs):
                if weight is not None:
                    weight.data = weight.data.to(self.dtype)
            bank.experts.store_for_generation()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters of experts and routers, which distillation trains, by name."""
        return {name: p for name, p in self.named_parameters() if in_mlp(name)}

    def freeze_backbone(self) -> None:
        """Freeze all but the experts, for training loops other than this package's.

        Every parameter of a loaded student is trainable. Routers never get a gradient from the loss
        of another loop, so they are frozen too, and go on routing as they do.
        """
        self.requires_grad_(False)
        for name, parameter in self.trainable().items():
            parameter.requires_grad_(".router." not in name)


class TinyOnnModel(TinyOnnForCausalLM):
    """The model without the step from hidden states to logits, for `AutoModel`.

    Its tensors are those of `TinyOnnForCausalLM`, the head included.
    """

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:  # noqa: D102, ANN401 # pyright: ignore[reportIncompatibleMethodOverride]
        return self.backbone.base_model(input_ids=input_ids, **kwargs)


AutoConfig.register("tiny_onn", TinyOnnConfig, exist_ok=True)
AutoModel.register(TinyOnnConfig, TinyOnnModel, exist_ok=True)
AutoModelForCausalLM.register(TinyOnnConfig, TinyOnnForCausalLM, exist_ok=True)
register_old_layout(TinyOnnConfig.model_type)


def split_parameters(
    student: TinyOnnForCausalLM,
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return the parameters that learn, by name, in two tables: the experts' and the routers'."""
    learning = {name: p for name, p in student.trainable().items() if p.requires_grad}
    experts = {name: p for name, p in learning.items() if ".router." not in name}
    gates = {name: p for name, p in learning.items() if ".router." in name}
    return experts, gates


@contextmanager
def eval_mode(student: TinyOnnForCausalLM) -> Iterator[None]:
    """Put the student in evaluation mode within the context, and back in its mode afterwards."""
    was_training = student.training
    student.train(False)
    try:
        yield
    finally:
        student.train(was_training)
