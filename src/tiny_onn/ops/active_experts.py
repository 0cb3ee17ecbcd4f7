"""The expert layer without gradients on a CPU: only active experts are computed.

Generating one token at a time is bound by reading weights, so a few tokens are computed by two
`embedding_bag`s: one bag of weight rows per active pair of token and expert gives gate and up,
another gives the expert's output. Each reads the rows of active experts alone, in one call, where a
matrix product per expert costs a call each. Bags need rows that are contiguous in memory, as
`Experts.store_for_generation` stores them.

More tokens, and weights that are stored otherwise or in another number format, go by expert: tokens
are gathered once per active pair, expert after expert, pass two products, and a bag per token sums
the outputs. Where experts have about as many tokens each, the products of all of them are one
batched product, padded to the largest number, which uses several threads well; otherwise each
expert has two products of its own. Where so many pairs are active, or so few tokens are there, that
gathering costs more than it saves, an expert takes all tokens at weight 0 for those that did not
choose it, as a dense MLP would. Shape, number format, storage, share of active pairs and number of
threads decide; the ways differ by rounding.

While experts are skipped, no weight is kept twice: those in another number format than the input
are cast, a layer at a time at most. Many tokens are computed in chunks, which bounds the gathered
rows. Sums run in a fixed order, in float32, so that results repeat bit for bit.

Legend: T tokens, R active pairs of token and expert, D hidden, E experts, I expert width, J = 2 * I
gate and up rows, N rows of an expert, M rows of all experts.
"""

import functools
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
ROUND_ROWS = 16
CHUNK_TOKENS = 1024
# One batched product of all experts, each with as many rows as the one with the most tokens, uses
# several threads better than a product per expert, up to so many rows per row that is needed.
MAX_PADDING = 1.2


class Limits(NamedTuple):
    """The bounds between the ways as they were measured, for one number format."""

    least_tokens: int
    """The number of tokens from which gathering an expert's tokens pays."""
    most: float
    """The share of active pairs of token and expert up to which it pays."""


FLOAT32_LIMITS = Limits(64, 0.9)
BFLOAT16_LIMITS = Limits(256, 0.8)
# Gathering a token costs as much for few neurons as for many, and two threads speed it up less than
# they do products: on two threads experts of 48 neurons lost with half of the pairs, and of 96 won.
NARROW_WIDTH, NARROW_BFLOAT16_LIMITS = 64, Limits(256, 0.4)


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
    E, T, dtype = len(down_EDI), len(x_TD), x_TD.dtype
    pairs = int(active_TE.count_nonzero())
    limits = FLOAT32_LIMITS
    if dtype == torch.bfloat16:
        narrow = down_EDI.shape[2] < NARROW_WIDTH
        limits = NARROW_BFLOAT16_LIMITS if narrow else BFLOAT16_LIMITS
    if pairs <= MAX_READS * E:
        stored = all(
            weight.dtype == dtype and weight.mT.is_contiguous()
            for weight in (gate_up_EJD, down_EDI)
        )
        way = _by_bags if stored else _by_expert
    elif limits.least_tokens <= T and pairs <= limits.most * T * E:
        way = _by_expert
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
    def outputs(x_RD: Tensor, expert_R: Tensor, weights_R: Tensor) -> Tensor:
        pre_RJ = _bags(gate_up_EJD.mT, expert_R, x_RD)
        hidden_RI = _hidden(pre_RJ, weights_R, activation).to(x_TD.dtype)
        return _bags(down_EDI.mT, expert_R, hidden_RI)

    # For the one token there are fewer calls, which take most of a small layer's time.
    if len(x_TD) == 1:
        expert_R = active_TE[0].nonzero()[:, 0]
        out_RD = outputs(x_TD.expand(len(expert_R), -1), expert_R, weights_TE[0].take(expert_R))
        # torch sums bfloat16 in float32.
        return out_RD.sum(0, keepdim=True)
    token_R, expert_R = active_TE.nonzero().unbind(1)
    out_RD = outputs(x_TD[token_R], expert_R, weights_TE[token_R, expert_R])
    y_TD = to_math_dtype(x_TD.new_zeros(0)).new_zeros(x_TD.shape)
    return y_TD.index_add_(0, token_R, to_math_dtype(out_RD)).to(x_TD.dtype)


def _bags(rows_ENM: Tensor, expert_R: Tensor, factors_RN: Tensor) -> Tensor:
    """Return `sum_n factors[r, n] * rows[expert of r, n]` for every r, (R, M)."""
    E, N, M = rows_ENM.shape
    place_RN = _places(E, N).index_select(0, expert_R)
    return F.embedding_bag(
        place_RN.view(-1),
        rows_ENM.view(E * N, M),
        _starts(len(expert_R), N),
        mode="sum",
        per_sample_weights=factors_RN.reshape(-1),
    )


@functools.lru_cache(maxsize=64)
def _places(num_tables: int, num_rows: int) -> Tensor:
    """Return the places of all rows of tables that lie one after another, (tables, rows)."""
    return torch.arange(num_tables * num_rows).view(num_tables, num_rows)


@functools.lru_cache(maxsize=64)
def _starts(num_tables: int, num_rows: int) -> Tensor:
    """Return the place of each table's first row."""
    return torch.arange(num_tables) * num_rows


