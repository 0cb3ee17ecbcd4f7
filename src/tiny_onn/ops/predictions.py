"""Two models' next-token distributions compared token by token, without the logits of all tokens.

An evaluation needs more of a distribution than the loss does: both divergences, the most likely
tokens and the confidence in the first of them. All follow from the logits of a few tokens at once,
which are computed in the hidden states' number format and compared in float32.

Memory: six (C, V) buffers in float32, C tokens of a chunk, of `CHUNK_BYTES` each or of one token.

Legend: T tokens, D hidden, V vocabulary, C tokens of a chunk.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn.ops.distillation_loss import Head
from tiny_onn.ops.divergence import nll
from tiny_onn.ops.precision import without_autocast

# A buffer of this size holds the logits of 340 tokens at a vocabulary of 49,152.
CHUNK_BYTES = 64 << 20
TOP = 5


class Predictions(NamedTuple):
    """The comparison of a model's next-token distributions with a reference's, for every token."""

    forward_kl: Float[Tensor, " tokens"]
    """KL(reference || model), nats."""
    reverse_kl: Float[Tensor, " tokens"]
    """KL(model || reference), nats."""
    entropy: Float[Tensor, " tokens"]
    """Entropy of the model's distribution, nats."""
    reference_entropy: Float[Tensor, " tokens"]
    nll: Float[Tensor, " tokens"]
    """-log p(label) of the model, nats; 0 where the label is -100."""
    reference_nll: Float[Tensor, " tokens"]
    agrees: Bool[Tensor, " tokens"]
    """True if both rank the same token first."""
    top5_overlap: Float[Tensor, " tokens"]
    """Share of the reference's five most likely tokens that are among the model's five."""
    confidence: Float[Tensor, " tokens"]
    """Probability of the model's most likely token."""
    reference_confidence: Float[Tensor, " tokens"]
    correct: Bool[Tensor, " tokens"]
    """True if the model's most likely token is the label."""
    reference_correct: Bool[Tensor, " tokens"]


@torch.no_grad()
@without_autocast
def compare_predictions(
    hidden: Float[Tensor, "tokens dim"],
    reference_hidden: Float[Tensor, "tokens reference_dim"],
    head: Head,
    reference_head: Head,
    labels: Int[Tensor, " tokens"],
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Predictions:
    """Compare a model's next-token distributions with those of a reference.

    Args:
        hidden: Final hidden states of the model, after its last norm.
        reference_hidden: Final hidden states of the reference.
        head: The model's output projection.
        reference_head: The reference's output projection, over the same vocabulary.
        labels: Next tokens, -100 where there is none.
        chunk_bytes: Size of a buffer of logits in float32, which decides the tokens of a chunk.
    """
    chunk_tokens = max(1, chunk_bytes // (4 * len(head.weight)))
    chunks = [
        _compare_chunk(
            head.logits(hidden[start : start + chunk_tokens]),
            reference_head.logits(reference_hidden[start : start + chunk_tokens]),
            labels[start : start + chunk_tokens],
        )
        for start in range(0, len(labels), chunk_tokens)
    ]
    return Predictions(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _compare_chunk(logits_CV: Tensor, reference_CV: Tensor, labels_C: Tensor) -> Predictions:
    top = min(TOP, logits_CV.shape[-1])
    best_CK, reference_best_CK = (x.topk(top).indices for x in (logits_CV, reference_CV))
    # The highest of equal logits may come at any place of `topk`, and at the first of `argmax`.
    first_C, reference_first_C = (x.argmax(-1) for x in (logits_CV, reference_CV))
    log_s_CV = torch.log_softmax(logits_CV, -1)
    log_q_CV = torch.log_softmax(reference_CV, -1)
    probs_s_CV, probs_q_CV = log_s_CV.exp(), log_q_CV.exp()
    shared_C = (best_CK[:, :, None] == reference_best_CK[:, None]).any(1).sum(-1)
    # The logarithms are subtracted first, as differences of entropies would cancel.
    ratio_CV = log_q_CV - log_s_CV
    return Predictions(
        forward_kl=(probs_q_CV * ratio_CV).sum(-1),
        reverse_kl=-(probs_s_CV * ratio_CV).sum(-1),
        entropy=-(probs_s_CV * log_s_CV).sum(-1),
        reference_entropy=-(probs_q_CV * log_q_CV).sum(-1),
        nll=nll(log_s_CV, labels_C),
        reference_nll=nll(log_q_CV, labels_C),
        agrees=first_C == reference_first_C,
        top5_overlap=shared_C / top,
        confidence=probs_s_CV.amax(-1),
        reference_confidence=probs_q_CV.amax(-1),
        correct=first_C == labels_C,
        reference_correct=reference_first_C == labels_C,
    )
