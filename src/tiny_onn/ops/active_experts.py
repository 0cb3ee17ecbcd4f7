"""The expert layer without gradients on a CPU: only active experts are computed.

Generating one token at a time is bound by reading weights, so a few tokens are computed by two
`embedding_bag`s: one bag of weight rows per active pair of token and expert gives gate and up,
another gives the expert's output. Each reads the rows of active experts alone, in one call, where a
matrix product per expert costs a call each. Bags need rows that are contiguous in memory, as
`Experts.store_for_generation` stores them.

More tokens, and weights that are stored otherwise or in another number format, go expert by expert:
the expert's tokens are gathered, pass two matrix products, and are added to the output. Where so
many pairs are active, or so few tokens are there, that gathering costs more than it saves, an
expert takes all tokens at weight 0 for those that did not choose it, as a dense MLP would. Shape,
number format, storage and share of active pairs decide (`Limits`); the ways differ by rounding.

While experts are skipped, no weight is copied: one in another number format than the input is cast
one expert at a time. Buffers are made once per call and used for every expert, because fresh ones
cost page faults. Sums run in a fixed order, in float32, so that results repeat bit for bit.

Legend: T tokens, R active pairs of token and expert, D hidden, E experts, I expert width, J = 2 * I
gate and up rows, N tokens of an expert, M rows of its matrix products.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn.ops.layout import joined_down
from tiny_onn.ops.precision import in_autocast_format, without_autocast
from tiny_onn.ops.regions import Activation, to_math_dtype

# Bags read an expert's weights for each of its pairs, a dense layer reads each weight once. Bags
# were faster up to about so many reads of all weights.
MAX_READS = 2
# From so many tokens on, a product for every expert is faster than one batched product in bfloat16.
LOOP_TOKENS = 64
# oneDNN compiles its bfloat16 products for every number of rows that it meets.
ROUND_ROWS = 32


class Limits(NamedTuple):
    """The bounds between the ways as they were measured on one thread, for one number format."""

    least_tokens: int
    """The number of tokens from which gathering an expert's tokens pays."""
    most: float
    """The share of active pairs of token and expert up to which it pays."""
    least_joined: float
    """The share from which one product of all down projections costs less than one per expert."""


FLOAT32_LIMITS = Limits(64, 0.9, 0.8)
BFLOAT16_LIMITS = Limits(256, 0.6, 0.4)


def can_compute(x_TD: Float[Tensor, "tokens hidden"]) -> bool:
    """Return whether this path computes these inputs: on a CPU, without gradients or compiler."""
    return (
        x_TD.device.type == "cpu"
        and len(x_TD) > 0
        and not torch.is_grad_enabled()
        # The loop's length depends on data, which torch.compile cannot trace.
        and not torch.compiler.is_compiling()
    )


@torch.no_grad()
def expert_layer(
    x_TD: Float[Tensor, "tokens hidden"],
    gate_up_EJD: Float[Tensor, "experts rows hidden"],
    down_EDI: Float[Tensor, "experts hidden width"],
    *,
    weights_TE: Float[Tensor, "tokens experts"],
    active_TE: Bool[Tensor, "tokens experts"],
    activation: Activation,
) -> Float[Tensor, "tokens hidden"]:
    """Return `y[t] = sum_e weights[t, e] * expert_e(x[t])` over the active experts.

    `reference.expert_layer` defines it.

    Args:
        x_TD: the layer's input; under autocast it is cast to autocast's number format.
        gate_up_EJD: an expert's gate rows, then its up rows, in any format; cast to x's.
        down_EDI: down projections, in any format; cast to x's.
        weights_TE: routing weights; those of inactive experts are not read.
        active_TE: the experts that are computed for each token.
        activation: the experts' activation, an elementwise function.
    """
    x_TD = in_autocast_format(x_TD)
    E, T, pairs = len(down_EDI), len(x_TD), int(active_TE.sum())
    stored = gate_up_EJD.dtype == down_EDI.dtype == x_TD.dtype and down_EDI.mT.is_contiguous()
    limits = BFLOAT16_LIMITS if x_TD.dtype == torch.bfloat16 else FLOAT32_LIMITS
    if pairs <= MAX_READS * E:
        way = _by_bags if stored and gate_up_EJD.mT.is_contiguous() else _by_expert
    elif limits.least_tokens <= T and pairs <= limits.most * T * E:
        # Down projections that are not stored so would be copied to be joined.
        way = _joined if stored and pairs > limits.least_joined * T * E else _by_expert
    else:
        way = _every
    return way(x_TD, gate_up_EJD, down_EDI, weights_TE, active_TE, activation)


@without_autocast
def _by_bags(  # noqa: PLR0917
    x_TD: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    weights_TE: Tensor,
    active_TE: Tensor,
    activation: Activation,
) -> Tensor:
    token_R, expert_R = active_TE.nonzero().unbind(1)
    one = len(x_TD) == 1
    # A view for the one token spares calls, which take most of a small layer's time.
    x_RD = x_TD.expand(len(expert_R), -1) if one else x_TD[token_R]
    weights_R = weights_TE[0, expert_R] if one else weights_TE[token_R, expert_R]
    pre_RJ = _bags(gate_up_EJD.mT, expert_R, x_RD)
    hidden_RI = _hidden(pre_RJ, weights_R, activation).to(x_TD.dtype)
    out_RD = to_math_dtype(_bags(down_EDI.mT, expert_R, hidden_RI))
    y_TD = out_RD.sum(0, keepdim=True) if one else torch.zeros_like(x_TD, dtype=out_RD.dtype)
    if not one:
        y_TD.index_add_(0, token_R, out_RD)
    return y_TD.to(x_TD.dtype)