@without_autocast
def _by_expert(  # noqa: PLR0917
    x_TD: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    weights_TE: Tensor,
    active_TE: Tensor,
    activation: Activation,
) -> Tensor:
    parts = [
        _chunk_by_expert(x, gate_up_EJD, down_EDI, weights, active, activation)
        for x, weights, active in zip(
            x_TD.split(CHUNK_TOKENS),
            weights_TE.split(CHUNK_TOKENS),
            active_TE.split(CHUNK_TOKENS),
            strict=True,
        )
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _chunk_by_expert(  # noqa: PLR0917
    x_TD: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    weights_TE: Tensor,
    active_TE: Tensor,
    activation: Activation,
) -> Tensor:
    D, dtype, pairs = x_TD.shape[1], x_TD.dtype, _pairs_by_expert(active_TE, x_TD.dtype)
    weights_M = weights_TE[pairs.token_M, pairs.expert_M]
    if len(set(pairs.num_rows)) == 1:
        rows_END = x_TD.index_select(0, pairs.token_M).view(len(down_EDI), -1, D)
        pre_ENJ = torch.bmm(rows_END, gate_up_EJD.to(dtype).mT)
        hidden_ENI = _hidden(pre_ENJ, weights_M.view(pre_ENJ.shape[:2]), activation).to(dtype)
        out_MD = torch.bmm(hidden_ENI, down_EDI.to(dtype).mT, out=rows_END).flatten(0, 1)
    else:
        pre_MJ = x_TD.new_empty(len(pairs.token_M), gate_up_EJD.shape[1])
        rows = x_TD.new_empty(max(pairs.num_rows), D)
        for token_N, weight, pre_NJ in zip(
            pairs.token_M.split(pairs.num_rows),
            gate_up_EJD.mT.unbind(),
            pre_MJ.split(pairs.num_rows),
            strict=True,
        ):
            rows_ND = torch.index_select(x_TD, 0, token_N, out=rows[: len(token_N)])
            torch.mm(rows_ND, weight.to(dtype), out=pre_NJ)
        hidden_MI = _hidden(pre_MJ, weights_M, activation).to(dtype)
        if dtype in (torch.float32, torch.float64):
            # One small buffer stays in the cache, and needs no cast to be added.
            y_TD = torch.zeros_like(x_TD)
            for token_N, hidden_NI, weight in zip(
                pairs.token_M.split(pairs.num_rows),
                hidden_MI.split(pairs.num_rows),
                down_EDI.mT.unbind(),
                strict=True,
            ):
                out_ND = torch.mm(hidden_NI, weight.to(dtype), out=rows[: len(token_N)])
                # A token occurs once per expert, so that no two additions go to one place.
                y_TD.index_add_(0, token_N, out_ND)
            return y_TD
        out_MD = x_TD.new_empty(len(pairs.token_M), D)
        for hidden_NI, weight, out_ND in zip(
            hidden_MI.split(pairs.num_rows),
            down_EDI.mT.unbind(),
            out_MD.split(pairs.num_rows),
            strict=True,
        ):
            torch.mm(hidden_NI, weight.to(dtype), out=out_ND)
    # A token's bag of rows is summed in float32, and rounded once.
    return F.embedding_bag(pairs.row_R, out_MD, pairs.bounds, mode="sum", include_last_offset=True)


class _Pairs(NamedTuple):
    """The active pairs of token and expert as rows, expert after expert."""

    token_M: Tensor
    expert_M: Tensor
    num_rows: list[int]
    """The number of rows of each expert; those beyond its tokens are token 0's, and not read."""
    row_R: Tensor
    """The row of every pair, token after token."""
    bounds: Tensor
    """The bounds between the tokens in `row_R`, (T + 1,)."""


def _pairs_by_expert(active_TE: Tensor, dtype: torch.dtype) -> _Pairs:
    size = ROUND_ROWS if dtype == torch.bfloat16 else 1
    # Padding costs one thread in float32 more than it saves.
    pads = dtype == torch.bfloat16 or torch.get_num_threads() > 1
    rank_TE = active_TE.cumsum(0)
    num_rows_E = (rank_TE[-1] + (size - 1)) // size * size
    most = num_rows_E.max()
    if pads and most * len(num_rows_E) <= MAX_PADDING * num_rows_E.sum():
        num_rows_E = most.expand_as(num_rows_E)
    row_TE = rank_TE + (num_rows_E.cumsum(0) - num_rows_E - 1)
    token_R, expert_R = active_TE.nonzero().unbind(1)
    row_R = row_TE[token_R, expert_R]
    num_rows = num_rows_E.tolist()
    token_M = token_R.new_zeros(sum(num_rows)).index_put_((row_R,), token_R)
    return _Pairs(
        token_M=token_M,
        expert_M=torch.repeat_interleave(num_rows_E),
        num_rows=num_rows,
        row_R=row_R,
        bounds=F.pad(active_TE.sum(1).cumsum(0), (1, 0)),
    )


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


def _hidden(pre_NJ: Tensor, weights_N: Tensor, activation: Activation) -> Tensor:
    """Return `weights * act(gate) * up` in float32 (N, I), float64 for float64 inputs."""
    gate_NI, up_NI = pre_NJ.chunk(2, dim=-1)
    hidden_NI = activation(to_math_dtype(gate_NI)) * up_NI
    return hidden_NI.mul_(weights_N[..., None].to(hidden_NI.dtype))
