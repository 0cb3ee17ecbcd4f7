"""A student's numbers at exactly an asked mean k, from measurements on either side of it.

A budget is steered by thresholds that were measured on other text, so that the mean number of
active experts misses it by a few percent, differently for every student. Here budgets a little
beside it are measured until two of them lie around the asked k, and `report.exact_k` reads between
these two.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tiny_onn.evaluation.document_sums import (
    NUM_RESAMPLES,
    WITH_INTERVAL,
    interval,
    means_of,
    resampled,
)
from tiny_onn.evaluation.measure import Measured
from tiny_onn.report.exact_k import between, neighbours

# A new measurement aims so far beyond the asked k, as a share of it and of the round's number.
STEP_BEYOND = 0.02
MAX_ROUNDS = 3
# Two points are near enough to read between them if neither is further from k, as a share of it.
NEAR = 0.1
# The numbers that are given at exactly a k, as far as `between` finds them.
AT_K = (
    *(name for name in WITH_INTERVAL if name != "mean_k"),
    "student_calibration_error",
    "ffn_flops",
    "total_flops",
)


def surround(
    points: Sequence[Measured],
    wanted: Sequence[float],
    again: Callable[[list[float]], list[Measured]],
    limits: tuple[float, float],
) -> list[Measured]:
    """Measure at further budgets until there are points near each asked k, on both sides of it.

    Args:
        points: the measurements so far, at least one.
        wanted: the asked mean numbers of active experts.
        again: a function that measures the student at budgets.
        limits: the smallest and the largest budget.

    Returns:
        The further measurements. After `MAX_ROUNDS` a k may still have no points near it.
    """
    found: list[Measured] = []
    for number in range(1, MAX_ROUNDS + 1):
        known = [*points, *found]
        aims = {_aim(known, k, STEP_BEYOND * number, limits) for k in missing(known, wanted)}
        new = sorted(aims - {point.budget for point in known})
        if not new:
            break
        found += again(new)
    return found


def missing(points: Sequence[Measured], wanted: Sequence[float]) -> list[float]:
    """Return the asked k that no two points lie near, on either side."""
    measured = [{"mean_k": point.evaluation.mean_k} for point in points]

    def has_neighbours(k: float) -> bool:
        around = neighbours(measured, k) or ()
        return bool(around) and all(abs(end["mean_k"] / k - 1) <= NEAR for end in around)

    return [k for k in wanted if not has_neighbours(k)]


def at_exactly(points: Sequence[Measured], mean_k: float, seed: int) -> dict[str, Any] | None:
    """Return a student's numbers at exactly `mean_k`, with intervals; None if it is not surrounded.

    Args:
        points: measurements of one student on one text.
        mean_k: the mean number of active experts per token.
        seed: the seed of the resamples.

    Returns:
        `mean_k`, the numbers of `AT_K`, `intervals` by name, and `between`: the measured points
        that were read between, with their `budget`, `mean_k`, `forward_kl` and `thresholds`. It
        holds one point if that one was measured within `EQUAL_K` of `mean_k`.
    """
    numbers = [{**point.numbers(), "index": index} for index, point in enumerate(points)]
    around = neighbours(numbers, mean_k)
    if around is None:
        return None
    low, high = around
    read = dict(low) if low is high else between(low, high, mean_k)
    ends = [points[low["index"]]] + ([] if low is high else [points[high["index"]]])
    return {
        "mean_k": mean_k,
        **{name: read[name] for name in AT_K if name in read},
        "intervals": _intervals(ends, mean_k, seed),
        "between": [
            {
                "budget": end.budget,
                "mean_k": end.evaluation.mean_k,
                "forward_kl": end.evaluation.forward_kl,
                "thresholds": end.thresholds,
            }
            for end in ends
        ],
    }


def _intervals(ends: Sequence[Measured], mean_k: float, seed: int) -> dict[str, list[float] | None]:
    """Return intervals of the numbers at `mean_k`; each resample is read between its own ends."""
    sums_BAC = resampled(torch.stack([end.sums for end in ends], dim=1), seed)
    names = [name for name in WITH_INTERVAL if name != "mean_k"]
    means = means_of(sums_BAC)
    lists = {name: means[name].tolist() for name in WITH_INTERVAL}
    rows = [
        _read([{name: lists[name][b][a] for name in lists} for a in range(len(ends))], mean_k)
        for b in range(NUM_RESAMPLES)
    ]
    return {
        name: interval(
            torch.tensor([row[name] for row in rows], dtype=torch.float64), ends[0].num_documents
        )
        for name in names
    }


def _read(ends: Sequence[dict[str, float]], mean_k: float) -> dict[str, float]:
    if len(ends) == 1:
        return ends[0]
    low, high = ends
    if low["mean_k"] == high["mean_k"]:
        return dict.fromkeys(low, math.nan)
    return between(low, high, mean_k)


def _aim(
    points: Sequence[Measured], mean_k: float, beyond: float, limits: tuple[float, float]
) -> float:
    """Return a budget that should give a k near `mean_k`, on the side where no point is near."""
    below = [point for point in points if point.evaluation.mean_k < mean_k]
    above = [point for point in points if point.evaluation.mean_k > mean_k]
    low = max(below, key=lambda point: point.evaluation.mean_k, default=None)
    high = min(above, key=lambda point: point.evaluation.mean_k, default=None)
    if low is not None and high is not None:
        first, last = low.evaluation.mean_k, high.evaluation.mean_k
        share = (mean_k - first) / (last - first)
        budget = low.target_k + share * (high.target_k - low.target_k)
        side = 1 if last - mean_k > mean_k - first else -1
    else:
        nearest, side = (low, 1) if low is not None else (high, -1)
        assert nearest is not None
        budget = nearest.target_k * mean_k / max(nearest.evaluation.mean_k, 1e-9)
    return min(limits[1], max(limits[0], round(budget * (1 + side * beyond), 4)))
