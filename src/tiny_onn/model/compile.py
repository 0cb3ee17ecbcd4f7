"""The frozen backbone's own elementwise work, fused by torch.compile on a GPU.

transformers writes RMSNorm and rotary embeddings as chains of small operations, which at 32,768
tokens cost a GPU more time than the matrix products. Every child of a decoder layer is compiled in
place, but for expert banks, which compile parts of themselves, and MLPs that are quantised or cut
between processes: no module is replaced, and names and state stay as they are. Attention itself
stays a call of its own (`attention.document_attention`), so that rows with other documents do not
compile anew. On a CPU these operations cost little and compiling costs much, so nothing is done.
"""

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from tiny_onn.model.attention import DOCUMENT_ATTENTION, document_attention
from tiny_onn.model.backbone import backbone_of, decoder_layers
from tiny_onn.model.full_sharding import is_sharded


def compile_backbones(*models: PreTrainedModel) -> None:
    """Let norms and attention layers of models on a GPU be compiled at their first call."""
    on_gpu = [model for model in models if model.device.type == "cuda"]
    if not on_gpu:
        return
    # The attention is not excluded where it is defined, because naming the compiler there would
    # import it, which takes seconds.
    AttentionInterface.register(DOCUMENT_ATTENTION, torch.compiler.disable(document_attention))
    for model in on_gpu:
        _compile(backbone_of(model))


def _compile(backbone: PreTrainedModel) -> None:
    for layer in decoder_layers(backbone):
        for name, child in layer.named_children():
            if name != "mlp" or _is_plain(child):
                child.compile()
    # The decoder's other children are the embeddings and the list of layers.
    norm = getattr(backbone.base_model, "norm", None)
    if norm is not None:
        norm.compile()


def _is_plain(mlp: nn.Module) -> bool:
    """Return True if an MLP is not cut, and its parts with weights are torch's linear layers."""
    holders = {type(part) for part in mlp.modules() if list(part.parameters(recurse=False))}
    return holders == {nn.Linear} and not any(map(is_sharded, mlp.parameters()))
