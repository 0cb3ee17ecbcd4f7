"""Attention over packed rows: every document of a row attends to itself alone, causally.

A row of T tokens holds many documents. The usual way to keep them apart is a T x T mask, 1 GiB of
bools at 32,768 tokens; here no such mask is made. The implementation plugs into transformers under
the name `DOCUMENT_ATTENTION`, for any decoder family that calls its attention through
`AttentionInterface`: `model.set_attn_implementation(DOCUMENT_ATTENTION)`.

Bounds travel as keyword arguments of the model's forward, down to each layer, and so through
gradient checkpointing: `cu_seq_lens_q` and `max_length_q` as for flash attention, and
`document_bounds`, the same numbers on the host. `packed_kwargs` makes them all from a row, with
at most one device sync a row; no layer ever syncs. Without bounds each batch row is one document.
Restarting position ids alone do not separate documents. A row that is trained on says it all by one
argument, `document_blocks` (`training_kwargs`), and takes FlexAttention (`fused_attention.py`).

Cost: FLOPs grow with the sum of the documents' squared lengths. By bounds, CUDA in half precision
runs torch's variable length flash kernel where that takes the inputs. Everything else loops over
documents, with score blocks of at most `QUERY_BLOCK_TOKENS` x document where softcapping or a
sliding window rules out the fused kernel.

It is not for generation: a filled KV cache, padding, dropout, bidirectional or chunked attention,
and attention sinks are refused.

Shapes: B batch, T tokens, H query heads, G key/value heads, C channels of one head.
"""

from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from tiny_onn.config.schema import TrainConfig
from tiny_onn.errors import UserError
from tiny_onn.model.fused_attention import (
    DocumentBlocks,
    block_obstacle,
    varlen_attention,
    varlen_supported,
)
from tiny_onn.ops.precision import in_autocast_format

DOCUMENT_ATTENTION = "tiny_onn_documents"
QUERY_BLOCK_TOKENS = 1024

# Some families change the scores by these arguments, in ways that are not computed here.
_UNSUPPORTED = ("position_bias", "s_aux", "sinks", "indices", "block_indices", "output_attentions")


@runtime_checkable
class Packed(Protocol):
    """A packed row, as far as attention needs it."""

    @property
    def position_ids(self) -> Tensor:
        """Positions that restart at each document, shape (tokens) or (1, tokens)."""
        ...

    @property
    def cu_seqlens(self) -> Tensor:
        """Document bounds, int32, shape (documents + 1): 0, ..., tokens."""
        ...

    @property
    def max_seqlen(self) -> int:
        """Number of tokens of the longest document."""
        ...


def packed_kwargs(row: Packed) -> dict[str, Any]:
    """Return the keyword arguments by which a model's forward learns of a row's documents.

    The tensors stay on the row's device, which should be the model's. If that is not the CPU, the
    bounds are copied to the host here, once for all layers. The caches that many models return by
    default are of no use with packed rows: pass `use_cache=False` beside these.
    """
    # The host's bounds are a tensor too: compiled layers would be compiled anew for every tuple.
    host_bounds = row.cu_seqlens.cpu()
    if row.cu_seqlens.is_cuda:
        for bounds in (row.cu_seqlens, host_bounds):
            torch._dynamo.maybe_mark_dynamic(bounds, 0)
    return {
        "position_ids": row.position_ids.view(1, -1),
        "cu_seq_lens_q": row.cu_seqlens,
        "cu_seq_lens_k": row.cu_seqlens,
        "max_length_q": row.max_seqlen,
        "max_length_k": row.max_seqlen,
        "document_bounds": host_bounds,
    }


def training_kwargs(model: PreTrainedModel, row: Packed, train: TrainConfig) -> dict[str, Any]:
    """Return what `packed_kwargs` does, for a row that is trained on and the kernel of that."""
    if block_obstacle(model, train, row.position_ids.numel()) is not None:
        return packed_kwargs(row)
    return block_kwargs(row)


def block_kwargs(row: Packed) -> dict[str, Any]:
    """Return what `packed_kwargs` does, for attention by `DocumentBlocks`."""
    position_ids = row.position_ids.view(1, -1)
    return {"position_ids": position_ids, "document_blocks": DocumentBlocks(position_ids)}


