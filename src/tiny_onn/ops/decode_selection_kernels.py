"""The selection of a token's experts in Triton, for `decode_kernels.py`; the import needs triton.

Legend: T tokens, E experts. Constants are upper case. `no_type_check` keeps runtime type checkers
away from kernels.
"""

from typing import no_type_check

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
@no_type_check
def softmax(values):
    """Return the softmax of a vector; minus infinity gives 0."""
    powers = tl.exp(values - tl.max(values, axis=0))
    return tl.div_rn(powers, tl.zeros_like(powers) + tl.sum(powers, axis=0))


@triton.jit
@no_type_check
def select(
    logits,  # (E,) float32, minus infinity beyond E
    bias,  # (E,) float32, 0 beyond E
    threshold,  # float32
    e,  # (E,) int32
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NUM_ACTIVE: tl.constexpr,  # 0: a budget by threshold
    NUM_SHARED: tl.constexpr,
    WEIGHTING: tl.constexpr,
    TIE_BREAK: tl.constexpr,
):
    """Compute `router.route` of one token: scores, active experts (0 or 1), and weights."""
    shared = e < NUM_SHARED
    # Shared experts are left out of selection and weights until the end.
    logits = tl.where(shared, float("-inf"), logits)
    selecting = logits + bias
    above = selecting[:, None] > selecting[None, :]
    first = (selecting[:, None] == selecting[None, :]) & (e[:, None] < e[None, :])
    rank = tl.sum((above | first).to(tl.int32), axis=0)
    if NUM_ACTIVE == 0:
        scores = softmax(selecting) * (1.0 - rank.to(tl.float32) * TIE_BREAK)
        scores = tl.where(rank == 0, float("inf"), scores)
        active = ((scores > threshold) & (e < E) & (e >= NUM_SHARED)).to(tl.int32)
    else:
        scores = selecting
        active = ((rank < NUM_ACTIVE) & (e < E)).to(tl.int32)
    chosen = active.to(tl.float32)
    if WEIGHTING == "softmax":
        weights = softmax(logits) * chosen
        weights = tl.div_rn(weights, tl.zeros_like(weights) + tl.sum(weights, axis=0))
    elif WEIGHTING == "sigmoid":
        weights = chosen / (1.0 + tl.exp(-logits))
    elif WEIGHTING == "mean":
        weights = tl.div_rn(chosen, tl.zeros_like(chosen) + tl.sum(chosen, axis=0))
    else:
        weights = chosen
    scores = tl.where(shared, float("inf"), scores)
    return scores, tl.where(shared, 1, active), tl.where(shared, 1.0, weights)


@triton.jit
@no_type_check
def select_token(
    logits,  # (T, E) float32
    selection_bias,  # (E,) float32
    threshold,  # () float32
    scores,  # (T, E) float32, written if `writes`
    weights,  # (T, E) float32, written if `writes`
    active,  # (T, E) uint8, written if `writes`
    t,
    writes,  # bool
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NUM_ACTIVE: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    WEIGHTING: tl.constexpr,
    TIE_BREAK: tl.constexpr,
):
    """Return token t's active experts (0 or 1) and their weights."""
    e = tl.arange(0, BLOCK_E)
    row = t * E + e
    bias = tl.load(selection_bias + e, mask=e < E, other=0.0).to(tl.float32)
    values = tl.load(logits + row, mask=e < E, other=float("-inf"))
    limit = tl.load(threshold).to(tl.float32)
    score, on, weight = select(
        values, bias, limit, e, E, BLOCK_E, NUM_ACTIVE, NUM_SHARED, WEIGHTING, TIE_BREAK
    )
    if writes:
        tl.store(scores + row, score, mask=e < E)
        tl.store(weights + row, weight, mask=e < E)
        tl.store(active + row, on.to(tl.uint8), mask=e < E)
    return on, weight