def _bags(rows_ENM: Tensor, expert_R: Tensor, factors_RN: Tensor) -> Tensor:
    """Return `sum_n factors[r, n] * rows[expert of r, n]` for every r, (R, M)."""
    E, N, M = rows_ENM.shape
    place_N = torch.arange(N, dtype=torch.int32)
    place_RN = expert_R.int()[:, None] * N + place_N
    table = rows_ENM.view(E * N, M)
    return F.embedding_bag(place_RN, table, mode="sum", per_sample_weights=factors_RN)


@without_autocast
def _by_expert(  # noqa: PLR0917
    x_TD: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    weights_TE: Tensor,
    active_TE: Tensor,
    activation: Activation,
) -> Tensor:
    y_TD = to_math_dtype(x_TD.new_zeros(0)).new_zeros(x_TD.shape)
    out_MD, term_TD = x_TD.new_empty(_rounded(len(x_TD), x_TD.dtype), x_TD.shape[1]), y_TD
    if y_TD.dtype != x_TD.dtype:
        term_TD = torch.empty_like(y_TD)
    for e, token_N, hidden_MI in _hidden_by_expert(
        x_TD, gate_up_EJD, weights_TE, active_TE, activation
    ):
        N, M = len(token_N), len(hidden_MI)
        torch.mm(hidden_MI, down_EDI[e].to(x_TD.dtype).T, out=out_MD[:M])
        term_ND = out_MD[:N]
        if term_TD is not y_TD:
            term_ND = term_TD[:N].copy_(term_ND)
        # A token occurs once per expert, so that no two additions go to one place.
        y_TD.index_add_(0, token_N, term_ND)
    return y_TD.to(x_TD.dtype)


@without_autocast
def _joined(  # noqa: PLR0917
    x_TD: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    weights_TE: Tensor,
    active_TE: Tensor,
    activation: Activation,
) -> Tensor:
    T, (E, _, I) = len(x_TD), down_EDI.shape
    hidden_TEI = x_TD.new_zeros(T, E, I)
    for e, token_N, hidden_MI in _hidden_by_expert(
        x_TD, gate_up_EJD, weights_TE, active_TE, activation
    ):
        hidden_TEI[:, e].index_copy_(0, token_N, hidden_MI[: len(token_N)])
    return hidden_TEI.view(T, E * I) @ joined_down(down_EDI, x_TD.dtype).T


def _hidden_by_expert(
    x_TD: Tensor,
    gate_up_EJD: Tensor,
    weights_TE: Tensor,
    active_TE: Tensor,
    activation: Activation,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield every expert that has tokens, the tokens, and their hidden activations (M, I).

    There are at least as many rows as tokens; rows beyond them hold what was there before. The next
    expert writes over them.
    """
    (T, D), J, dtype = x_TD.shape, gate_up_EJD.shape[1], x_TD.dtype
    most = _rounded(T, dtype)
    x_MD, pre_MJ = x_TD.new_zeros(most, D), x_TD.new_empty(most, J)
    hidden_MI, weights_ET = x_TD.new_zeros(most, J // 2), weights_TE.T.contiguous()
    for e, token_N in _groups(active_TE):
        N = len(token_N)
        M = _rounded(N, dtype)
        torch.index_select(x_TD, 0, token_N, out=x_MD[:N])
        torch.mm(x_MD[:M], gate_up_EJD[e].to(dtype).T, out=pre_MJ[:M])
        hidden_MI[:N] = _hidden(pre_MJ[:N], weights_ET[e, token_N], activation)
        yield e, token_N, hidden_MI[:M]


@without_autocast
def _every(  # noqa: PLR0917
    x_TD: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    weights_TE: Tensor,
    active_TE: Tensor,
    activation: Activation,
) -> Tensor:
    T, D = x_TD.shape
    E, J, dtype = len(down_EDI), gate_up_EJD.shape[1], x_TD.dtype
    pre_ETJ = x_TD.new_empty(E, T, J)
    if T < LOOP_TOKENS or dtype != torch.bfloat16:
        torch.bmm(x_TD.expand(E, T, D), gate_up_EJD.to(dtype).mT, out=pre_ETJ)
    else:
        for e in range(E):
            torch.mm(x_TD, gate_up_EJD[e].to(dtype).T, out=pre_ETJ[e])
    weights_ET = weights_TE.where(active_TE, 0).T
    hidden_TEI = x_TD.new_empty(T, E, J // 2)
    hidden_TEI.copy_(_hidden(pre_ETJ, weights_ET, activation).transpose(0, 1))
    return hidden_TEI.view(T, -1) @ joined_down(down_EDI, dtype).T


def _groups(active_TE: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield every expert that has tokens, and its tokens in rising order."""
    token_R = active_TE.T.nonzero()[:, 1].contiguous()
    ends = active_TE.sum(0).cumsum(0).tolist()
    for e, (begin, end) in enumerate(pairwise([0, *ends])):
        if begin < end:
            yield e, token_R[begin:end]


def _hidden(pre_NJ: Tensor, weights_N: Tensor, activation: Activation) -> Tensor:
    """Return `weights * act(gate) * up` in float32 (N, I), float64 for float64 inputs."""
    gate_NI, up_NI = pre_NJ.chunk(2, dim=-1)
    hidden_NI = activation(to_math_dtype(gate_NI)) * up_NI
    return hidden_NI.mul_(weights_N[..., None].to(hidden_NI.dtype))


def _rounded(num_rows: int, dtype: torch.dtype) -> int:
    size = ROUND_ROWS if dtype == torch.bfloat16 else 1
    return -(-num_rows // size) * size