def document_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads key_tokens head_dim"],
    value: Float[Tensor, "batch kv_heads key_tokens value_dim"],
    attention_mask: object,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Int[Tensor, " bounds"] | None = None,
    max_length_q: int | None = None,
    document_bounds: Int[Tensor, " host_bounds"] | None = None,
    document_blocks: DocumentBlocks | None = None,
    **kwargs: object,
) -> tuple[Float[Tensor, "batch tokens heads value_dim"], None]:
    """Compute causal self-attention inside each document, in the form that transformers calls.

    The result is `softmax(cap(scaling * q k^T) where same document and 0 <= q_pos - k_pos < window)
    v`, with `cap(s) = softcap * tanh(s / softcap)`.

    Args:
        module: The attention layer, whose `is_causal` and `training` are read.
        query: Rotated queries.
        key: Rotated keys; every `heads / kv_heads` query heads share one.
        value: Values.
        attention_mask: None; any other value is refused.
        dropout: Dropout of the weights; it must be 0 in training.
        scaling: Factor of the scores; None: `head_dim ** -0.5`.
        sliding_window: Number of tokens that a query sees, itself included; None: all before it.
        softcap: Bound of the scores; None: unbounded.
        cu_seq_lens_q: Document bounds 0, ..., tokens; the keys' are taken to be the same.
        max_length_q: Number of tokens of the longest document.
        document_bounds: `cu_seq_lens_q` on the host. It is optional where that tensor is on the
            CPU or the flash kernel runs.
        document_blocks: The row's documents for the kernel that training runs, in place of bounds.
        kwargs: Further arguments of the family, refused if they would change the result.

    Returns:
        The attended values, and None for the weights, which never exist.

    Raises:
        UserError: The call asks for something that this implementation does not compute.
    """
    _refuse_unsupported(
        module, query, key, attention_mask=attention_mask, dropout=dropout, kwargs=kwargs
    )
    query, key, value = (in_autocast_format(x) for x in (query, key, value))
    options: dict[str, Any] = {"scaling": scaling, "sliding_window": sliding_window}
    if document_blocks is not None:
        return document_blocks.attend(query, key, value, softcap=softcap, **options), None
    bounds = _host_bounds(query, cu_seq_lens_q, document_bounds)
    if softcap is None and varlen_supported(query, value):
        cu_seqlens = _device_bounds(query, cu_seq_lens_q, bounds)
        if max_length_q is None:
            max_length_q = max(b - a for a, b in pairwise(bounds or (0, query.shape[2])))
        return varlen_attention(query, key, value, cu_seqlens, max_length_q, **options), None
    if bounds is None and cu_seq_lens_q is not None:
        raise UserError(
            f"document_bounds: got none with cu_seq_lens_q on {cu_seq_lens_q.device}, expected "
            "them on the host too; build the arguments with packed_kwargs"
        )
    options["softcap"] = softcap
    return loop_attention(query, key, value, bounds or (0, query.shape[2]), **options), None


