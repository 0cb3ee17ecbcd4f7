"""Attention over packed rows in fused kernels: FlexAttention for training, flash for the rest.

Training needs gradients, which flash attention's variable length kernel adds up in no fixed order,
or in a fixed one at many times the cost where a row holds one long document among several.
FlexAttention (PyTorch's; Dong et al., 2024, arXiv:2412.05496) computes only those blocks of queries
and keys in which a document meets itself, and always in the same order. Its launches depend on the
number of tokens alone, so that one CUDA graph serves rows of any documents.

Shapes: B batch, T tokens, H query heads, G key/value heads, C channels of one head, N blocks of a
row.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedConfig, PreTrainedModel

from tiny_onn.config.schema import TrainConfig
from tiny_onn.ops.decode import triton_runs_on
from tiny_onn.ops.regions import separate_compiled_code

BLOCK_TOKENS = 128
MIN_HEAD_DIM = 16
# Larger heads need more shared memory than the 99 KiB of consumer cards (pytorch/pytorch#198224).
MAX_SMALL_HEAD_DIM = 128
LARGE_BYTES = 160 * 1024

# The kernel's options differ between torch releases: enable_gqa is newer than window_size.
VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)


class DocumentBlocks:
    """The documents of a packed row, for attention that computes only blocks inside documents.

    Block masks are made at their first use and serve all layers of the same sliding window.

    Args:
        position_ids: Positions that restart at each document, on the models' device. Nothing else
            tells where documents begin.
    """

    def __init__(self, position_ids: Int[Tensor, "1 tokens"]) -> None:
        positions_T = position_ids.view(-1).int()
        self._places_T = torch.arange(len(positions_T), device=positions_T.device).int()
        self._starts_T = self._places_T - positions_T
        self._masks: dict[int | None, Any] = {}
        self.was_used = False
        """True as soon as a layer attended by these blocks."""

    def attend(
        self,
        query: Float[Tensor, "1 heads tokens head_dim"],
        key: Float[Tensor, "1 kv_heads tokens head_dim"],
        value: Float[Tensor, "1 kv_heads tokens value_dim"],
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Float[Tensor, "1 tokens heads value_dim"]:
        """Compute `attention.loop_attention` in a compiled kernel."""
        self.was_used = True
        out_1HTC = _compiled_flex()(
            query,
            key,
            value,
            score_mod=None if softcap is None else _capped(softcap),
            block_mask=self.mask(sliding_window),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out_1HTC.transpose(1, 2).contiguous()

    def mask(self, sliding_window: int | None = None) -> Any:  # noqa: ANN401 - naming its class imports the compiler
        """Return the `BlockMask` of causal attention within documents and a window of tokens."""
        if sliding_window not in self._masks:
            first_T = self._starts_T
            if sliding_window is not None:
                first_T = first_T.maximum(self._places_T - (sliding_window - 1))
            self._masks[sliding_window] = _block_mask(first_T)
        return self._masks[sliding_window]


def block_obstacle(model: PreTrainedModel, train: TrainConfig, row_tokens: int) -> str | None:
    """Return why training rows cannot take `DocumentBlocks`, or None if they can."""
    device, head_dim = model.device, head_dim_of(model.config.get_text_config())
    reasons = {
        "the device is no GPU": device.type != "cuda",
        "train.compile is false": not train.compile,
        "the package triton is not installed": not triton_runs_on(device.type),
        "the GPU's compute capability is below 8.0": (
            device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
        ),
        'train.checkpointing = "selective" needs the flash kernel, whose launches depend on the '
        "documents of a row": train.checkpointing == "selective",
        f"rows of {row_tokens} tokens are shorter than {BLOCK_TOKENS}": row_tokens < BLOCK_TOKENS,
        f"heads of {head_dim} channels are smaller than {MIN_HEAD_DIM}": head_dim < MIN_HEAD_DIM,
        f"heads of {head_dim} channels do not fit into this GPU's shared memory": (
            device.type == "cuda" and head_dim > MAX_SMALL_HEAD_DIM and not _is_large(device)
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def head_dim_of(config: PreTrainedConfig) -> int:
    """Return the number of channels of an attention head, by a decoder's configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _is_large(device: torch.device) -> bool:
    """Return whether a GPU's programs may have as much shared memory as those of an A100 may."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= LARGE_BYTES


def _block_mask(first_T: Int[Tensor, " tokens"]) -> Any:  # noqa: ANN401 - naming its class imports the compiler
    """Return the block mask by which query q sees the keys from `first_T[q]` to q.

    `create_block_mask` would evaluate every pair of tokens for the same blocks.

    Args:
        first_T: The first key that each query sees, which never falls from one query to the next.
    """
    from torch.nn.attention.flex_attention import BlockMask  # noqa: PLC0415

    tokens = len(first_T)
    # A block of queries sees keys from its first token's first key on, and all of its tokens see
    # the keys from its last token's first key on.
    ends_N = torch.arange(BLOCK_TOKENS, tokens + BLOCK_TOKENS, BLOCK_TOKENS, device=first_T.device)
    keys_N = ends_N - BLOCK_TOKENS
    last_first_N = first_T[(ends_N - 1).clamp(max=tokens - 1)]
    below_NN = keys_N < keys_N[:, None]
    # A block that the row's end cuts is not full.
    full_NN = below_NN & (keys_N >= last_first_N[:, None]) & (ends_N[:, None] <= tokens)
    seen_NN = (ends_N > first_T[::BLOCK_TOKENS, None]) & (keys_N <= keys_N[:, None])
    partial_NN = seen_NN & ~full_NN
    return BlockMask(
        (tokens, tokens),
        *_listed(partial_NN),
        *_listed(full_NN),
        *_listed(partial_NN.T),
        *_listed(full_NN.T),
        BLOCK_SIZE=(BLOCK_TOKENS, BLOCK_TOKENS),
        mask_mod=lambda b, h, q, k: (k <= q) & (k >= first_T[q]),
    )


def _listed(chosen_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks each row of a matrix chooses, and their columns, chosen ones first."""
    counts_N = chosen_NN.sum(1, dtype=torch.int32)
    columns_NN = (~chosen_NN).int().argsort(dim=1, stable=True).int()
    # The kernels step through a row's columns without a look at their stride.
    return counts_N[None, None], columns_NN.contiguous()[None, None]


