"""A check that a decoder which reads packed rows keeps their documents apart, on a few tokens.

A family whose layers drop the document bounds on their way to attention runs without an error and
lets every document see the ones before it. The check therefore runs a row of two short documents,
changes one of them, and requires that the other's hidden states stay the same, once by bounds and
once by the blocks that training on a GPU takes. These run uncompiled, since the kernel has no part
in what the layers hand on. The check also compares the decoder with its own plain attention on one
document, because a different kind of attention cannot be recognised from outside.

The check takes eight forward passes of `TRIED_TOKENS` tokens without the output head.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tiny_onn.data.packing import PackedRow, build_row
from tiny_onn.errors import LoadErrors, UserError
from tiny_onn.model.attention import DOCUMENT_ATTENTION, block_kwargs, packed_kwargs
from tiny_onn.model.backbone import last_hidden_states

TRIED_TOKENS = 24
# A sliding window has an effect only if it is shorter than the tried documents.
_WINDOW_TOKENS = 4
# The families' own attention rounds differently, and every layer adds to the difference. Of 35
# families with 24 layers of large random weights, none differed by more than 0.13 of the hidden
# states' size in bfloat16; with 2 layers in float32, none differed by more than 1e-6.
_LEAST_TOLERANCE = 0.01
_ROOTS_OF_EPS = 6.0


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Refuse a dense model under `DOCUMENT_ATTENTION` whose documents are not kept apart.

    Raises:
        UserError: a document changes another one, a token changes an earlier one, or attention
            within one document differs from the model's own.
    """
    vocab_size = model.config.get_text_config().vocab_size
    if vocab_size < 2:
        return
    try:
        with LoadErrors(_does_not_run), _short_windows(model):
            _check_documents(model, vocab_size, "bounds", packed_kwargs)
            with _uncompiled():
                _check_documents(model, vocab_size, "blocks", block_kwargs)
            _check_own_attention(model, vocab_size)
    except UserError as error:
        # The message of attention ends with a call that users who name a model cannot make.
        reason = str(error).partition("; switch to ")[0]
        reason += "" if reason.endswith(" else") else ";"
        raise UserError(
            f"architecture {type(model).__name__} (model_type {model.config.model_type!r}) cannot "
            f"be used: {reason} name a model of another family, as Llama, Qwen3, Mistral or Gemma 2"
        ) from error


def _does_not_run(reason: str) -> str:
    return (
        f"it does not run on {TRIED_TOKENS} tokens ({reason}); restore its config.json if that is "
        "not the one of its weights, else"
    )


def _check_documents(
    model: PreTrainedModel,
    vocab_size: int,
    way: str,
    kwargs_of: Callable[[PackedRow], dict[str, Any]],
) -> None:
    half = TRIED_TOKENS // 2
    ids_T = _spread_ids(vocab_size, model.device)
    hidden_TD = _packed(model, ids_T, kwargs_of)
    # The first case changes the first document, the second the end of the second document.
    for changed, unchanged, problem in (
        (slice(0, half), slice(half, None), "a document sees the ones before it"),
        (slice(half + half // 2, None), slice(0, half + half // 2), "a token sees later ones"),
    ):
        other_T = ids_T.clone()
        other_T[changed] = (ids_T[changed] + max(1, vocab_size // 3)) % vocab_size
        difference = (_packed(model, other_T, kwargs_of) - hidden_TD)[unchanged].abs().max()
        if not difference:
            continue
        # Some devices do not repeat their bits, so that the same row twice shows their noise.
        noise = (_packed(model, ids_T, kwargs_of) - hidden_TD)[unchanged].abs().max()
        if difference > 10 * noise:
            raise UserError(
                f"in a row of packed documents {problem}, since its layers do not hand the "
                f"documents' {way} on to attention"
            )


def _check_own_attention(model: PreTrainedModel, vocab_size: int) -> None:
    ids_1T = _spread_ids(vocab_size, model.device)[None]
    ours_TD = last_hidden_states(model, ids_1T)[0].float()
    model.set_attn_implementation("eager")
    try:
        own_TD = last_hidden_states(model, ids_1T)[0].float()
    finally:
        model.set_attn_implementation(DOCUMENT_ATTENTION)
    difference_T = (ours_TD - own_TD).norm(dim=-1) / own_TD.norm(dim=-1).clamp(min=1e-12)
    tolerance = max(_LEAST_TOLERANCE, _ROOTS_OF_EPS * torch.finfo(model.dtype).eps ** 0.5)
    difference = float(difference_T.median())
    # Hidden states that are NaN pass here and are refused by `check_runs`, with the reason.
    if difference > tolerance:
        raise UserError(
            "its attention is of another kind than the plain causal or sliding-window one that "
            f"keeps packed documents apart: hidden states differ by {difference:.2g} of their size,"
            f" expected at most {tolerance:.2g}"
        )


def _packed(
    model: PreTrainedModel,
    ids_T: Int[Tensor, " tokens"],
    kwargs_of: Callable[[PackedRow], dict[str, Any]],
) -> Float[Tensor, "tokens dim"]:
    """Return the hidden states of two documents of equal length in one row."""
    documents = ids_T.view(2, -1).tolist()
    row = build_row(documents, row_tokens=TRIED_TOKENS, pad_token_id=0).to(model.device)
    return last_hidden_states(model, row.input_ids, **kwargs_of(row))[0]


def _spread_ids(vocab_size: int, device: torch.device) -> Int[Tensor, " tokens"]:
    """Return token ids from all over the vocabulary: unused neighbours may be embedded alike."""
    stride = max(1, vocab_size // TRIED_TOKENS)
    return torch.arange(TRIED_TOKENS, device=device) * stride % vocab_size


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Run compiled functions as they are written within the context, and warn of no slowness."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Set every sliding window to `_WINDOW_TOKENS` tokens within the context."""
    holders = [model.config.get_text_config(), *model.modules()]
    windows = [(holder, getattr(holder, "sliding_window", None)) for holder in holders]
    windows = [(holder, window) for holder, window in windows if type(window) is int]
    try:
        for holder, _ in windows:
            holder.sliding_window = _WINDOW_TOKENS
        yield
    finally:
        for holder, window in windows:
            holder.sliding_window = window