def loop_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    bounds: tuple[int, ...],
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "batch tokens heads value_dim"]:
    """Compute causal attention document by document, on any device and in any dtype.

    Documents that need neither softcap nor window run torch's fused kernel. The others run in
    blocks of queries that are recomputed in the backward pass, so that no more than one block's
    scores exist at a time.
    """
    # Heads are expanded once for the row: CUDA's fused float32 kernels know no grouped heads.
    key, value = _expand_heads(query, key, value)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs: list[Tensor] = []
    for start, stop in pairwise(bounds):
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        tokens = stop - start
        if softcap is None and (sliding_window is None or tokens <= sliding_window):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
            outputs.append(out.transpose(1, 2))
            continue
        for first in range(0, tokens, QUERY_BLOCK_TOKENS):
            last = min(first + QUERY_BLOCK_TOKENS, tokens)
            oldest = 0 if sliding_window is None else max(0, first - sliding_window + 1)
            out = checkpoint(
                _query_block,
                q[:, :, first:last],
                k[:, :, oldest:last],
                v[:, :, oldest:last],
                scaling=scaling,
                sliding_window=sliding_window,
                softcap=softcap,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            assert isinstance(out, Tensor)
            outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def register() -> None:
    """Make `DOCUMENT_ATTENTION` known to transformers; a second call changes nothing."""
    AttentionInterface.register(DOCUMENT_ATTENTION, document_attention)
    AttentionMaskInterface.register(DOCUMENT_ATTENTION, no_mask)


def no_mask(
    *args: object,
    config: PreTrainedConfig | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: object,
) -> None:
    """Make no mask, and refuse a model that asks for more than a causal or a sliding one.

    Raises:
        UserError: The mask would hide padding, or is neither causal nor sliding.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UserError(
            "attention_mask: got padding, expected none; pack documents into rows without padding "
            "or switch to set_attn_implementation('sdpa')"
        )
    if not getattr(config, "is_causal", True):
        raise _unsupported("bidirectional attention")
    if use_vmap:
        raise _unsupported("a custom mask function")
    if local_size is not None and local_size != getattr(config, "sliding_window", None):
        raise _unsupported("chunked attention")


def _query_block(
    q_BHTC: Tensor,
    k_BHTC: Tensor,
    v_BHTC: Tensor,
    *,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Compute attention of a block of queries over a document's keys up to the last query."""
    queries, keys = q_BHTC.shape[2], k_BHTC.shape[2]
    k_pos_T = torch.arange(keys, device=q_BHTC.device)
    age_TT = k_pos_T[keys - queries :, None] - k_pos_T
    visible_TT = age_TT >= 0
    if sliding_window is not None:
        visible_TT &= age_TT < sliding_window
    if softcap is None:
        return F.scaled_dot_product_attention(
            q_BHTC, k_BHTC, v_BHTC, attn_mask=visible_TT, scale=scaling
        )
    scores_BHTT = q_BHTC @ k_BHTC.transpose(2, 3) * scaling
    scores_BHTT = softcap * torch.tanh(scores_BHTT / softcap)
    scores_BHTT = scores_BHTT.masked_fill(~visible_TT, float("-inf"))
    # The softmax runs in float32, as in the families' own code, or wider if the scores are.
    dtype = torch.promote_types(q_BHTC.dtype, torch.float32)
    return scores_BHTT.softmax(dim=-1, dtype=dtype).to(q_BHTC.dtype) @ v_BHTC


def _expand_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat keys and values until each query head has its own."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _host_bounds(
    query: Tensor, cu_seqlens: Tensor | None, host_bounds: Tensor | None
) -> tuple[int, ...] | None:
    """Return checked document bounds; None if there are none or they are on a device alone."""
    if cu_seqlens is None and host_bounds is None:
        return None
    batch, tokens = query.shape[0], query.shape[2]
    if batch != 1:
        raise UserError(
            f"document bounds: got a batch of {batch} rows, expected 1; lay the rows end to end"
        )
    if host_bounds is None:
        host_bounds = cu_seqlens
    if host_bounds is None or host_bounds.device.type != "cpu":
        return None
    bounds = tuple(host_bounds.tolist())
    if bounds[0] != 0 or bounds[-1] != tokens or any(a >= b for a, b in pairwise(bounds)):
        raise UserError(
            f"document bounds: got {len(bounds)} from {bounds[0]} to {bounds[-1]}, expected rising "
            f"ones from 0 to the row's {tokens} tokens; count padding as a document of its own"
        )
    if cu_seqlens is not None and cu_seqlens.numel() != len(bounds):
        raise UserError(
            f"document_bounds: got {len(bounds)} bounds, expected cu_seq_lens_q's "
            f"{cu_seqlens.numel()}; build both with packed_kwargs"
        )
    return bounds


def _device_bounds(
    query: Tensor, cu_seqlens: Tensor | None, bounds: tuple[int, ...] | None
) -> Tensor:
    """Return document bounds on the queries' device, counted through all rows of the batch."""
    batch, _, tokens, _ = query.shape
    if cu_seqlens is not None:
        return cu_seqlens.to(query.device)
    if bounds is not None:
        return torch.tensor(bounds, dtype=torch.int32, device=query.device)
    return torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=query.device)


def _refuse_unsupported(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    *,
    attention_mask: object,
    dropout: float,
    kwargs: dict[str, object],
) -> None:
    """Refuse a call that asks for something that would be computed wrongly."""
    if attention_mask is not None:
        raise _unsupported("a ready-made attention_mask")
    if key.shape[2] != query.shape[2]:
        raise UserError(
            f"past_key_values: got {key.shape[2]} keys for {query.shape[2]} queries, expected no "
            "filled cache; switch to set_attn_implementation('sdpa') for generation"
        )
    if dropout and module.training:
        raise UserError(
            f"attention_dropout: got {dropout}, expected 0; set config.attention_dropout to 0"
        )
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise _unsupported("bidirectional attention")
    for name in _UNSUPPORTED:
        # `output_attentions=False` asks for nothing; a tensor has no truth value.
        value = kwargs.get(name)
        if value is not None and value is not False:
            raise _unsupported(name)


def _unsupported(what: str) -> UserError:
    return UserError(
        f"attention: got {what}, expected plain causal or sliding-window self-attention; switch to "
        "set_attn_implementation('sdpa') or 'eager'"
    )


register()
