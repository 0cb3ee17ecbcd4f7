"""The elementwise work of the distillation loss: one function to compile, and parts for tiles.

`divergence_region` compiled on a GPU is two passes over both chunks of logits, one for the softmax
statistics and one for the sums and the gradient, with nothing of the chunk's size in float32. The
other functions do the same in tiles that fit a CPU's cache, in place; `distillation_loss.py` puts
both to use.

Legend: C tokens of a chunk, R rows of a tile, V vocabulary. Tensors `s_` are the student's, `q_`
the teacher's.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiny_onn.errors import UserError
from tiny_onn.ops.regions import to_math_dtype

IGNORED_LABEL = -100


class HeadMap(NamedTuple):
    """The map from a head's matrix product to its logits: `softcap * tanh(scale * x / softcap)`."""

    scale: float
    softcap: float | None


class DivergenceChoice(NamedTuple):
    """The terms of a loss."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"]
    temperature: float
    jsd_beta: float
    """Weight of the teacher in the mixture of jsd."""
    label_coef: float = 0.0
    """Share of cross-entropy to the labels at temperature 1."""

    def check(self) -> None:
        """Refuse numbers out of range.

        Raises:
            UserError: a number is out of range; NaN is, since comparisons with it are false.
        """
        if not 0 < self.temperature < math.inf:
            raise UserError(
                f"loss.temperature: got {self.temperature}, expected a finite number above 0; "
                "1 leaves the distributions as they are"
            )
        if not 0 < self.jsd_beta < 1:
            raise UserError(
                f"loss.jsd_beta: got {self.jsd_beta}, expected a number between 0 and 1, both "
                "excluded; for the limits set loss.divergence to forward_kl or reverse_kl"
            )
        if not 0 <= self.label_coef < 1:
            raise UserError(
                f"loss.label_coef: got {self.label_coef}, expected a number from 0 to below 1; "
                "0 leaves the divergence alone"
            )


class ChunkValues(NamedTuple):
    """Values of each token, in nats; float32, or float64 for float64 logits."""

    loss: Tensor
    forward_kl: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor
    student_nll: Tensor
    teacher_nll: Tensor
    agrees: Tensor


def divergence_region(
    s_CV: Float[Tensor, "tokens vocab"],
    q_CV: Float[Tensor, "tokens vocab"],
    labels_C: Int[Tensor, " tokens"],
    maps: tuple[HeadMap, HeadMap],
    choice: DivergenceChoice,
) -> ChunkValues:
    """Compute `distillation_loss.distill` of one chunk from the heads' matrix products.

    The gradient of the loss with respect to `s_CV`, divided by temperature and scale, overwrites
    `s_CV`, so that nothing of its size outlives the call. `maps` belong to the student's head and
    the teacher's.
    """
    (student, teacher), (divergence, temperature, jsd_beta, label_coef) = maps, choice
    s, q = _finish(to_math_dtype(s_CV), student), _finish(to_math_dtype(q_CV), teacher)
    lse_s, lse_q = s.logsumexp(-1, keepdim=True), q.logsumexp(-1, keepdim=True)
    log_s, log_q = s - lse_s, q - lse_q
    probs_s, probs_q = log_s.exp(), log_q.exp()
    # The logarithms are subtracted first: cross-entropy less entropy would cancel where the models
    # agree.
    forward_kl = (probs_q * (log_q - log_s)).sum(-1)
    ignored = labels_C == IGNORED_LABEL
    index_C1 = labels_C.masked_fill(ignored, 0).long()[:, None]
    student_entropy, teacher_entropy = (
        -(p * log_p).sum(-1) for p, log_p in ((probs_s, log_s), (probs_q, log_q))
    )
    # Gathering from the products saves writing a chunk of log-probabilities.
    student_nll = (lse_s - _finish(to_math_dtype(s_CV.gather(-1, index_C1)), student))[:, 0]
    teacher_nll = (lse_q - _finish(to_math_dtype(q_CV.gather(-1, index_C1)), teacher))[:, 0]
    student_nll = student_nll.masked_fill(ignored, 0)
    probs_1 = probs_s
    if temperature != 1:
        s_t, q_t = s / temperature, q / temperature
        log_s = s_t - s_t.logsumexp(-1, keepdim=True)
        log_q = q_t - q_t.logsumexp(-1, keepdim=True)
        probs_s, probs_q = log_s.exp(), log_q.exp()
    if divergence == "forward_kl":
        loss = (probs_q * (log_q - log_s)).sum(-1)
        grad = probs_s - probs_q
    elif divergence == "reverse_kl":
        loss = (probs_s * (log_s - log_q)).sum(-1)
        grad = probs_s * (log_s - log_q - loss[:, None])
    else:
        log_m = torch.logaddexp(log_s + math.log1p(-jsd_beta), log_q + math.log(jsd_beta))
        kl_s = (probs_s * (log_s - log_m)).sum(-1)
        loss = jsd_beta * (probs_q * (log_q - log_m)).sum(-1) + (1 - jsd_beta) * kl_s
        grad = (1 - jsd_beta) * probs_s * (log_s - log_m - kl_s[:, None])
    loss = loss * temperature**2
    if label_coef:
        loss = label_mixed(loss, student_nll, labels_C, label_coef)
        # A comparison makes the one-hot row where it is used; nothing of its size is written.
        is_label = torch.arange(s.shape[-1], device=s.device) == index_C1
        label_grad = (probs_1 - is_label.to(s.dtype)) / temperature
        share_C1 = label_shares(labels_C, label_coef, s.dtype)[:, None]
        grad = (1 - share_C1) * grad + share_C1 * label_grad
    if student.softcap is not None:
        grad = grad * (1 - (s / student.softcap).square())
    agrees = s.argmax(-1) == q.argmax(-1)
    s_CV.copy_(grad)
    return ChunkValues(
        loss,
        forward_kl,
        teacher_entropy,
        student_entropy,
        student_nll,
        teacher_nll.masked_fill(ignored, 0),
        agrees,
    )


def _finish(logits: Tensor, head: HeadMap) -> Tensor:
    logits = logits * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def tile_forward_kl(
    log_s_RV: Tensor, log_q_RV: Tensor, probs_q_RV: Tensor, scratch_RV: Tensor
) -> Tensor:
    """Return KL(q || s) as sum q (log q - log s); only the scratch tile is overwritten."""
    # The logarithms are subtracted first, see `divergence_region`.
    return torch.sub(log_q_RV, log_s_RV, out=scratch_RV).mul_(probs_q_RV).sum(-1)


def tile_reverse_kl_(
    log_s_RV: Tensor, log_q_RV: Tensor, scratch_RV: Tensor, *, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return KL(s || q) and its gradient s (log s - log q - KL); all tiles are overwritten."""
    log_ratio_RV = torch.sub(log_s_RV, log_q_RV, out=scratch_RV)
    probs_s_RV = log_s_RV.exp_()
    loss_R = torch.mul(probs_s_RV, log_ratio_RV, out=log_q_RV).sum(-1)
    if not need_grad:
        return loss_R, None
    return loss_R, log_ratio_RV.sub_(loss_R[:, None]).mul_(probs_s_RV)


