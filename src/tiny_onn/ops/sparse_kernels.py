"""The matrix products of `sparse.py` in Triton; importing this module imports triton.

    up      computes pre-activations and routed hidden activations of a tile
    slope   computes a tile's gradient at the pre-activations, and the terms of its surprise

A tile is BLOCK_M tokens of one expert. Tiles of all experts come in the order of their tokens, so
that rows of x that one expert gathered are still in the L2 cache for the next. An expert's columns
are cut into chunks of W0 + W1, powers of two, because Triton knows no other widths: 96 is 64 + 32.
No sum depends on the order in which programs run. Constants are upper case. `no_type_check` keeps
runtime type checkers away from kernels.

A pair of token and expert has a slot, its row in the tables of activations: `t * E + e` where ALL
pairs have one, else the pairs of the lists, one expert's after another's.

Legend: T tokens, D hidden, E experts, I expert width, J = 2 * I gate and up rows, S slots, C
chunks of columns.
"""

from typing import no_type_check

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
@no_type_check
def activate(gate, ACTIVATION: tl.constexpr):
    """Return the activation of float32 values, and its derivative."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid)
    elif ACTIVATION == "gelu_pytorch_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2 z), with 2 sqrt(2 / pi) = 1.5957691216057308.
        square = gate * gate
        sigmoid = tl.sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * square))
        value = gate * sigmoid
        inner = 1.5957691216057308 * (1.0 + 0.134145 * square)
        slope = sigmoid + value * (1.0 - sigmoid) * inner
    else:
        share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        value = gate * share
        slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    return value, slope


@triton.jit
@no_type_check
def two_products(
    from_a,  # (BLOCK_M, BLOCK_K) pointers
    from_0,  # (BLOCK_K, N0) pointers
    from_1,  # (BLOCK_K, N1) pointers, unused if N1 is 0
    k,  # (BLOCK_K,)
    inside_0,  # (N0,) columns that are there
    inside_1,  # (N1,)
    D: tl.constexpr,
    STEP: tl.constexpr,  # from a summand of the second factors to the next
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    EVEN: tl.constexpr,  # whether blocks cover the factors exactly
    PRECISION: tl.constexpr,
):
    """Multiply a tile's rows by two groups of columns, reading each row once; the sum is over D."""
    acc0 = tl.zeros((BLOCK_M, N0), tl.float32)
    acc1 = acc0
    if N1 > 0:
        acc1 = tl.zeros((BLOCK_M, N1), tl.float32)
    for begin in range(0, D, BLOCK_K):
        if EVEN:
            a = tl.load(from_a + begin)
            b0 = tl.load(from_0 + begin * STEP)
        else:
            left = begin + k < D
            a = tl.load(from_a + begin, mask=left[None, :], other=0.0)
            mask = left[:, None] & inside_0[None, :]
            b0 = tl.load(from_0 + begin * STEP, mask=mask, other=0.0)
        acc0 = tl.dot(a, b0, acc0, input_precision=PRECISION)
        if N1 > 0:
            if EVEN:
                b1 = tl.load(from_1 + begin * STEP)
            else:
                mask = (begin + k < D)[:, None] & inside_1[None, :]
                b1 = tl.load(from_1 + begin * STEP, mask=mask, other=0.0)
            acc1 = tl.dot(a, b1, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
@no_type_check
def store_zeros(
    table,  # (S, STRIDE)
    at,  # (BLOCK_M,) int64 slots
    first,  # the first column
    written,  # (BLOCK_M,)
    STRIDE: tl.constexpr,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    W: tl.constexpr,
):
    """Store zeros in up to W columns of the slots, as far as there are I columns."""
    i = first + tl.arange(0, W)
    zeros = tl.zeros((BLOCK_M, W), table.dtype.element_ty)
    mask = written[:, None] & (i < I)[None, :]
    tl.store(table + at[:, None] * STRIDE + i[None, :], zeros, mask=mask)


@triton.jit
@no_type_check
def store_hidden(
    acc,  # (BLOCK_M, 2 * W), gate and up in turns
    at,  # (BLOCK_M,) int64 slots
    first,  # the chunk's first column
    weight,  # (BLOCK_M,) float32
    own,  # (BLOCK_M,) pairs of the list
    written,  # (BLOCK_M,) pairs whose hidden activations are written, as 0 if not own
    pre,
    hidden,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    W: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Store pre-activations, and `weight * act(gate) * up` of the values as they were rounded."""
    i = first + tl.arange(0, W)
    gate, up = tl.split(tl.reshape(acc.to(pre.dtype.element_ty), (BLOCK_M, W, 2)))
    to = pre + at[:, None] * (2 * I) + i[None, :]
    inside = (i < I)[None, :]
    tl.store(to, gate, mask=own[:, None] & inside)
    tl.store(to + I, up, mask=own[:, None] & inside)
    value, _ = activate(gate.to(tl.float32), ACTIVATION)
    routed = tl.where(own[:, None], value * up.to(tl.float32) * weight[:, None], 0.0)
    to = hidden + at[:, None] * I + i[None, :]
    tl.store(to, routed.to(hidden.dtype.element_ty), mask=written[:, None] & inside)


@triton.jit
@no_type_check
def up_kernel(
    x,  # (T, D)
    gate_up,  # (E, J, D)
    weights,  # (T, E) float32
    order,  # (E, T) int32
    num,  # (E,) int32
    starts,  # (E,) int32
    pre,  # (S, J), written
    hidden,  # (S, I), written
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    ALL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute a tile's pre-activations and routed hidden activations; pairs not listed give 0."""
    e = tl.program_id(0) % E
    start = (tl.program_id(0) // E) * BLOCK_M
    first = tl.program_id(1) * (W0 + W1)
    count = tl.load(num + e)
    position = start + tl.arange(0, BLOCK_M)
    own = position < count
    written = own
    if ALL:
        written = position < T
    if start < (T if ALL else count):
        t = tl.load(order + e.to(tl.int64) * T + position, mask=written, other=0)
        at = t.to(tl.int64) * E + e
        weight = tl.load(weights + at, mask=own, other=0.0).to(tl.float32)
        if not ALL:
            at = (tl.load(starts + e) + position).to(tl.int64)
        if start < count:
            k = tl.arange(0, BLOCK_K)
            j0 = tl.arange(0, 2 * W0)
            i0 = first + j0 // 2
            from_x = x + t.to(tl.int64)[:, None] * D + k[None, :]
            of_e = gate_up + e.to(tl.int64) * 2 * I * D
            from_0 = of_e + ((j0 % 2) * I + i0)[None, :] * D + k[:, None]
            i1 = i0
            from_1 = from_0
            if W1 > 0:
                j1 = tl.arange(0, 2 * W1)
                i1 = first + W0 + j1 // 2
                from_1 = of_e + ((j1 % 2) * I + i1)[None, :] * D + k[:, None]
            even: tl.constexpr = D % BLOCK_K == 0 and I % (W0 + W1) == 0
            acc0, acc1 = two_products(
                from_x, from_0, from_1, k, i0 < I, i1 < I, D, 1, BLOCK_M, BLOCK_K, 2 * W0, 2 * W1,
                even, PRECISION,
            )  # fmt: skip
            store_hidden(
                acc0, at, first, weight, own, written, pre, hidden, I, BLOCK_M, W0, ACTIVATION
            )
            if W1 > 0:
                store_hidden(
                    acc1, at, first + W0, weight, own, written, pre, hidden, I, BLOCK_M, W1,
                    ACTIVATION,
                )  # fmt: skip
        else:
            store_zeros(hidden, at, first, written, I, I, BLOCK_M, W0)
            if W1 > 0:
                store_zeros(hidden, at, first + W0, written, I, I, BLOCK_M, W1)


@triton.jit
@no_type_check
def slope_rows(
    position,  # (BLOCK_R,)
    count,  # of the expert's own pairs
    end,  # of the pairs that have a slot
    before,  # pairs of earlier experts
    e,
    i,  # (W,) columns
    of_chunk,  # (W,) columns of this program
    weights,
    of_order,  # (T,) int32: the expert's tokens
    pre,
    grad_pre,
    to_sums,  # (3, E, T) float32
    T,
    E: tl.constexpr,
    I: tl.constexpr,
    ALL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Turn rows of gradients at hidden activations into those at pre-activations; sum both."""
    inside_t = position < T
    t = tl.load(of_order + position, mask=inside_t, other=0)
    pair = t.to(tl.int64) * E + e
    at = pair
    if not ALL:
        at = (before + position).to(tl.int64)
    own = position < count
    w = tl.load(weights + pair, mask=own, other=0.0).to(tl.float32)[:, None]
    mask = own[:, None] & of_chunk[None, :]
    here = at[:, None] * (2 * I) + i[None, :]
    gate = tl.load(pre + here, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pre + here + I, mask=mask, other=0.0).to(tl.float32)
    grad_hidden = tl.load(grad_pre + here + I, mask=mask, other=0.0).to(tl.float32)
    value, slope = activate(gate, ACTIVATION)
    hidden = value * up
    grad_gate = grad_hidden * up * slope
    grad_up = grad_hidden * value
    if ALL:
        mask = inside_t[:, None] & of_chunk[None, :]
    dtype = grad_pre.dtype.element_ty
    tl.store(grad_pre + here, (grad_gate * w).to(dtype), mask=mask)
    tl.store(grad_pre + here + I, (grad_up * w).to(dtype), mask=mask)
    size = T * E
    to = to_sums + e * T + t
    squares = grad_gate * grad_gate + grad_up * grad_up
    slotted = position < end
    tl.store(to, tl.sum(squares, axis=1), mask=slotted)
    tl.store(to + size, tl.sum(hidden * hidden, axis=1), mask=slotted)
    tl.store(to + 2 * size, tl.sum(hidden * grad_hidden, axis=1), mask=slotted)


@triton.jit
@no_type_check
def slope_kernel(
    grad_y,  # (T, D)
    down,  # (E, D, I), by its strides
    weights,  # (T, E) float32
    order,  # (E, T) int32
    num,  # (E,) int32
    starts,  # (E,) int32
    pre,  # (S, J)
    grad_pre,  # (S, J), written
    sums,  # (C, 3, E, T) float32, written for pairs that have a slot
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    I: tl.constexpr,
    STRIDE_E: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    W: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    ALL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute a tile's gradients at the pre-activations and its sums; pairs not listed give 0.

    The product leaves the gradient at the hidden activations in the place of the gradient at the up
    projection. BLOCK_R rows at a time are then read back, still in the L2 cache, because all rows
    at once would need more registers than there are.
    """
    e = tl.program_id(0) % E
    start = (tl.program_id(0) // E) * BLOCK_M
    first = tl.program_id(1) * (W0 + W1)
    count = tl.load(num + e)
    before = tl.load(starts + e)
    of_order = order + e.to(tl.int64) * T
    if start < count:
        position = start + tl.arange(0, BLOCK_M)
        t = tl.load(of_order + position, mask=position < T, other=0).to(tl.int64)
        at = t * E + e
        if not ALL:
            at = (before + position).to(tl.int64)
        k = tl.arange(0, BLOCK_K)
        i0 = first + tl.arange(0, W0)
        from_y = grad_y + t[:, None] * D + k[None, :]
        of_e = down + e.to(tl.int64) * STRIDE_E
        from_0 = of_e + i0[None, :] * STRIDE_I + k[:, None] * STRIDE_D
        i1 = i0
        from_1 = from_0
        if W1 > 0:
            i1 = first + W0 + tl.arange(0, W1)
            from_1 = of_e + i1[None, :] * STRIDE_I + k[:, None] * STRIDE_D
        even: tl.constexpr = D % BLOCK_K == 0 and I % (W0 + W1) == 0
        acc0, acc1 = two_products(
            from_y, from_0, from_1, k, i0 < I, i1 < I, D, STRIDE_D, BLOCK_M, BLOCK_K, W0, W1,
            even, PRECISION,
        )  # fmt: skip
        to = grad_pre + at[:, None] * (2 * I) + I
        own = (position < count)[:, None]
        dtype = grad_pre.dtype.element_ty
        tl.store(to + i0[None, :], acc0.to(dtype), mask=own & (i0 < I)[None, :])
        if W1 > 0:
            tl.store(to + i1[None, :], acc1.to(dtype), mask=own & (i1 < I)[None, :])
        # Rows that other threads of the program stored are read below.
        tl.debug_barrier()
    i = first + tl.arange(0, W)
    of_chunk = (i < first + W0 + W1) & (i < I)
    to_sums = sums + tl.program_id(1) * 3 * E * T
    end = count
    if ALL:
        end = T
    for row in range(start, tl.minimum(start + BLOCK_M, end), BLOCK_R):
        slope_rows(
            row + tl.arange(0, BLOCK_R), count, end, before, e, i, of_chunk, weights, of_order, pre,
            grad_pre, to_sums, T, E, I, ALL, ACTIVATION,
        )  # fmt: skip
