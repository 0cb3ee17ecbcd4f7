"""The Triton kernels of `decode.py`; importing this module imports triton.

    gate      computes logits[t, e] = <gate[e], x[t]> + bias[e], one program per (t, e)
    experts   selects, and writes the (D,) output of a block of an active expert's neurons to a
              row of a scratch
    combine   sums the scratch's rows of a token in their order, one program per (t, part of D)
    select    selects, one program per token
    tile      writes the outputs of a block of an expert's neurons for all tokens that chose it

One token takes gate, experts and combine: the selection takes less time than a launch, so every
program of `experts` repeats it instead of waiting for a fourth kernel. Several tokens can take
gate, select, tile and combine. Arithmetic is float32; no sum depends on the order in which programs
run. Constants are upper case. `no_type_check` keeps runtime type checkers away from kernels.

With OVERLAP, which only gate, experts and combine have, a kernel is started while the one before it
still runs (programmatic dependent launch). Each program therefore waits before it reads or writes
memory, and lets the next kernel start at once, whose programs wait in turn. Before its wait a
program of gate asks the L2 cache for its weights, which cannot make a value stale.

Legend: T tokens, D hidden, E experts, I expert width, N blocks of an expert's neurons, S = E * N
rows of the scratch.
"""

from typing import no_type_check

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from tiny_onn.ops.decode_selection_kernels import select_token


@triton.jit
@no_type_check
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Let the next kernel start, then wait until the kernels before this one are complete."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
@no_type_check
def prefetch(pointers):
    """Ask the L2 cache for the lines of some pointers."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.uint64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
@no_type_check
def gate_kernel(
    x,  # (T, D) float32 | bfloat16
    gate,  # (E, D) float32 | bfloat16
    bias,  # (E,) float32 | bfloat16
    logits,  # (T, E) float32, written
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Compute `logits[t, e] = <gate[e], x[t]> + bias[e]`."""
    t = tl.program_id(0)
    e = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    if OVERLAP:
        for start in tl.static_range(0, D, BLOCK_D):
            prefetch(gate + e * D + tl.minimum(start + d, D - 1))
    wait_for_inputs(OVERLAP)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        inside = start + d < D
        w = tl.load(gate + e * D + start + d, mask=inside, other=0.0)
        v = tl.load(x + t * D + start + d, mask=inside, other=0.0)
        total += w.to(tl.float32) * v.to(tl.float32)
    tl.store(logits + t * E + e, tl.sum(total, axis=0) + tl.load(bias + e).to(tl.float32))


@triton.jit
@no_type_check
def activate(gate, ACTIVATION: tl.constexpr):
    """Return the activation of float32 values."""
    if ACTIVATION == "silu":
        value = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu_pytorch_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2 z), with 2 sqrt(2 / pi) = 1.5957691216057308.
        value = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        value = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    return value