def tile_jsd_(
    log_s_RV: Tensor,
    log_q_RV: Tensor,
    probs_q_RV: Tensor,
    scratch_RV: Tensor,
    *,
    beta: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the generalised JSD and its gradient (1 - beta) s (log s - log m - KL(s || m)).

    The terms that come through the mixture m cancel in the gradient. All tiles are overwritten.
    """
    log_m_RV = torch.add(log_s_RV, math.log1p(-beta) - math.log(beta), out=scratch_RV)
    torch.logaddexp(log_m_RV, log_q_RV, out=log_m_RV).add_(math.log(beta))
    kl_q_R = log_q_RV.sub_(log_m_RV).mul_(probs_q_RV).sum(-1)
    log_ratio_RV = torch.sub(log_s_RV, log_m_RV, out=log_m_RV)
    probs_s_RV = log_s_RV.exp_()
    kl_s_R = torch.mul(probs_s_RV, log_ratio_RV, out=log_q_RV).sum(-1)
    loss_R = beta * kl_q_R + (1 - beta) * kl_s_R
    if not need_grad:
        return loss_R, None
    return loss_R, log_ratio_RV.sub_(kl_s_R[:, None]).mul_(probs_s_RV).mul_(1 - beta)


def label_shares(labels_R: Tensor, label_coef: float, dtype: torch.dtype) -> Tensor:
    """Return the share of cross-entropy in each row's loss, 0 where the label is ignored."""
    share_R = torch.full_like(labels_R, label_coef, dtype=dtype)
    return share_R.masked_fill(labels_R == IGNORED_LABEL, 0)


def label_mixed(divergence_R: Tensor, nll_R: Tensor, labels_R: Tensor, label_coef: float) -> Tensor:
    """Return the loss of each row, in which cross-entropy has its share."""
    share_R = label_shares(labels_R, label_coef, divergence_R.dtype)
    return (1 - share_R) * divergence_R + share_R * nll_R


def mix_label_(
    grad_RV: Tensor, probs_s_RV: Tensor, labels_R: Tensor, choice: DivergenceChoice
) -> None:
    """Mix the gradient of cross-entropy into that of the divergence, both over the temperature.

    `probs_s_RV` are the student's probabilities at temperature 1; they are overwritten.
    """
    share_R1 = label_shares(labels_R, choice.label_coef, grad_RV.dtype)[:, None]
    if choice.temperature != 1:
        probs_s_RV.div_(choice.temperature)
    grad_RV.lerp_(probs_s_RV, share_R1)
    index_R1 = labels_R.masked_fill(labels_R == IGNORED_LABEL, 0).long()[:, None]
    grad_RV.scatter_add_(-1, index_R1, share_R1 / -choice.temperature)


def nll(log_probs_RV: Tensor, labels_R: Tensor) -> Tensor:
    """Return -log p(label) of each row, 0 where the label is ignored."""
    ignored_R = labels_R == IGNORED_LABEL
    index_R1 = labels_R.masked_fill(ignored_R, 0).long()[:, None]
    return -log_probs_RV.gather(-1, index_R1)[:, 0].masked_fill(ignored_R, 0)


def finish_(logits_RV: Tensor, head: HeadMap, slope_RV: Tensor | None = None) -> None:
    """Apply scale and softcap in place; write the softcap's derivative to `slope_RV`, if given."""
    if head.scale != 1:
        logits_RV.mul_(head.scale)
    if head.softcap is None:
        return
    logits_RV.div_(head.softcap).tanh_()
    if slope_RV is not None:
        torch.square(logits_RV, out=slope_RV).neg_().add_(1)
    logits_RV.mul_(head.softcap)
