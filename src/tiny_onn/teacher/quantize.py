"""NF4 quantisation of a teacher's linear layers, 4 bits a weight, by bitsandbytes on CPU and CUDA.

A weight becomes one of 16 levels times the largest magnitude of its block of 64 weights. With a
float32 scale per block that takes 0.563 bytes a weight; double quantisation stores the scales in 8
bits and takes 0.516. Products use the dequantised weights in the model's own number format, so that
a layer costs one transient dequantised weight. Source: QLoRA, arXiv 2305.14314, section 3.
"""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import nn
from transformers import PreTrainedModel

from tiny_onn.console import track
from tiny_onn.device import load_bitsandbytes
from tiny_onn.errors import UserError
from tiny_onn.model.backbone_mode import in_mlp
from tiny_onn.model.quantized_experts import BLOCK_SIZE


@torch.no_grad()
def quantize_nf4(model: PreTrainedModel, *, only_mlps: bool, double_quant: bool) -> PreTrainedModel:
    """Replace a model's linear layers by frozen NF4 ones on the same device; return the model.

    An NF4 layer computes `y = x @ dequantize(weight).T + bias` in the format of the replaced
    weight. Modules are replaced and tensors stay unchanged, so that other models which share them
    keep theirs.

    Args:
        model: a causal language model. Embeddings, norms and the output head stay as they are.
        only_mlps: True quantises the decoder layers' MLPs and leaves attention alone.
        double_quant: True stores the blocks' scales in 8 bits too.

    Raises:
        UserError: bitsandbytes is not installed, there is no linear layer to quantise, or the input
            width of one is no multiple of 64. The model is unchanged then.
    """
    bitsandbytes = load_bitsandbytes('teacher.quantization = "nf4"')
    layers = dict(_linear_layers(model, only_mlps))
    if not layers:
        raise UserError(
            f"architecture {type(model).__name__}: got no linear layer to quantise, expected some "
            f"{'under mlp' if only_mlps else 'beside its head'}; "
            'set teacher.quantization = "none"'
        )
    for name, dense in layers.items():
        # bitsandbytes 0.50 on a CPU dequantises other widths with wrong scales without an error.
        if dense.in_features % BLOCK_SIZE:
            raise UserError(
                f"architecture {type(model).__name__}: {name} has {dense.in_features} inputs, "
                f"expected a multiple of {BLOCK_SIZE}, the block that shares a scale in NF4; "
                'set teacher.quantization = "none"'
            )
    for _ in track(range(len(layers)), "Quantising layers"):
        # The dictionary must not hold a dense weight any longer than its replacement takes.
        name, dense = layers.popitem()
        model.set_submodule(name, _nf4_linear(bitsandbytes, dense, double_quant))
    return model


def _linear_layers(model: PreTrainedModel, only_mlps: bool) -> Iterator[tuple[str, nn.Linear]]:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        wanted = not only_mlps or in_mlp(name)
        # Subclasses compute something else or are quantised already.
        if type(module) is nn.Linear and module is not head and wanted:
            yield name, module


def _nf4_linear(bitsandbytes: ModuleType, dense: nn.Linear, double_quant: bool) -> nn.Linear:
    options = {"compress_statistics": double_quant, "quant_type": "nf4"}
    linear = bitsandbytes.nn.Linear4bit(
        dense.in_features,
        dense.out_features,
        bias=dense.bias is not None,
        compute_dtype=dense.weight.dtype,
        device="meta",
        **options,
    )
    # bitsandbytes quantises when the weight is moved to a device, its own included.
    linear.weight = bitsandbytes.nn.Params4bit(
        dense.weight.data, requires_grad=False, blocksize=BLOCK_SIZE, module=linear, **options
    ).to(dense.weight.device)
    linear.bias = dense.bias
    # The CPU path for AVX-512 BF16 of bitsandbytes rounds inputs and scales to bfloat16 even in a
    # float32 model and repacks the weight at the first call. It is not faster at 2,048 tokens: it
    # took 128 ms against 115 for 1024 x 3072 in bfloat16 on 2 cores.
    linear.support_avx512bf16_for_cpu = False
    return linear.train(dense.training)
