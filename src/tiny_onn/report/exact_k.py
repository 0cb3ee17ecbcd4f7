"""A student's numbers at exactly a mean number of active experts, read between two measurements.

A budget is met within a few percent only, and a few percent of the experts change the KL, so that
students compare fairly at one k only. Two measurements of the same student at two budgets, one on
either side of that k, are joined: the KL by a straight line of its logarithm over k, because each
further expert removes about the same share of the KL, and all other numbers by a straight line.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# The share by which a measured k may differ from the wanted one and count as equal.
EQUAL_K = 1e-3
LOG_LINEAR = ("forward_kl", "reverse_kl")
# These numbers follow from a straight one, so that they are not straight lines themselves.
FROM_NLL = (("student_perplexity", "student_nll"), ("perplexity_ratio", "nll_difference"))


def between(low: Mapping[str, Any], high: Mapping[str, Any], mean_k: float) -> dict[str, float]:
    """Return the numbers that two measurements share, on the line through both at `mean_k`.

    Args:
        low: one measurement, with its `mean_k`.
        high: a measurement at another `mean_k`.
        mean_k: the mean number of active experts; beyond both, the line is continued.
    """
    share = (mean_k - low["mean_k"]) / (high["mean_k"] - low["mean_k"])
    found: dict[str, float] = {}
    for name, start in low.items():
        end: Any = high.get(name)
        if not (_is_number(start) and _is_number(end)):
            continue
        if start == end:
            found[name] = start
        elif name in LOG_LINEAR and start > 0 and end > 0:
            # Two measurements at almost the same k may put the line's end beyond any float.
            found[name] = perplexity(_line(math.log(start), math.log(end), share))
        else:
            found[name] = _line(start, end, share)
    for name, nll in FROM_NLL:
        if nll in found:
            found[name] = perplexity(found[nll])
    return found | {"mean_k": mean_k}


def at_k(points: Sequence[Mapping[str, Any]], mean_k: float) -> dict[str, Any] | None:
    """Return the numbers at exactly `mean_k`, as measured or between the neighbouring points.

    Args:
        points: measurements of one student on one text.
        mean_k: the mean number of active experts per token.

    Returns:
        The numbers, or None if no points lie around `mean_k`.
    """
    around = neighbours(points, mean_k)
    if around is None:
        return None
    low, high = around
    return dict(low) if low is high else {**low, **between(low, high, mean_k)}


def neighbours(
    points: Sequence[Mapping[str, Any]], mean_k: float
) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """Return the nearest points at and on both sides of `mean_k`; None if there is no such pair.

    A point at `mean_k` itself is returned twice.
    """
    nearest = min(points, key=lambda point: abs(point["mean_k"] - mean_k), default=None)
    if nearest is not None and math.isclose(nearest["mean_k"], mean_k, rel_tol=EQUAL_K):
        return nearest, nearest
    below = [point for point in points if point["mean_k"] < mean_k]
    above = [point for point in points if point["mean_k"] > mean_k]
    if not below or not above:
        return None
    return max(below, key=lambda p: p["mean_k"]), min(above, key=lambda p: p["mean_k"])


def perplexity(nll: float) -> float:
    """Return the perplexity of a loss, infinite if it is too large for a float."""
    return math.exp(nll) if nll < 700 else math.inf


def _line(start: int | float, end: int | float, share: float) -> float:
    return start + share * (end - start)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
