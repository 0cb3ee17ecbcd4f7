"""Distillation losses from hidden states, without ever holding the logits of all tokens.

Both heads are projected for `chunk_tokens` tokens at a time, and the gradient of every token's
loss with respect to its own hidden state is computed in the same pass, so that the backward pass is
one row-wise multiplication. The elementwise work runs on tiles of a few rows, which bound the fp32
memory and, on a CPU, the traffic beyond the cache.

Memory: two (C, V) buffers and the saved (T, D) gradient in the hidden states' dtype, and four
(R, V) tiles in fp32 (five under a softcap), each of 8 MiB (CPU) or 64 MiB (GPU), or of one row
where that is more.
FLOPs per token: 2 V (D_student + D_teacher) for the loss and 2 V D_student for its gradient.
Time of forward_kl with its gradient at V 151,936, D 1,024 on 2 AVX-512 cores, as a share of the
time of F.kl_div and autograd on all logits at once: 0.81 (fp32) and 0.47 (bf16). The three matmuls
alone take 0.73 and 0.35.

Precision: matmuls run in the hidden states' dtype, so the logits are those the model itself gives;
everything elementwise is fp32, or float64 for float64 inputs; autocast changes neither. The
gradients at the logits and at the hidden states are rounded to the hidden states' dtype before any
weighting, so that a mean over many tokens cannot push them out of range; the backward pass
multiplies by temperature, scale and upstream weights in fp32.

Heads and teacher get no gradient, there are no second derivatives, and nothing is clamped: NaN and
Inf in the inputs show in the outputs.

Legend: T tokens, D hidden, V vocabulary, C tokens of a chunk, R rows of a tile. Tensors named `s_`
belong to the student, those named `q_` to the teacher.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, assert_never

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiny_onn.errors import UserError
from tiny_onn.ops.divergence import (
    IGNORED_LABEL,
    ChunkValues,
    DivergenceChoice,
    HeadMap,
    divergence_region,
    finish_,
    label_mixed,
    mix_label_,
    nll,
    tile_forward_kl,
    tile_jsd_,
    tile_reverse_kl_,
)
from tiny_onn.ops.precision import without_autocast
from tiny_onn.ops.regions import compiled_region

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]

# This size is within 13 % of the fastest of 1 to 16 MiB (V 49,152 and 151,936, 1 and 2 AVX-512
# cores). On busy cores smaller tiles lose, since their threads wait for each other more often.
CPU_TILE_BYTES = 8 << 20
GPU_TILE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The map from hidden states to logits, which gets no gradient.

    It is `softcap * tanh(scale * (x @ weight.T + bias) / softcap)`.
    """

    weight: Float[Tensor, "vocab hidden"]
    """Output embeddings, in the dtype of the hidden states they meet."""
    bias: Float[Tensor, " vocab"] | None = None
    """Bias of the matrix product; None: the head has none."""
    scale: float = 1.0
    """Factor of the logits (Cohere's logit_scale, 1 / Granite's logits_scaling)."""
    softcap: float | None = None
    """Bound of the logits' magnitude (Gemma-2's final_logit_softcapping). None: unbounded."""

    def map(self) -> HeadMap:
        """Return the part of the head that follows the matrix product."""
        return HeadMap(self.scale, self.softcap)

    def logits(
        self, hidden_states: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens vocab"]:
        """Return fp32 logits (float64 for float64 inputs); the product is in the inputs' dtype."""
        logits_TV = torch.nn.functional.linear(hidden_states, self.weight, self.bias)
        logits_TV = logits_TV.to(_math_dtype(logits_TV.dtype)) * self.scale
        if self.softcap is None:
            return logits_TV
        return torch.tanh(logits_TV / self.softcap) * self.softcap


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillValues:
    """The results of one pass for every token, in nats; fp32 (float64 for float64 inputs)."""

    loss: Float[Tensor, " tokens"]
    """The chosen mean of divergence and cross-entropy; no other value has a gradient."""
    forward_kl: Float[Tensor, " tokens"]
    """KL(teacher || student) at temperature 1, whatever the loss is."""
    teacher_entropy: Float[Tensor, " tokens"]
    """Entropy of the teacher at temperature 1: soft-label cross-entropy less `forward_kl`. NaN
    without metrics."""
    student_entropy: Float[Tensor, " tokens"]
    """Entropy of the student at temperature 1. NaN without metrics."""
    student_nll: Float[Tensor, " tokens"]
    """-log p(label) of the student, 0 where the label is -100. NaN without metrics."""
    teacher_nll: Float[Tensor, " tokens"]
    """-log p(label) of the teacher, 0 where the label is -100. NaN without metrics."""
    agrees: Bool[Tensor, " tokens"]
    """True if student and teacher rank the same token first. False without metrics."""


@without_autocast
def distill(
    student_hidden: Float[Tensor, "tokens student_dim"],
    teacher_hidden: Float[Tensor, "tokens teacher_dim"],
    student_head: Head,
    teacher_head: Head,
    labels: Int[Tensor, " tokens"],
    *,
    divergence: Divergence,
    temperature: float,
    jsd_beta: float,
    chunk_tokens: int,
    label_coef: float = 0.0,
    need_metrics: bool = True,
    compiled: bool = False,
) -> DistillValues:
    """Compute the per-token divergence of two models' next-token distributions.

    `loss[t] = temperature**2 * divergence(softmax(teacher_logits[t] / temperature),
    softmax(student_logits[t] / temperature))`, differentiable with respect to `student_hidden`
    only, exactly for any weighting of the tokens. The gradient work is skipped where
    `student_hidden` needs no gradient. With a `label_coef`, the loss of a token with a label is
    `(1 - label_coef)` of that and `label_coef` of `student_nll`. Labels do not mask the loss.

    `forward_kl` is KL(teacher || student), `reverse_kl` KL(student || teacher), and `jsd` is
    `beta KL(teacher || m) + (1 - beta) KL(student || m)` with the mixture
    `m = beta teacher + (1 - beta) student`.

    Args:
        student_hidden: Final hidden states of the student, after its last norm.
        teacher_hidden: Final hidden states of the teacher; width and dtype may differ.
        student_head: The student's output projection.
        teacher_head: The teacher's output projection, over the same vocabulary.
        labels: Next tokens, -100 where there is none.
        divergence: The divergence that `loss` is.
        temperature: A number above 0 that divides both models' logits.
        jsd_beta: Weight of the teacher in the mixture of `jsd`, in (0, 1).
        chunk_tokens: Number of tokens whose logits exist at once, at least 1.
        label_coef: Share of cross-entropy to the label in a token's loss, in [0, 1).
        need_metrics: Whether to fill the entropies, the two `nll` and `agrees`.
        compiled: Whether the elementwise work runs through torch.compile, from which a GPU gains;
            the metrics are then filled in any case.

    Raises:
        UserError: Sizes, dtypes, labels or settings do not fit. It is a ValueError too.

    Source: the generalised JSD is equation 1 of Agarwal et al., arXiv 2306.13649, with P the
    teacher and Q the student. Divided by beta, it tends to the forward KL as beta tends to 0.
    """
    choice = DivergenceChoice(divergence, temperature, jsd_beta, label_coef)
    choice.check()
    if chunk_tokens < 1:
        raise UserError(
            f"loss.chunk_tokens: got {chunk_tokens}, expected at least 1; "
            "a few hundred keep the matrix products efficient"
        )
    student, teacher = _Side(student_hidden, student_head), _Side(teacher_hidden, teacher_head)
    _check_tensors(student, teacher, labels)
    need_grad = student_hidden.requires_grad and torch.is_grad_enabled()
    settings = _Settings(choice, chunk_tokens, need_metrics, need_grad, compiled)
    with torch.no_grad():
        values, grad_TD = _distill_chunks(student, teacher, labels, settings)
    if not settings.need_grad:
        return values
    # loss = t**2 * divergence(logits / t): the chain rule leaves one factor t.
    factor = temperature * student_head.scale
    return replace(values, loss=_WithGradient.apply(student_hidden, values.loss, grad_TD, factor))


class _Side(NamedTuple):
    """The hidden states and the head of one of the two models."""

    hidden: Tensor
    head: Head


class _Settings(NamedTuple):
    """The options of `distill`, and whether it needs a gradient."""

    choice: DivergenceChoice
    chunk_tokens: int
    need_metrics: bool
    need_grad: bool
    compiled: bool


class _WithGradient(torch.autograd.Function):
    """Per-token losses whose gradient at their own hidden state is already known."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, loss_T: Tensor, grad_TD: Tensor, factor: float) -> Tensor:  # noqa: ANN401 - torch names no type with these attributes
        ctx.save_for_backward(grad_TD)
        ctx.factor = factor
        return loss_T.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401 # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the names
        (grad_TD,) = ctx.saved_tensors
        weight_T1 = (grad_outputs[0] * ctx.factor)[:, None]
        return (grad_TD * weight_T1).to(grad_TD.dtype), None, None, None


def _distill_chunks(
    student: _Side, teacher: _Side, labels: Tensor, settings: _Settings
) -> tuple[DistillValues, Tensor]:
    """Return all values, and the gradient at the student's states without temperature and scale."""
    (s_TD, s_head), (q_TD, q_head) = student, teacher
    T, V = len(labels), len(s_head.weight)
    values = _unfilled_values(labels, _math_dtype(s_TD.dtype, q_TD.dtype))
    grad_TD = s_TD.new_empty(s_TD.shape if settings.need_grad else 0)
    # All chunks share one allocation: faulting in fresh pages costs a CPU more than the maths.
    C = min(settings.chunk_tokens, T)
    s_buffer_CV, q_buffer_CV = s_TD.new_empty(C, V), q_TD.new_empty(C, V)
    maps = (s_head.map(), q_head.map())
    if settings.compiled:
        fill = partial(_fill_compiled, maps, settings.choice)
    else:
        fill = _tiled_fill(s_buffer_CV, maps, settings)
    for start in range(0, T, settings.chunk_tokens):
        rows = slice(start, min(start + settings.chunk_tokens, T))
        s_CV, q_CV = (buffer[: rows.stop - start] for buffer in (s_buffer_CV, q_buffer_CV))
        _project(s_TD[rows], s_head, s_CV)
        _project(q_TD[rows], q_head, q_CV)
        fill(values, rows, labels[rows], (s_CV, q_CV))
        if settings.need_grad:
            torch.mm(s_CV, s_head.weight, out=grad_TD[rows])
    return values, grad_TD


def _fill_compiled(  # noqa: PLR0917
    maps: tuple[HeadMap, HeadMap],
    choice: DivergenceChoice,
    values: DistillValues,
    rows: slice,
    labels_C: Tensor,
    chunks: tuple[Tensor, Tensor],
) -> None:
    """Fill `rows` of `values` from both heads' products; the student's become the gradient."""
    chunk: ChunkValues = compiled_region(divergence_region)(*chunks, labels_C, maps, choice)
    for name in ChunkValues._fields:
        getattr(values, name)[rows] = getattr(chunk, name)


def _tiled_fill(
    buffer_CV: Tensor, maps: tuple[HeadMap, HeadMap], settings: _Settings
) -> Callable[..., None]:
    """Return a function that does the work of `_fill_compiled` in tiles, shared by all chunks."""
    (C, V), dtype = buffer_CV.shape, _math_dtype(buffer_CV.dtype)
    tile_bytes = CPU_TILE_BYTES if buffer_CV.device.type == "cpu" else GPU_TILE_BYTES
    R = min(C, max(1, tile_bytes // (V * dtype.itemsize)))
    tiles = [buffer_CV.new_empty((R, V), dtype=dtype) for _ in range(4)]
    s_map, q_map = maps
    need_slope = settings.need_grad and s_map.softcap is not None
    slope = torch.empty_like(tiles[0]) if need_slope else None

    def fill(
        values: DistillValues, rows: slice, labels_C: Tensor, chunks: tuple[Tensor, Tensor]
    ) -> None:
        s_CV, q_CV = chunks
        for low in range(0, len(labels_C), R):
            part = slice(low, min(low + R, len(labels_C)))
            num = part.stop - low
            s_RV, q_RV, w1_RV, w2_RV = (tile[:num] for tile in tiles)
            slope_RV = None if slope is None else slope[:num]
            raw_RV = s_CV[part]
            finish_(s_RV.copy_(raw_RV), s_map, slope_RV)
            finish_(q_RV.copy_(q_CV[part]), q_map)
            work = (s_RV, q_RV, w1_RV, w2_RV)
            into = slice(rows.start + low, rows.start + part.stop)
            grad_RV = _fill_rows(values, into, labels_C[part], work, settings)
            if grad_RV is not None:
                if settings.choice.label_coef:
                    if settings.choice.temperature != 1:
                        finish_(q_RV.copy_(raw_RV), s_map)
                        torch.softmax(q_RV, -1, out=w1_RV)
                    mix_label_(grad_RV, w1_RV, labels_C[part], settings.choice)
                raw_RV.copy_(grad_RV if slope_RV is None else grad_RV.mul_(slope_RV))

    return fill


def _fill_rows(
    values: DistillValues,
    rows: slice,
    labels_R: Tensor,
    tiles: tuple[Tensor, Tensor, Tensor, Tensor],
    settings: _Settings,
) -> Tensor | None:
    """Fill `rows` of `values` from logits; return the divergence's gradient at the logits over t.

    `tiles` are the student's logits, the teacher's logits, and two scratch tiles. All of them are
    overwritten: each is used again as soon as its contents are no longer needed. With a
    `label_coef`, the first scratch tile then holds the student's probabilities if t is 1, and is
    free like the teacher's if not.
    """
    s_RV, q_RV, w1_RV, w2_RV = tiles
    if settings.need_metrics:
        values.agrees[rows] = s_RV.argmax(-1) == q_RV.argmax(-1)
    log_s_RV = torch.log_softmax(s_RV, -1, out=w1_RV)
    log_q_RV = torch.log_softmax(q_RV, -1, out=s_RV)
    probs_q_RV = torch.exp(log_q_RV, out=q_RV)
    divergence, t, beta, label_coef = settings.choice
    nll_R = nll(log_s_RV, labels_R)
    if settings.need_metrics:
        values.student_nll[rows] = nll_R
        values.teacher_nll[rows] = nll(log_q_RV, labels_R)
        values.teacher_entropy[rows] = -torch.mul(probs_q_RV, log_q_RV, out=w2_RV).sum(-1)
        values.student_entropy[rows] = -torch.exp(log_s_RV, out=w2_RV).mul_(log_s_RV).sum(-1)
    forward_kl_R = tile_forward_kl(log_s_RV, log_q_RV, probs_q_RV, w2_RV)
    values.forward_kl[rows] = forward_kl_R
    work = (log_s_RV, log_q_RV, probs_q_RV, w2_RV)

    if t != 1:
        # Log-probabilities are logits less a constant, and a softmax ignores constants.
        log_s_RV = torch.log_softmax(w1_RV.div_(t), -1, out=w2_RV)
        log_q_RV = torch.log_softmax(s_RV.div_(t), -1, out=q_RV)
        work = (log_s_RV, log_q_RV, torch.exp(log_q_RV, out=w1_RV), s_RV)
    match divergence:
        case "forward_kl":
            loss_R = forward_kl_R if t == 1 else tile_forward_kl(*work)
            out_RV = work[3] if label_coef else work[0]
            grad_RV = torch.sub(work[0].exp_(), work[2], out=out_RV) if settings.need_grad else None
        case "reverse_kl":
            loss_R, grad_RV = tile_reverse_kl_(*work[:2], work[3], need_grad=settings.need_grad)
        case "jsd":
            loss_R, grad_RV = tile_jsd_(*work, beta=beta, need_grad=settings.need_grad)
        case _ as unknown:
            assert_never(unknown)
    loss_R = loss_R * t**2
    values.loss[rows] = label_mixed(loss_R, nll_R, labels_R, label_coef) if label_coef else loss_R
    return grad_RV


def _project(hidden_CD: Tensor, head: Head, out_CV: Tensor) -> None:
    """Write the head's linear map of the hidden states into `out_CV`."""
    if head.bias is None:
        torch.mm(hidden_CD, head.weight.T, out=out_CV)
    else:
        torch.addmm(head.bias, hidden_CD, head.weight.T, out=out_CV)


def _unfilled_values(labels_T: Tensor, dtype: torch.dtype) -> DistillValues:
    """Return values that hold NaN and False until they are written."""
    floats_6T = torch.full((6, len(labels_T)), math.nan, dtype=dtype, device=labels_T.device)
    names = tuple(name for name in ChunkValues._fields if name != "agrees")
    agrees_T = torch.zeros_like(labels_T, dtype=torch.bool)
    return DistillValues(**dict(zip(names, floats_6T, strict=True)), agrees=agrees_T)


def _math_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _check_tensors(student: _Side, teacher: _Side, labels: Tensor) -> None:
    for who, (hidden, head) in (("student", student), ("teacher", teacher)):
        got = (head.weight.dtype, head.weight.shape[-1])
        expected = (hidden.dtype, hidden.shape[-1])
        if got != expected:
            raise UserError(
                f"{who} head: got dtype and width {got}, expected {expected} as the hidden "
                "states; pass the head of the same model, in their dtype"
            )
    V, teacher_vocab = len(student.head.weight), len(teacher.head.weight)
    if teacher_vocab != V:
        raise UserError(
            f"teacher vocabulary: got {teacher_vocab}, expected {V} as the student's; "
            "use a teacher with the student's tokenizer and head size"
        )
    counts = (len(student.hidden), len(teacher.hidden), len(labels))
    if len(set(counts)) != 1:
        raise UserError(
            f"tokens: got {counts} of student, teacher and labels, expected equal numbers; "
            "run both models on the same rows"
        )
    # A graph cannot be read while it is captured.
    capturing = labels.is_cuda and torch.cuda.is_current_stream_capturing()
    if not capturing and bool(((labels != IGNORED_LABEL) & ((labels < 0) | (labels >= V))).any()):
        raise UserError(
            f"labels: got values from {labels.min().item()} to {labels.max().item()}, expected "
            f"{IGNORED_LABEL} or 0 to {V - 1}; use the tokenizer that belongs to the head"
        )
