"""Refusals of models that are no decoder of text alone, with a remedy where there is one.

A multimodal checkpoint holds a language model beside towers for images or sound. transformers can
read the text part of some such checkpoints; of others the user has to save the text part first.
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
    """Build the model of a configuration on the meta device; refuse one that cannot be converted.

    Raises:
        UserError: the model is no causal language model, multimodal, or has other MLPs.
    """
    check_causal(config)
    multimodal = is_multimodal(config)
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, **options)
    except load_errors() as error:
        if multimodal:
            # The towers for images or sound may need libraries that are not installed.
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
        UserError: the model is multimodal, an encoder, or the like.
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
    """Return True if a configuration describes a text model as one part among others."""
    return config.get_text_config() is not config and not config.is_encoder_decoder


def multimodal_error(config: PretrainedConfig) -> UserError:
    """Return the refusal of a multimodal model, with the way to its text part if there is one."""
    text = config.get_text_config()
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        # The mapping's annotation does not say that it holds classes.
        text_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
        remedy = (
            f"save its text part (model_type {text.model_type!r}) as a {text_class.__name__} with "
            "the tokenizer in a folder of its own, and name that folder"
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