def _capped(softcap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the function that bounds a score."""
    return lambda score, b, h, q, k: softcap * torch.tanh(score / softcap)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    """Return `flex_attention` compiled, once per process, anew for each number of tokens."""
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415

    separate_compiled_code()
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def varlen_supported(
    query: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
) -> bool:
    """Return whether torch's variable length flash kernel takes these inputs, with gradients."""
    head_dim = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and value.shape[-1] == head_dim
        and head_dim % 8 == 0
        # The kernel's backward pass lacks head sizes 200 to 224 on consumer cards.
        and (head_dim <= 192 or head_dim == 256)
        and {"scale", "window_size"} <= VARLEN_OPTIONS
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def varlen_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    value: Float[Tensor, "batch kv_heads tokens head_dim"],
    cu_seqlens: Int[Tensor, " bounds"],
    max_seqlen: int,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> Float[Tensor, "batch tokens heads head_dim"]:
    """Compute `loop_attention` without softcap in one flash kernel, for CUDA in half precision.

    Bounds count through the batch's rows laid end to end, and are on the device.
    """
    # The kernel takes fewer key heads than query heads; newer releases want to be told.
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in VARLEN_OPTIONS else {}
    q_THC, k_TGC, v_TGC = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out_THC = varlen_attn(
        q_THC,
        k_TGC,
        v_TGC,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **options,
    )
    assert isinstance(out_THC, Tensor)
    return out_THC.unflatten(0, (query.shape[0], query.shape[2]))