@triton.jit
@no_type_check
def gate_and_up(
    x,  # (D,) float32 | bfloat16
    gate_up,  # (E, 2 * I, D) float32 | bfloat16
    expert,
    i,  # (BLOCK_I,) int32, the neurons
    D: tl.constexpr,
    I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Return one token's gate and up projections by some neurons of an expert."""
    d = tl.arange(0, BLOCK_D)
    at = (2 * expert * I + i).to(tl.int64)[:, None] * D + d[None, :]
    gate = tl.zeros((BLOCK_I,), tl.float32)
    up = tl.zeros((BLOCK_I,), tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        inside = (i < I)[:, None] & (start + d < D)[None, :]
        w_gate = tl.load(gate_up + at + start, mask=inside, other=0.0)
        w_up = tl.load(gate_up + I * D + at + start, mask=inside, other=0.0)
        v = tl.load(x + start + d, mask=start + d < D, other=0.0).to(tl.float32)
        gate += tl.sum(w_gate.to(tl.float32) * v[None, :], axis=1)
        up += tl.sum(w_up.to(tl.float32) * v[None, :], axis=1)
    return gate, up


@triton.jit
@no_type_check
def experts_kernel(
    x,  # (T, D) float32 | bfloat16
    gate_up,  # (E, 2 * I, D) float32 | bfloat16
    down,  # (E, D, I) float32 | bfloat16, by its strides
    logits,  # (T, E) float32, read if ROUTED
    selection_bias,  # (E,) float32, read if ROUTED
    threshold,  # () float32, read if ROUTED
    expert_scale,  # (E,) float32, read if SCALED
    scores,  # (T, E) float32, written if ROUTED
    weights,  # (T, E) float32, written if ROUTED, else read
    active,  # (T, E) uint8, written if ROUTED, else read
    partial,  # (T, S, D) float32, written: the first rows, as many as active blocks
    D: tl.constexpr,
    E: tl.constexpr,
    I: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    N: tl.constexpr,
    ROUTED: tl.constexpr,
    SCALED: tl.constexpr,
    NUM_ACTIVE: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    WEIGHTING: tl.constexpr,
    TIE_BREAK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Compute the weighted output of token t's s-th active block of neurons; program (t, s)."""
    t = tl.program_id(0)
    s = tl.program_id(1)
    wait_for_inputs(OVERLAP)
    e = tl.arange(0, BLOCK_E)
    if ROUTED:
        on, weight = select_token(
            logits, selection_bias, threshold, scores, weights, active, t, s == 0,
            E, BLOCK_E, NUM_ACTIVE, NUM_SHARED, WEIGHTING, TIE_BREAK,
        )  # fmt: skip
    else:
        on = tl.load(active + t * E + e, mask=e < E, other=0).to(tl.int32)
        weight = tl.load(weights + t * E + e, mask=e < E, other=0.0).to(tl.float32)
    if s < tl.sum(on, axis=0) * N:
        if SCALED:
            weight *= tl.load(expert_scale + e, mask=e < E, other=0.0).to(tl.float32)
        mine = (on == 1) & (tl.cumsum(on, axis=0) == s // N + 1)
        expert = tl.sum(tl.where(mine, e, 0), axis=0)
        weight_of_mine = tl.sum(tl.where(mine, weight, 0.0), axis=0)
        i = (s % N) * BLOCK_I + tl.arange(0, BLOCK_I)
        d = tl.arange(0, BLOCK_D)
        at_down = expert.to(tl.int64) * I * D + i[:, None] * STRIDE_I + d[None, :] * STRIDE_D
        in_row = (i < I)[:, None]
        # The down projection is loaded early, so that it arrives while the first sums are made.
        w_down = tl.load(down + at_down, mask=in_row & (d < D)[None, :], other=0.0)
        gate, up = gate_and_up(x + t * D, gate_up, expert, i, D, I, BLOCK_D, BLOCK_I)
        hidden = activate(gate, ACTIVATION) * up * weight_of_mine
        out = partial + (t * E * N + s).to(tl.int64) * D
        for start in tl.static_range(0, D, BLOCK_D):
            if start > 0:
                inside = in_row & (start + d < D)[None, :]
                w_down = tl.load(down + at_down + start * STRIDE_D, mask=inside, other=0.0)
            part = tl.sum(hidden[:, None] * w_down.to(tl.float32), axis=0)
            tl.store(out + start + d, part, mask=start + d < D)


@triton.jit
@no_type_check
def select_kernel(
    logits,  # (T, E) float32
    selection_bias,  # (E,) float32
    threshold,  # () float32
    scores,  # (T, E) float32, written
    weights,  # (T, E) float32, written
    active,  # (T, E) uint8, written
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NUM_ACTIVE: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    WEIGHTING: tl.constexpr,
    TIE_BREAK: tl.constexpr,
):
    """Compute a token's scores, active experts and weights."""
    select_token(
        logits, selection_bias, threshold, scores, weights, active, tl.program_id(0), True,
        E, BLOCK_E, NUM_ACTIVE, NUM_SHARED, WEIGHTING, TIE_BREAK,
    )  # fmt: skip


@triton.jit
@no_type_check
def tile_kernel(
    x,  # (T, D) float32 | bfloat16
    gate_up,  # (E, 2 * I, D) in the format of x
    down,  # (E, D, I) in the format of x, by its strides
    expert_scale,  # (E,) float32, read if SCALED
    weights,  # (T, E) float32
    active,  # (T, E) uint8
    partial,  # (T, S, D) float32, written: the rows of active blocks
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    I: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    N: tl.constexpr,
    SCALED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Compute the weighted outputs of a block of neurons, for the tokens that chose its expert."""
    s = tl.program_id(0)
    expert = s // N
    i = (s % N) * BLOCK_I + tl.arange(0, BLOCK_I)
    t = tl.arange(0, BLOCK_T)
    on = tl.load(active + t * E + expert, mask=t < T, other=0).to(tl.int32)
    if tl.sum(on, axis=0) > 0:
        weight = tl.load(weights + t * E + expert, mask=on == 1, other=0.0)
        if SCALED:
            weight *= tl.load(expert_scale + expert).to(tl.float32)
        d = tl.arange(0, BLOCK_D)
        at_x = x + t[:, None] * D + d[None, :]
        at = gate_up + (2 * expert * I + i).to(tl.int64)[:, None] * D + d[None, :]
        gate = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
        up = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
        for start in range(0, D, BLOCK_D):
            inside = (start + d < D)[None, :]
            v = tl.load(at_x + start, mask=(t < T)[:, None] & inside, other=0.0)
            w_gate = tl.load(at + start, mask=(i < I)[:, None] & inside, other=0.0)
            w_up = tl.load(at + I * D + start, mask=(i < I)[:, None] & inside, other=0.0)
            gate = tl.dot(v, tl.trans(w_gate), gate, input_precision="ieee")
            up = tl.dot(v, tl.trans(w_up), up, input_precision="ieee")
        hidden = activate(gate, ACTIVATION) * up * weight[:, None]
        # Two numbers in the weights' format hold more digits of a hidden value than one.
        high = hidden.to(down.dtype.element_ty)
        low = (hidden - high.to(tl.float32)).to(down.dtype.element_ty)
        at_down = down + expert.to(tl.int64) * I * D + i[:, None] * STRIDE_I + d[None, :] * STRIDE_D
        out = partial + (t.to(tl.int64) * (E * N) + s)[:, None] * D + d[None, :]
        for start in range(0, D, BLOCK_D):
            inside = (start + d < D)[None, :]
            w_down = tl.load(at_down + start * STRIDE_D, mask=(i < I)[:, None] & inside, other=0.0)
            part = tl.dot(low, w_down, input_precision="ieee")
            part = tl.dot(high, w_down, part, input_precision="ieee")
            tl.store(out + start, part, mask=(on == 1)[:, None] & inside)


@triton.jit
@no_type_check
def combine_kernel(
    partial,  # (T, S, D) float32
    active,  # (T, E) uint8
    mean_outputs,  # (E, D) float32 | bfloat16, read if COMPENSATED
    y,  # (T, D) float32 | bfloat16, written
    D: tl.constexpr,
    E: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    COMPACT: tl.constexpr,  # the token's rows are the first ones; else each block has its own
    COMPENSATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Sum a token's rows, and the mean outputs of its inactive experts."""
    wait_for_inputs(OVERLAP)
    t = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)
    on = tl.load(active + t * E + e, mask=e < E, other=0).to(tl.int32)
    num_rows = tl.sum(on, axis=0) * N
    rows = partial + (t * E * N).to(tl.int64) * D
    total = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    # The loop runs to the largest possible number of rows, so that no load waits for the loop.
    for start in tl.static_range(0, MAX_ROWS, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        if COMPACT:
            written = s < num_rows
        else:
            written = tl.load(active + t * E + s // N, mask=s < MAX_ROWS, other=0) == 1
        inside = written[:, None] & (d < D)[None, :]
        total += tl.load(rows + s[:, None] * D + d[None, :], mask=inside, other=0.0)
    out = tl.sum(total, axis=0)
    if COMPENSATED:
        missing = ((on == 0) & (e < E))[:, None] & (d < D)[None, :]
        means = tl.load(mean_outputs + e[:, None] * D + d[None, :], mask=missing, other=0.0)
        out += tl.sum(means.to(tl.float32), axis=0)
    tl.store(y + t * D + d, out.to(y.dtype.element_ty), mask=d < D)
