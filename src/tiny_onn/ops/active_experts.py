"""The expert layer without gradients on a CPU: only active experts are computed.

It has two ways. Generating one token at a time is bound by reading weights, so one token, or a few,
are computed by two `embedding_bag`s: one bag of weight rows per active pair of token and expert
gives gate and up, another gives the expert's output. Each reads the rows of active experts alone,
in one call, where a matrix product per expert costs a call each. The ways differ by rounding only.
Both bags need rows that are contiguous in memory, as `Experts.store_for_generation` stores them.
Many tokens, and weights that are stored otherwise or in another number format, go expert by expert:
the expert's tokens are gathered, pass two matrix products, and are added to the output.

No way copies the weights: weights in another number format than the input are cast one expert at a
time. Buffers are made once per call and used for every expert, because fresh ones cost page faults.
Sums run in a fixed order, in float32, so that results repeat bit for bit.

Legend: T tokens, R active pairs of token and expert, D hidden, E experts, I expert width,
J = 2 * I gate and up rows, N tokens of an expert, M rows of its matrix products.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn.ops.precision import in_autocast_format, without_autocast
from tiny_onn.ops.regions import Activation, to_math_dtype

# On two cores the bags were faster up to here, see `python -m benchmarks cpu_inference`.
MAX_BAG_TOKENS = 4
# oneDNN compiles its bfloat16 products for every number of rows that it meets.
ROUND_ROWS = 32


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
    takes_bags = (
        len(x_TD) <= MAX_BAG_TOKENS
        and gate_up_EJD.mT.is_contiguous()
        and down_EDI.mT.is_contiguous()
        and gate_up_EJD.dtype == down_EDI.dtype == x_TD.dtype
    )
    way = _by_bags if takes_bags else _by_expert
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
    pre_RJ = _bags(gate_up_EJD.mT, expert_R, x_TD[token_R])
    weights_R = weights_TE[token_R, expert_R]
    hidden_RI = _hidden(pre_RJ, weights_R, activation).to(x_TD.dtype)
    out_RD = to_math_dtype(_bags(down_EDI.mT, expert_R, hidden_RI))
    y_TD = out_RD.new_zeros(x_TD.shape).index_add_(0, token_R, out_RD)
    return y_TD.to(x_TD.dtype)


def _bags(rows_ENM: Tensor, expert_R: Tensor, factors_RN: Tensor) -> Tensor:
    """Return `sum_n factors[r, n] * rows[expert of r, n]` for every r, (R, M)."""
    E, N, M = rows_ENM.shape
    place_N = torch.arange(N, dtype=torch.int32)
    place_RN = expert_R.int()[:, None] * N + place_N
    table = rows_ENM.view(E * N, M)
    return F.embedding_bag(place_RN, table, mode="sum", per_sample_weights=factors_RN)


class _Group(NamedTuple):
    """One expert and its tokens; None: all tokens in their own order."""

    expert: int
    token_N: Tensor | None
    num_tokens: int


@without_autocast
def _by_expert(  # noqa: PLR0917
    x_TD: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    weights_TE: Tensor,
    active_TE: Tensor,
    activation: Activation,
) -> Tensor:
    T, D = x_TD.shape
    I, J, dtype = down_EDI.shape[2], gate_up_EJD.shape[1], x_TD.dtype
    size = ROUND_ROWS if dtype == torch.bfloat16 and T > 1 else 1
    most = _rounded(T, size)
    # Rows beyond an expert's own tokens hold what was there before, and nothing reads their result.
    x_MD, out_MD = x_TD.new_zeros(most, D), x_TD.new_empty(most, D)
    pre_MJ, hidden_MI = x_TD.new_empty(most, J), x_TD.new_zeros(most, I)
    y_TD = to_math_dtype(x_TD.new_zeros(0)).new_zeros(T, D)
    weights_ET = weights_TE.T.contiguous()
    for e, token_N, N in _groups(active_TE):
        M = _rounded(N, size)
        rows_MD, weights_N = x_MD[:M], weights_ET[e]
        if token_N is None:
            rows_MD = x_TD if M == N else rows_MD
            if M != N:
                rows_MD[:N] = x_TD
        else:
            torch.index_select(x_TD, 0, token_N, out=rows_MD[:N])
            weights_N = weights_N[token_N]
        torch.mm(rows_MD, gate_up_EJD[e].to(dtype).T, out=pre_MJ[:M])
        hidden_MI[:N] = _hidden(pre_MJ[:N], weights_N, activation)
        torch.mm(hidden_MI[:M], down_EDI[e].to(dtype).T, out=out_MD[:M])
        if token_N is None:
            y_TD.add_(out_MD[:N])
        else:
            # A token occurs once per expert, so that no two additions go to one place.
            y_TD.index_add_(0, token_N, to_math_dtype(out_MD[:N]))
    return y_TD.to(dtype)


def _groups(active_TE: Tensor) -> Iterator[_Group]:
    """Yield every expert that has tokens, with its tokens in rising order."""
    token_R = active_TE.T.nonzero()[:, 1].contiguous()
    ends = active_TE.sum(0).cumsum(0).tolist()
    for e, (begin, end) in enumerate(pairwise([0, *ends])):
        if begin < end:
            every = end - begin == len(active_TE)
            yield _Group(e, None if every else token_R[begin:end], end - begin)


def _hidden(pre_NJ: Tensor, weights_N: Tensor, activation: Activation) -> Tensor:
    """Return `weights * act(gate) * up` in float32 (N, I), float64 for float64 inputs."""
    gate_NI, up_NI = pre_NJ.chunk(2, dim=1)
    hidden_NI = activation(to_math_dtype(gate_NI)) * up_NI
    return hidden_NI.mul_(weights_N[:, None].to(hidden_NI.dtype))


def _rounded(number: int, size: int) -> int:
    return -(-number // size) * size
