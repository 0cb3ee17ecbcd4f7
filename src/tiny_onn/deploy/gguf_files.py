"""GGUF files by the public `gguf` package: fields of a decoder, its tensors, and their formats."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tiny_onn.console import track
from tiny_onn.deploy.exporting import ExportError
from tiny_onn.deploy.gguf_tokenizer import add_tokenizer
from tiny_onn.model.fused_attention import head_dim_of

FORMATS = MappingProxyType(
    {
        "F16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
        "Q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    }
)
# Families whose attention, norms and embeddings llama.cpp's graphs compute as transformers does.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
BLOCK = 32
"""Number of neighbouring weights that share a scale in Q8_0."""


def check_backbone(config: PretrainedConfig) -> None:
    """Refuse a decoder that the graphs of llama.cpp used here would compute differently.

    Raises:
        ExportError: the family is another one, or an option differs.
    """
    kind, fields = config.model_type, config.to_dict()
    rope = fields.get("rope_parameters") or {}
    window = fields.get("sliding_window") if fields.get("use_sliding_window", True) else None
    for name, got, accepted in (
        ("model_type", kind, FAMILIES),
        ("hidden_act", fields.get("hidden_act"), ("silu",)),
        ("rope_parameters.rope_type", rope.get("rope_type", "default"), ("default",)),
        ("rope_parameters.partial_rotary_factor", rope.get("partial_rotary_factor") or 1, (1,)),
        ("sliding_window", window, (None,)),
        ("attention_bias", fields.get("attention_bias") or False, (False,)),
    ):
        if got not in accepted:
            raise ExportError(
                f"got a backbone with {name} = {got!r}, expected"
                f" {' or '.join(map(str, accepted))}, which llama.cpp's graph computes; export it"
                " with --to transformers"
            )


def write_gguf(
    path: Path,
    arch: str,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    tensors: Mapping[str, Tensor],
    *,
    fields: Mapping[str, Any],
    form: str,
) -> None:
    """Write one model file.

    Args:
        path: the file.
        arch: llama.cpp's name of the architecture.
        config: the decoder's configuration, whose fields are written.
        tokenizer: the tokenizer, which is written too.
        tensors: the tensors by their names in GGUF.
        fields: more fields, as the names of the writer's methods without `add_`.
        form: `F16` or `Q8_0`, the format of matrices. Vectors, and the gates that choose experts,
            stay float32. A matrix whose rows Q8_0 cannot cut into blocks is F16.

    Raises:
        ExportError: the tokenizer is none that llama.cpp knows, or a weight overflows F16.
        OSError: the disk refuses.
    """
    matrices, file_type = FORMATS[form]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_file_type(file_type)
    for name, value in {**_decoder_fields(config), **fields}.items():
        getattr(writer, f"add_{name}")(value)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    for name, tensor in track(list(tensors.items()), f"Converting to {form}, tensors"):
        kept = tensor.ndim == 1 or name.endswith("ffn_gate_inp.weight")
        _add_tensor(writer, name, tensor, GGMLQuantizationType.F32 if kept else matrices)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decoder_tensors(
    arch: gguf.MODEL_ARCH, config: PretrainedConfig, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return a decoder's tensors by their names in GGUF; transformers' names are the keys.

    Raises:
        ExportError: the architecture has no place for a tensor.
    """
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    renamed = {}
    for name, tensor in state.items():
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None:
            raise ExportError(
                f"got a backbone with the tensor {name}, expected only tensors that llama.cpp's"
                f" {gguf.MODEL_ARCH_NAMES[arch]} has; export it with --to transformers"
            )
        renamed[own] = tensor
    return renamed


def _decoder_fields(config: PretrainedConfig) -> dict[str, Any]:
    head_dim = head_dim_of(config)
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": head_dim,
        "value_length": head_dim,
        "rope_dimension_count": head_dim,
        "rope_freq_base": float(config.rope_parameters["rope_theta"]),
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, tensor: Tensor, form: GGMLQuantizationType
) -> None:
    numbers = tensor.detach().to(torch.float32).contiguous().numpy()
    if form == GGMLQuantizationType.Q8_0 and numbers.shape[-1] % BLOCK:
        form = GGMLQuantizationType.F16
    if form == GGMLQuantizationType.F16 and np.abs(numbers).max(initial=0) > np.finfo("f2").max:
        raise ExportError(
            f"got weights up to {np.abs(numbers).max():.3g} in {name}, expected at most"
            f" {np.finfo('f2').max:g}, the largest number of F16; export it with --to transformers"
        )
    data = numbers if form == GGMLQuantizationType.F32 else gguf.quantize(numbers, form)
    writer.add_tensor(name, data, raw_dtype=form)
