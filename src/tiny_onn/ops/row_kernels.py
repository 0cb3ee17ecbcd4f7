"""The Triton kernels that list each expert's tokens and sum over an expert's or a token's rows.

    count     counts the tokens of a block that chose each expert
    index     lists each expert's tokens: those that chose it, in their order, then the others
    outer     computes a weight's gradient from all tokens of one expert
    project   multiplies the rows of one expert by its weights, giving an output row for each
    reduce    sums a token's rows

The conventions are those of `sparse_kernels.py`. Importing this module imports triton.

Legend: T tokens, D hidden, E experts, N columns of the rows, S slots, B blocks of tokens.
"""

from typing import no_type_check

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
@no_type_check
def count_kernel(
    listed,  # (T, E) bool
    counts,  # (B, E) int32, written
    T,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Count the tokens of the block that chose each expert."""
    b = tl.program_id(0)
    t = b * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    inside = (t < T)[:, None] & (e < E)[None, :]
    on = tl.load(listed + t[:, None] * E + e[None, :], mask=inside, other=0).to(tl.int32)
    tl.store(counts + b * E + e, tl.sum(on, axis=0), mask=e < E)


@triton.jit
@no_type_check
def index_kernel(
    listed,  # (T, E) bool
    counts,  # (B, E) int32
    order,  # (E, T) int32, written: an expert's tokens, then the others
    num,  # (E,) int32, written: how many are its own
    starts,  # (E,) int32, written: how many pairs earlier experts have
    slots,  # (T, E) int32, written unless ALL: the slots of a token's pairs, at the front
    num_slots,  # (T,) int32, written unless ALL: how many pairs a token has
    T,
    B,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ALL: tl.constexpr,
):
    """Write the block's tokens to their places in each expert's list."""
    b = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    before = tl.zeros((BLOCK_E,), tl.int32)
    total = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, B, BLOCK_B):
        other = start + tl.arange(0, BLOCK_B)
        inside = (other < B)[:, None] & (e < E)[None, :]
        part = tl.load(counts + other[:, None] * E + e[None, :], mask=inside, other=0)
        total += tl.sum(part, axis=0)
        before += tl.sum(tl.where((other < b)[:, None], part, 0), axis=0)
    first = tl.cumsum(total, axis=0) - total
    t = b * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = (t < T)[:, None] & (e < E)[None, :]
    on = tl.load(listed + t[:, None] * E + e[None, :], mask=inside, other=0).to(tl.int32)
    own = before[None, :] + tl.cumsum(on, axis=0) - on
    position = tl.where(on == 1, own, total[None, :] + t[:, None] - own)
    at = e.to(tl.int64)[None, :] * T + position
    tl.store(order + at, tl.zeros_like(on) + t[:, None], mask=inside)
    if b == 0:
        tl.store(num + e, total, mask=e < E)
        tl.store(starts + e, first, mask=e < E)
    if not ALL:
        rank = tl.cumsum(on, axis=1) - on
        tl.store(slots + t[:, None] * E + rank, first[None, :] + own, mask=inside & (on == 1))
        tl.store(num_slots + t, tl.sum(on, axis=1), mask=t < T)


@triton.jit
@no_type_check
def outer_kernel(
    rows,  # (S, N)
    x,  # (T, D)
    order,  # (E, T) int32
    num,  # (E,) int32
    starts,  # (E,) int32
    grad,  # (E, N, D), by its strides, written
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    ALL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute a block of `sum of rows[r] x[token of r]^T` over one expert's rows."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    e = tl.program_id(0) // blocks
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    n0 = tl.program_id(1) * (W0 + W1) + tl.arange(0, W0)
    count = tl.load(num + e)
    before = tl.load(starts + e)
    k = tl.arange(0, BLOCK_K)
    acc0 = tl.zeros((BLOCK_D, W0), tl.float32)
    if W1 > 0:
        n1 = tl.program_id(1) * (W0 + W1) + W0 + tl.arange(0, W1)
        acc1 = tl.zeros((BLOCK_D, W1), tl.float32)
    from_order = order + e.to(tl.int64) * T + k
    for begin in range(0, count, BLOCK_K):
        own = begin + k < count
        t = tl.load(from_order + begin, mask=own, other=0).to(tl.int64)
        at = t * E + e
        if not ALL:
            at = (before + begin + k).to(tl.int64)
        if D % BLOCK_D == 0:
            mask = own[:, None]
        else:
            mask = own[:, None] & (d < D)[None, :]
        a = tl.trans(tl.load(x + t[:, None] * D + d[None, :], mask=mask, other=0.0))
        from_rows = rows + at[:, None] * N
        mask = own[:, None]
        if N % (W0 + W1) != 0:
            mask = mask & (n0 < N)[None, :]
        b0 = tl.load(from_rows + n0[None, :], mask=mask, other=0.0)
        acc0 = tl.dot(a, b0, acc0, input_precision=PRECISION)
        if W1 > 0:
            mask = own[:, None]
            if N % (W0 + W1) != 0:
                mask = mask & (n1 < N)[None, :]
            b1 = tl.load(from_rows + n1[None, :], mask=mask, other=0.0)
            acc1 = tl.dot(a, b1, acc1, input_precision=PRECISION)
    dtype = grad.dtype.element_ty
    to = grad + e.to(tl.int64) * STRIDE_E + d[:, None] * STRIDE_D
    mask = (d < D)[:, None] & (n0 < N)[None, :]
    tl.store(to + n0[None, :] * STRIDE_N, acc0.to(dtype), mask=mask)
    if W1 > 0:
        mask = (d < D)[:, None] & (n1 < N)[None, :]
        tl.store(to + n1[None, :] * STRIDE_N, acc1.to(dtype), mask=mask)


@triton.jit
@no_type_check
def project_kernel(
    rows,  # (S, N), S the pairs of the lists
    weight,  # (E, N, D), by its strides
    num,  # (E,) int32
    starts,  # (E,) int32
    out,  # (S, D), written
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply a tile's rows by its expert's weights, for a block of features."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tile = tl.program_id(0) // blocks
    d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    e = tile % E
    start = (tile // E) * BLOCK_M
    count = tl.load(num + e)
    if start < count:
        position = start + tl.arange(0, BLOCK_M)
        own = position < count
        at = (tl.load(starts + e) + tl.where(own, position, start)).to(tl.int64)
        k = tl.arange(0, BLOCK_K)
        from_rows = rows + at[:, None] * N + k[None, :]
        from_weight = weight + e.to(tl.int64) * STRIDE_E + k[:, None] * STRIDE_N
        from_weight += d[None, :] * STRIDE_D
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for begin in range(0, N, BLOCK_K):
            if N % BLOCK_K == 0 and D % BLOCK_D == 0:
                a = tl.load(from_rows + begin)
                b = tl.load(from_weight + begin * STRIDE_N)
            else:
                a = tl.load(from_rows + begin, mask=(begin + k < N)[None, :], other=0.0)
                inside = (begin + k < N)[:, None] & (d < D)[None, :]
                b = tl.load(from_weight + begin * STRIDE_N, mask=inside, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        to = out + at[:, None] * D + d[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=own[:, None] & (d < D)[None, :])


@triton.jit
@no_type_check
def reduce_kernel(
    rows,  # (S, D)
    slots,  # (T, E) int32
    num_slots,  # (T,) int32
    out,  # (T, D), written
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum a token's rows in the order of its experts, in float32."""
    t = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for j in range(tl.load(num_slots + t)):
        at = tl.load(slots + t * E + j).to(tl.int64)
        total += tl.load(rows + at * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + t.to(tl.int64) * D + d, total.to(out.dtype.element_ty), mask=d < D)
