"""Attention for changes of single tokens: each token sees itself changed, and the others unchanged.

Copy 0 of a batch is one document without a change; in the other copies every token is changed. A
token attends to the keys and values of earlier tokens in copy 0, and to its own key and value in
its own copy. So every token is changed as if it were the only one.

Shapes: C copies, T tokens, H heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tiny_onn.model.attention import no_mask
from tiny_onn.model.student import TinyOnnForCausalLM

OWN_KEY_ATTENTION = "tiny_onn_own_keys"


def own_key_attention(  # noqa: PLR0917 - transformers' contract
    module: nn.Module,
    query: Float[Tensor, "copies heads tokens head_dim"],
    key: Float[Tensor, "copies kv_heads tokens head_dim"],
    value: Float[Tensor, "copies kv_heads tokens value_dim"],
    attention_mask: object,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Float[Tensor, "copies tokens heads value_dim"], None]:
    """Compute causal attention over the earlier tokens of copy 0 and the token's own copy.

    For copy 0, and so for a batch of one document, this is plain causal attention. Anything that a
    model family adds to scaling, softcap and window is refused by `DOCUMENT_ATTENTION`, which runs
    first.
    """
    assert attention_mask is None
    assert not (dropout and module.training)
    groups, num_tokens = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (kv.repeat_interleave(groups, dim=1) for kv in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    past = query @ key[:1].mT * scale
    own = (query * key).sum(-1, keepdim=True) * scale
    if softcap is not None:
        past, own = (softcap * torch.tanh(scores / softcap) for scores in (past, own))
    position_T = torch.arange(num_tokens, device=query.device)
    age_TT = position_T[:, None] - position_T
    visible_TT = (age_TT > 0) & (age_TT < (sliding_window or num_tokens))
    scores = torch.cat((past.masked_fill(~visible_TT, float("-inf")), own), dim=-1)
    probs = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    probs = probs.to(query.dtype)
    output = probs[..., :-1] @ value[:1] + probs[..., -1:] * value
    return output.transpose(1, 2), None


def register() -> None:
    """Make `OWN_KEY_ATTENTION` known to transformers; a second call changes nothing."""
    AttentionInterface.register(OWN_KEY_ATTENTION, own_key_attention)
    AttentionMaskInterface.register(OWN_KEY_ATTENTION, no_mask)


@contextmanager
def own_keys(student: TinyOnnForCausalLM) -> Iterator[None]:
    """Use `OWN_KEY_ATTENTION` as the student's attention within the context."""
    register()
    before = student.backbone.config._attn_implementation
    student.set_attn_implementation(OWN_KEY_ATTENTION)
    try:
        yield
    finally:
        student.set_attn_implementation(before or "eager")
