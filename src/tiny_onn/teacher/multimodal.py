"""Models that are no decoder of text alone, refused with what can be done about them.

A multimodal checkpoint holds a language model beside towers for images or sound. transformers reads
the text part of some by itself; of the others it has to be saved first.
"""

from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from tiny_onn.errors import UserError, load_errors
from tiny_onn.model.backbone import gated_mlps


def dense_skeleton(config: PretrainedConfig, **options: Any) -> PreTrainedModel:  # noqa: ANN401 - those of from_config
    """The model of a configuration on the meta device, sure to be one that can be converted.

    Raises:
        UserError: it is no causal language model, multimodal, or of another architecture.
    """
    check_causal(config)
    multimodal = is_multimodal(config)
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, **options)
    except load_errors() as error:
        if multimodal:
            # Its towers may need libraries that text does not.
            raise multimodal_error(config) from error
        raise
    if multimodal and type(skeleton.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise multimodal_error(config)
    try:
        gated_mlps(skeleton)
    except UserError as error:
        if is_multimodal(skeleton.config):
            raise multimodal_error(config) from error
        if multimodal:
            raise UserError(
                f"it is a multimodal model (model_type {config.model_type!r}), and its text part "
                f"is not supported: {error}"
            ) from error
        raise
    return skeleton


def check_causal(config: PretrainedConfig) -> None:
    """Refuse a configuration for which transformers has no causal language model.

    Raises:
        UserError: a multimodal model, an encoder, and the like.
    """
    own_code = getattr(config, "auto_map", None) or {}
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own_code:
        return
    if is_multimodal(config):
        raise multimodal_error(config)
    raise UserError(
        f"it has model_type {config.model_type!r}, which is no causal language model, expected a"
        " decoder as Llama, Qwen3, Mistral or Gemma 2; name such a model"
    )


def is_multimodal(config: PretrainedConfig) -> bool:
    """Whether a configuration describes a text model as one part among others."""
    return config.get_text_config() is not config and not config.is_encoder_decoder


def multimodal_error(config: PretrainedConfig) -> UserError:
    """The refusal of a multimodal model, and how to get at its text part if there is a way."""
    text = config.get_text_config()
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        # The class, which the mapping's annotation does not say.
        known: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
        remedy = (
            f"save its text part (model_type {text.model_type!r}) as a {known.__name__} with the "
            "tokenizer in a folder of its own, and name that folder"
        )
    else:
        remedy = (
            f"its text part (model_type {text.model_type!r}) is no causal language model of "
            "transformers either, so name a text-only model"
        )
    return UserError(
        f"it is a multimodal model (model_type {config.model_type!r}), expected a decoder of text "
        f"alone; {remedy}"
    )
