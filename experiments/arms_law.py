"""How KL falls with training tokens: a power law through the ends of runs.

Every run has its own schedule, whose learning rates fall to zero at its end, so that the points of
a law are ends of whole runs and never evaluations half way. log KL is fitted by least squares; the
interval is Student's t on what the runs scatter around the law.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from experiments.arms_table import best_runs, has_diverged, millions, settings_of

# Student's t at 97.5 %, from one degree of freedom on.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
REACHED = 0.06
# So many times its longest run a law may be carried on.
TRUSTED = 10

ROW_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Law:
    """KL = scale * (tokens / 1e6) ** -exponent."""

    scale: float
    exponent: float
    half: float | None
    """Half of the exponent's 95 % interval; None where two runs leave nothing to judge by."""
    points: tuple[tuple[int, float], ...]
    """Tokens and KL at exactly k of the runs."""

    def at(self, tokens: float) -> float:
        """The KL that the law gives."""
        return self.scale * (tokens / 1e6) ** -self.exponent

    def means(self) -> list[tuple[int, float]]:
        """Each length in tokens, with the mean of log KL there."""
        lengths = sorted({tokens for tokens, _ in self.points})
        return [(n, fmean(math.log(k) for t, k in self.points if t == n)) for n in lengths]

    def local(self) -> list[float]:
        """The exponents between the mean points of neighbouring lengths."""
        return [
            (log_kl - next_kl) / math.log(longer / tokens)
            for (tokens, log_kl), (longer, next_kl) in pairwise(self.means())
        ]

    def sentence(self) -> str:
        """The law in words."""
        means = self.means()
        text = f"KL = {self.scale:.3f} N^{-self.exponent:.3f}, N in millions of tokens"
        if self.half is not None:
            text += f" (95 % interval of the exponent {self.exponent - self.half:.2f} to"
            text += f" {self.exponent + self.half:.2f})"
        text += f", from {len(self.points)} runs of {len(means)} lengths"
        if len(means) == 2:
            return f"{text}; two lengths do not show whether it is a law."
        local = self.local()
        text += "; between neighbouring lengths the exponent is "
        text += ", ".join(f"{value:.2f}" for value in local)
        needed = 1e6 * (self.scale / REACHED) ** (1 / self.exponent) if self.exponent > 0 else 0
        longest, log_kl = means[-1]
        if needed > longest and local[-1] > 0:
            # The logarithm of how many times the longest run it takes.
            ratio = (log_kl - math.log(REACHED)) / local[-1]
            beyond = "more than " if ratio > math.log(TRUSTED) else ""
            last = millions(longest * math.exp(min(ratio, math.log(TRUSTED))))
            text += f"; KL {REACHED:g} takes {millions(needed)} tokens by the law,"
            text += f" and {beyond}{last} at the last of these exponents"
        return f"{text}."


def row_tokens(record: dict[str, Any]) -> int:
    """The length of the rows that a run was measured in: that of training where it is not said."""
    trained = settings_of(record).get("data.row_tokens", ROW_TOKENS)
    return int(record.get("report_row_tokens", trained))


def law_of(records: Sequence[dict[str, Any]], arm: str) -> Law | None:
    """Fit the law of an arm; None with runs of fewer than two lengths, or of rates that differ.

    It is None too if the exponent may be 0, that is if its interval holds 0.

    Runs are those of `best_runs` in rows of `ROW_TOKENS`: a token in a longer row has more text
    before it.
    """
    lengths = {r["tokens"] for r in records if r["arm"] == arm}
    runs = [run for tokens in sorted(lengths) for run in best_runs(records, tokens, arm)]
    runs = [run for run in runs if not has_diverged(run, records) and row_tokens(run) == ROW_TOKENS]
    if len({(run["rate"], run["gate_rate"]) for run in runs}) > 1:
        return None
    points = tuple((run["tokens"], run["report"]["kl_at_k"]) for run in runs)
    if len({tokens for tokens, _ in points}) < 2:
        return None
    x = [math.log(tokens / 1e6) for tokens, _ in points]
    y = [math.log(kl) for _, kl in points]
    middle_x, middle_y = fmean(x), fmean(y)
    square = sum((a - middle_x) ** 2 for a in x)
    slope = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / square
    left = [b - middle_y - slope * (a - middle_x) for a, b in zip(x, y, strict=True)]
    free = len(points) - 2
    half = None
    if free:
        t = T_975[min(free, len(T_975)) - 1]
        half = t * math.sqrt(sum(value**2 for value in left) / free / square)
    if half is not None and abs(slope) <= half:
        return None
    scale = math.exp(middle_y - slope * middle_x)
    return Law(scale=scale, exponent=-slope, half=half, points=points)
