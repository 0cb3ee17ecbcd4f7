"""The student as a Hugging Face model: any decoder with a gated MLP, its MLPs made of experts.

`TinyOnnForCausalLM` holds the dense architecture as `backbone`, whole, with each layer's `mlp`
replaced by an `ExpertBank`. Saving, loading, generation and caches are transformers' own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
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

from tiny_onn.console import say
from tiny_onn.errors import UserError
from tiny_onn.model.backbone import decoder_layers, expert_bank, gated_mlps, generation_attention
from tiny_onn.model.backbone_mode import in_mlp, set_backbone_mode
from tiny_onn.model.configuration import TinyOnnConfig
from tiny_onn.model.experts import ExpertBank
from tiny_onn.model.fine_tuning import describe_learning, set_learning
from tiny_onn.model.norms import learned_norms, norm_gains
from tiny_onn.model.old_layout import register_old_layout
from tiny_onn.model.quantized_experts import (
    StoredAs,
    asked_by,
    quantize_experts,
    refuse_quantized,
    stored_bytes,
)
from tiny_onn.model.router import follow_sequences
from tiny_onn.model.sequence_budget import (
    UNMEASURED,
    Controller,
    Sequences,
    follow,
    reorder_counts,
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
    # These are float32 masters: a bf16 expert would lose the small updates of distillation.
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "gate_up_proj",
        "down_proj",
        "router",
        "mean_outputs",
        "expert_scale",
        "token_scale",
    ]

    def __init__(self, config: TinyOnnConfig) -> None:
        super().__init__(config)
        self.backbone: PreTrainedModel = AutoModelForCausalLM.from_config(config.backbone)
        if self.backbone.config._attn_implementation == "sdpa":
            self.backbone.set_attn_implementation(generation_attention(self.backbone))
        mlps = gated_mlps(self.backbone)
        for layer, mlp in zip(decoder_layers(self.backbone), mlps, strict=True):
            layer.mlp = expert_bank(mlp, config)
        self._controller_hooks: tuple[RemovableHandle, ...] = ()
        self._install_controller()
        self._described = False
        self.post_init()
        head = self.backbone.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(_flattened)

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
        if (
            labels is not None
            and self.training
            and not self._described
            and not torch.compiler.is_compiling()
        ):
            self._described = True
            say(self.describe_learning())
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

    @property
    def routing_controller(self) -> Controller:
        """The control of a budget in evaluation mode: `none`, or `sequence`, which adapts it.

        With `none` a layer's threshold is the same for all text. With `sequence` it adapts along
        each sequence to the tokens before (`sequence_budget.py`), so that each sequence comes close
        to the budget. It needs a cache that this student fills and nobody crops, which rules out
        assisted decoding.

        Raises:
            UserError: when it is set, the value is unknown, or the student has no measured table.
        """
        return getattr(self.config, "routing_controller", "none")

    @routing_controller.setter
    def routing_controller(self, controller: str) -> None:
        """Set the control."""
        if controller not in get_args(Controller):
            raise UserError(
                f"routing_controller: got {controller!r}, expected one of"
                f" {', '.join(get_args(Controller))}; choose one"
            )
        if controller == "sequence" and not self.banks()[0].router.has_table:
            raise UserError(UNMEASURED)
        self.config.routing_controller = controller
        self._install_controller()

    def _install_controller(self) -> None:
        for handle in self._controller_hooks:
            handle.remove()
        follows = self.routing_controller == "sequence"
        self._controller_hooks = follow(self.backbone.base_model, self.hand_over) if follows else ()

    def hand_over(self, sequences: Sequences | None) -> None:
        """Let all layers follow the sequences of a call, at the student's scale, or none.

        Raises:
            UserError: the student has no measured table.
        """
        if sequences is not None:
            sequences.scale = self.config.sequence_scale
        follow_sequences([bank.router for bank in self.banks()], sequences)

    def train(self, mode: bool = True) -> "TinyOnnForCausalLM":
        """Set the mode of experts and routers, and of the backbone only where it is trained too.

        A frozen backbone stays in evaluation mode, so that no dropout of any name separates the
        student from its teacher; gains of norms that learn change nothing in that. As soon as
        another one of the backbone's own parameters requires a gradient (fine-tuning, LoRA on
        attention), all of it follows `mode`, as in any other model. Gradient checkpointing works in
        both cases.
        """
        super().train(mode)
        own = learned_norms(self)
        set_backbone_mode(self.backbone, decoder_layers(self.backbone), mode, besides=own)
        return self

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super()._set_gradient_checkpointing(*args, **kwargs)
        self.train(self.training)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Save as transformers does, in today's layout even if an older one was loaded.

        Raises:
            UserError: the experts are quantised.
        """
        refuse_quantized([self], "save_pretrained", "save the student before its experts are")
        super().save_pretrained(*args, **{"save_original_format": False, **kwargs})

    def _reorder_cache(self, past_key_values: Cache, beam_idx: Tensor) -> Cache:
        """Reorder a cache for beam search, with what was counted of its sequences."""
        past_key_values.reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        reorder_counts(past_key_values, beam_idx)
        return past_key_values

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
            if bank.token_scale is not None:
                initialization.zeros_(bank.token_scale)

    def banks(self) -> list[ExpertBank]:
        """Return the expert banks, first layer first."""
        mlps = [layer.mlp for layer in decoder_layers(self.backbone)]
        return [mlp for mlp in mlps if isinstance(mlp, ExpertBank)]

    @torch.no_grad()
    def round_experts(self) -> None:
        """Keep the experts' weights in the backbone's number format, for generation only.

        Every call rounds the weights to that format anyway. Training needs their float32 masters,
        but decoding a token takes as long as reading its weights. Quantised weights stay as they
        are.
        """
        for bank in self.banks():
            quantized = bank.experts.stored_as is not None
            for weight in (*(() if quantized else bank.experts.parameters()), bank.mean_outputs):
                if weight is not None:
                    weight.data = weight.data.to(self.dtype)
            if not quantized:
                bank.experts.store_for_generation()

    def quantize_experts(self, stored_as: StoredAs, skipped: Sequence[str] = ()) -> str:
        """Hold the experts' weights in 4 or 8 bits, for evaluation and generation.

        The weights change in place and cannot be had back, trained or saved. Gates, mean outputs
        and scales, attention and embeddings stay as they are.

        Args:
            stored_as: `nf4`, `fp4` or `int8`; see `quantized_experts.quantize_experts`.
            skipped: names of modules that stay.

        Returns:
            A line that says how much memory the experts took and take now.

        Raises:
            UserError: see `quantized_experts.quantize_experts`.
        """
        before = stored_bytes(self)
        quantize_experts(self, stored_as, skipped)
        return (
            f"experts: {stored_bytes(self) / 2**20:.1f} MiB in {stored_as} instead of"
            f" {before / 2**20:.1f} MiB"
        )

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that distillation trains, by name.

        They are those of experts and routers, and the gains of the norms if these are the student's
        own.
        """
        norms = norm_gains(self)
        return {name: p for name, p in self.named_parameters() if in_mlp(name) or name in norms}

    def fine_tune(
        self, *, experts: bool = True, gates: bool = False, backbone: bool = False
    ) -> str:
        """Choose what learns in a training loop other than this package's; freeze the rest.

        Call this method after loading and after `set_budget`, and before PEFT or `Trainer`. It also
        makes training route by the thresholds of evaluation.

        Args:
            experts: whether the experts learn, and their mean outputs and scales if they have any.
            gates: whether the gates learn: the loss' gradient reaches them through the routing
                weights, straight through where an active expert's weight is always 1. The
                thresholds stay, so that the mean number of experts can drift.
            backbone: whether all else learns: embeddings, attention, norms and the head.

        Returns:
            The line of `describe_learning`.

        Raises:
            UserError: the gates shall learn, and the student's selection does not read them, or
                the experts shall learn, and they are quantised.
        """
        if experts:
            refuse_quantized([self], "fine_tune", "pass experts=False, or load the student anew")
        chosen = {"experts": experts, "gates": gates, "backbone": backbone}
        kinds = {kind for kind, learns in chosen.items() if learns}
        set_learning(self.banks(), self.named_parameters(), kinds)
        self.train(self.training)
        return self.describe_learning()

    def describe_learning(self) -> str:
        """Return a line that says which parameters learn, and what becomes of the gates.

        The first forward pass with labels in training mode prints this line.
        """
        return describe_learning(self.banks(), self.named_parameters())

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Load a student as transformers does, its gates frozen until `fine_tune` lets them learn.

        No other training loop's loss would reach them, and data-parallel training refuses
        parameters that require a gradient and get none. With a `quantization_config` of
        bitsandbytes the experts are quantised too, once they are loaded.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        student = loaded[0] if isinstance(loaded, tuple) else loaded
        for bank in student.banks():
            bank.router.requires_grad_(False)
        quantizer = getattr(student, "hf_quantizer", None)
        asked = asked_by(getattr(quantizer, "quantization_config", None))
        if asked is not None:
            student.quantize_experts(*asked)
        return loaded


def _flattened(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the head's input with strides by which torch flattens it for one product.

    Generation takes the last token's hidden states from those of all tokens. torch multiplies such
    a view as a batch of matrices, for which it copies the head's weight on a CPU.
    """
    hidden, *others = args
    return (hidden.flatten(0, -2).contiguous().view(hidden.shape), *others)


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
    """Return the experts' and the routers' parameters that learn, by name, in two tables."""
    learning = {name: p for name, p in student.trainable().items() if p.requires_grad}
    experts = {n: p for n, p in learning.items() if in_mlp(n) and ".router." not in n}
    gates = {name: p for name, p in learning.items() if ".router." in name}
    return experts, gates


def learning_parameters(student: TinyOnnForCausalLM) -> dict[str, nn.Parameter]:
    """Return all parameters that learn, by name: the experts', the routers', the norms' gains."""
    experts, gates = split_parameters(student)
    return experts | gates | norm_gains(student)


@contextmanager
def eval_mode(student: TinyOnnForCausalLM) -> Iterator[None]:
    """Put the student in evaluation mode within the context, and back in its mode afterwards."""
    was_training = student.training
    student.train(False)
    try:
        yield
    finally:
        student.train(was_training)
