"""The Triton kernels of `sparse.py`; importing this module imports triton.

    count     how many tokens of a block chose each expert
    index     each expert's tokens: those that chose it, in their order, then the others
    up        pre-activations and routed hidden activations of a tile of one expert's tokens
    slope     the gradient at the pre-activations, and the sums that surprise is made of
    outer     a weight's gradient, from all tokens of one expert
    project   rows of one expert times its weights, a row of the output for each
    reduce    the sum of a token's rows

A tile is BLOCK_M tokens of one expert. Tiles of all experts come in the order of their tokens, so
that rows of x that one expert gathered are still in the L2 cache for the next. An expert's columns
are cut into chunks of W0 + W1, powers of two, because Triton knows no other widths: 96 is 64 + 32.
No sum depends on the order in which programs run. Constants are upper case. `no_type_check` keeps
runtime type checkers away from kernels.

A pair of token and expert has a slot, its row in the tables of activations: `t * E + e` where ALL
pairs have one, else the pairs of the lists, one expert's after another's.

Legend: T tokens, D hidden, E experts, I expert width, J = 2 * I gate and up rows, S slots, B blocks
of tokens, C chunks of columns.
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
    """How many tokens of the block each expert has."""
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
    """Where each token of the block is in each expert's list."""
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
def activate(gate, ACTIVATION: tl.constexpr):
    """The activation of float32 values, and its derivative."""
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
    """Pre-activations, and `weight * act(gate) * up` of the values that were stored."""
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
    """The tile's pre-activations and routed hidden activations; 0 for pairs outside the lists."""
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
            acc0 = tl.zeros((BLOCK_M, 2 * W0), tl.float32)
            if W1 > 0:
                j1 = tl.arange(0, 2 * W1)
                i1 = first + W0 + j1 // 2
                from_1 = of_e + ((j1 % 2) * I + i1)[None, :] * D + k[:, None]
                acc1 = tl.zeros((BLOCK_M, 2 * W1), tl.float32)
            for begin in range(0, D, BLOCK_K):
                if D % BLOCK_K == 0:
                    a = tl.load(from_x + begin)
                else:
                    a = tl.load(from_x + begin, mask=(begin + k < D)[None, :], other=0.0)
                if D % BLOCK_K == 0 and I % (W0 + W1) == 0:
                    b0 = tl.load(from_0 + begin)
                else:
                    inside = (begin + k < D)[:, None] & (i0 < I)[None, :]
                    b0 = tl.load(from_0 + begin, mask=inside, other=0.0)
                acc0 = tl.dot(a, b0, acc0, input_precision=PRECISION)
                if W1 > 0:
                    if D % BLOCK_K == 0 and I % (W0 + W1) == 0:
                        b1 = tl.load(from_1 + begin)
                    else:
                        inside = (begin + k < D)[:, None] & (i1 < I)[None, :]
                        b1 = tl.load(from_1 + begin, mask=inside, other=0.0)
                    acc1 = tl.dot(a, b1, acc1, input_precision=PRECISION)
            store_hidden(
                acc0, at, first, weight, own, written, pre, hidden, I, BLOCK_M, W0, ACTIVATION
            )
            if W1 > 0:
                store_hidden(
                    acc1, at, first + W0, weight, own, written, pre, hidden, I, BLOCK_M, W1,
                    ACTIVATION,
                )  # fmt: skip
        else:
            i = first + tl.arange(0, W0)
            zeros = tl.zeros((BLOCK_M, W0), hidden.dtype.element_ty)
            mask = written[:, None] & (i < I)[None, :]
            tl.store(hidden + at[:, None] * I + i[None, :], zeros, mask=mask)
            if W1 > 0:
                i = first + W0 + tl.arange(0, W1)
                zeros = tl.zeros((BLOCK_M, W1), hidden.dtype.element_ty)
                mask = written[:, None] & (i < I)[None, :]
                tl.store(hidden + at[:, None] * I + i[None, :], zeros, mask=mask)


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
    """The tile's gradients at the pre-activations and its sums; 0 for pairs outside the lists.

    The product leaves the gradient at the hidden activations where that at the up projection goes,
    and BLOCK_R rows at a time are read back, still in the L2 cache: all at once would need more
    registers than there are.
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
        acc0 = tl.zeros((BLOCK_M, W0), tl.float32)
        if W1 > 0:
            i1 = first + W0 + tl.arange(0, W1)
            from_1 = of_e + i1[None, :] * STRIDE_I + k[:, None] * STRIDE_D
            acc1 = tl.zeros((BLOCK_M, W1), tl.float32)
        for begin in range(0, D, BLOCK_K):
            if D % BLOCK_K == 0:
                a = tl.load(from_y + begin)
            else:
                a = tl.load(from_y + begin, mask=(begin + k < D)[None, :], other=0.0)
            if D % BLOCK_K == 0 and I % (W0 + W1) == 0:
                b0 = tl.load(from_0 + begin * STRIDE_D)
            else:
                inside = (begin + k < D)[:, None] & (i0 < I)[None, :]
                b0 = tl.load(from_0 + begin * STRIDE_D, mask=inside, other=0.0)
            acc0 = tl.dot(a, b0, acc0, input_precision=PRECISION)
            if W1 > 0:
                if D % BLOCK_K == 0 and I % (W0 + W1) == 0:
                    b1 = tl.load(from_1 + begin * STRIDE_D)
                else:
                    inside = (begin + k < D)[:, None] & (i1 < I)[None, :]
                    b1 = tl.load(from_1 + begin * STRIDE_D, mask=inside, other=0.0)
                acc1 = tl.dot(a, b1, acc1, input_precision=PRECISION)
        to = grad_pre + at[:, None] * (2 * I) + I
        own = (position < count)[:, None]
        dtype = grad_pre.dtype.element_ty
        tl.store(to + i0[None, :], acc0.to(dtype), mask=own & (i0 < I)[None, :])
        if W1 > 0:
            tl.store(to + i1[None, :], acc1.to(dtype), mask=own & (i1 < I)[None, :])
        # What other threads of the program stored is read below.
        tl.debug_barrier()
    i = first + tl.arange(0, W)
    of_chunk = (i < first + W0 + W1) & (i < I)
    size = T * E
    end = count
    if ALL:
        end = T
    for row in range(start, tl.minimum(start + BLOCK_M, end), BLOCK_R):
        position = row + tl.arange(0, BLOCK_R)
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
        to = sums + tl.program_id(1) * 3 * size + e * T + t
        squares = grad_gate * grad_gate + grad_up * grad_up
        slotted = position < end
        tl.store(to, tl.sum(squares, axis=1), mask=slotted)
        tl.store(to + size, tl.sum(hidden * hidden, axis=1), mask=slotted)
        tl.store(to + 2 * size, tl.sum(hidden * grad_hidden, axis=1), mask=slotted)


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
    """`sum of rows[r] x[token of r]^T` over one expert's rows, a block of it."""
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
    """A tile's rows times its expert's weights, a block of features."""
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
    """The sum of a token's rows, in the order of its experts, in float32."""
    t = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for j in range(tl.load(num_slots + t)):
        at = tl.load(slots + t * E + j).to(tl.int64)
        total += tl.load(rows + at * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + t.to(tl.int64) * D + d, total.to(out.dtype.element_ty), mask=d < D)
