"""The router's gradient as one Triton kernel; importing this module imports triton.

The kernel computes `router_gradient` in one launch, for the targets `single`: on a GPU its forty
small operations cost more time on the host than the expert layer itself. The kernel leaves a sum
over tokens for each block, in the order of blocks, which the caller adds up.

Legend: T tokens, D hidden, E experts, B blocks of tokens.
"""

from typing import no_type_check

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
@no_type_check
def squared_norms(
    x,  # (T, D)
    t,  # (BLOCK_T,)
    inside,  # (BLOCK_T,)
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return each row's squared L2 norm, in float32."""
    total = tl.zeros((BLOCK_T,), tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (d < D)[None, :]
        row = tl.load(x + t.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0)
        row = row.to(tl.float32)
        total += tl.sum(row * row, axis=1)
    return total


@triton.jit
@no_type_check
def unit_surprise(
    x,
    grad_y,
    at_sums,  # (BLOCK_T, BLOCK_E) pointers to the first sum
    t,
    inside_t,
    inside,
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KIND: tl.constexpr,
):
    """Compute surprise at unit routing weight, as `closed_form_surprise` does."""
    dot = tl.load(at_sums + 2 * E * T, mask=inside, other=0.0)
    if KIND == "gain":
        surprise = -dot
    else:
        grad_sq = squared_norms(grad_y, t, inside_t, D, BLOCK_T, BLOCK_D)[:, None]
        if KIND == "output":
            surprise = tl.sqrt(grad_sq) + tl.zeros_like(dot)
        else:
            x_sq = squared_norms(x, t, inside_t, D, BLOCK_T, BLOCK_D)[:, None]
            hidden_sq = tl.load(at_sums + E * T, mask=inside, other=0.0)
            squared = x_sq * tl.load(at_sums, mask=inside, other=0.0) + hidden_sq * grad_sq
            if KIND == "relative":
                positive = hidden_sq > 0
                squared = tl.where(positive, squared / tl.where(positive, hidden_sq, 1.0), 0.0)
            surprise = tl.sqrt(squared)
    return surprise


@triton.jit
@no_type_check
def lesson_kernel(
    x,  # (T, D), read for the kinds that need its norm
    grad_y,  # (T, D), read for the kinds that need its norm
    sums,  # (3, E, T) float32: squared norms of two gradients, and dot; at unit weight
    weights,  # (T, E) float32
    logits,  # (T, E) float32
    active,  # (T, E) bool
    token_mask,  # (T,) bool
    lesson,  # (T,) bool, read if ALL: whose candidates are all experts
    grad,  # (T, E) float32, written: the gradient at the logits
    counts,  # (B, 4) float32, written
    tallies,  # (B, 4, E) float32, written
    scales,  # (2,) float32: of the gradient, and of surprise
    T,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    KIND: tl.constexpr,
    SMALLEST: tl.constexpr,
    ALL: tl.constexpr,
):
    """Compute surprise, targets, the router's gradient and the tally of a block of tokens."""
    b = tl.program_id(0)
    t = b * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    inside_t = t < T
    inside = inside_t[:, None] & (e < E)[None, :]
    at = t[:, None] * E + e[None, :]
    at_sums = sums + e[None, :] * T + t[:, None]
    surprise = unit_surprise(
        x, grad_y, at_sums, t, inside_t, inside, T, D, E, BLOCK_T, BLOCK_D, KIND
    )
    on = tl.load(active + at, mask=inside, other=0).to(tl.int1)
    weight = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
    counted_t = tl.load(token_mask + t, mask=inside_t, other=0).to(tl.int1)
    candidate = on
    surprise *= tl.load(scales + 1)
    if ALL:
        taught = tl.load(lesson + t, mask=inside_t, other=0).to(tl.int1)[:, None]
        candidate = (on | taught) & inside
        surprise = tl.where(taught, surprise, surprise * weight)
    else:
        surprise *= weight
    signed = -surprise
    if SMALLEST:
        signed = surprise
    best = tl.min(tl.where(candidate, signed, float("inf")), axis=1)
    farthest = tl.max(tl.where(candidate, signed, float("-inf")), axis=1)
    told = counted_t & (farthest > best)
    target = candidate & (signed == best[:, None]) & told[:, None]
    num_targets = tl.sum(target.to(tl.float32), axis=1)
    share = tl.where(target, 1.0 / tl.where(told, num_targets, 1.0)[:, None], 0.0)
    values = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
    values = tl.where(inside_t[:, None] | (e > 0)[None, :], values, 0.0)
    powers = tl.exp(values - tl.max(values, axis=1)[:, None])
    softmax = powers / tl.sum(powers, axis=1)[:, None]
    gradient = tl.where(told[:, None], softmax, 0.0) - share
    tl.store(grad + at, gradient * tl.load(scales), mask=inside)
    pick = tl.argmax(tl.where(candidate, values, float("-inf")), axis=1)
    picked = (e[None, :] == pick[:, None]) & told[:, None]
    choices = tl.maximum(tl.sum(candidate.to(tl.float32), axis=1), 1.0)
    tl.store(counts + b * 4, tl.sum(counted_t.to(tl.float32), axis=0))
    tl.store(counts + b * 4 + 1, tl.sum(told.to(tl.float32), axis=0))
    agree = tl.sum((picked & target).to(tl.float32), axis=1)
    tl.store(counts + b * 4 + 2, tl.sum(agree, axis=0))
    tl.store(counts + b * 4 + 3, tl.sum(num_targets / choices, axis=0))
    surprise = tl.where(counted_t[:, None], surprise, 0.0)
    to = tallies + b * 4 * E + e
    tl.store(to, tl.sum(surprise, axis=0), mask=e < E)
    tl.store(to + E, tl.sum(tl.where(on, surprise, 0.0), axis=0), mask=e < E)
    tl.store(to + 2 * E, tl.sum(picked.to(tl.float32), axis=0), mask=e < E)
    tl.store(to + 3 * E, tl.sum(target.to(tl.float32), axis=0), mask=e < E)
