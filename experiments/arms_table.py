"""What a run of `arms.py` leaves: its job, its line on the terminal and its place in the table."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    arm: str
    asked_tokens: int
    seed: int
    rate: float
    gate_rate: float

    def name(self) -> str:
        """The name of its folder."""
        words = "".join(c if c.isalnum() else "-" for c in self.arm)
        return f"{words}-{self.asked_tokens}-x{self.rate:g}-g{self.gate_rate:g}-s{self.seed}"


def job_of(record: dict[str, Any]) -> Job:
    """The job that left a record."""
    return Job(**{field.name: record[field.name] for field in fields(Job)})


def at_k(points: Sequence[tuple[float, float]], k: float) -> float:
    """The KL at exactly k: log KL on straight lines between points (mean k, KL).

    Beyond the points it follows the nearest two; one point alone is taken as it is.
    """
    points = sorted(points)
    if len(points) == 1:
        return points[0][1]
    pairs = list(itertools.pairwise(points))
    (low, first), (high, second) = next((p for p in pairs if k <= p[1][0]), pairs[-1])
    if high == low:
        return first
    share = (k - low) / (high - low)
    return math.exp((1 - share) * math.log(first) + share * math.log(second))


def show(record: dict[str, Any], seconds: float) -> None:
    """One line on the terminal."""
    report, before = record["report"], record["choose"]["before"]
    print(
        f"{seconds:6.0f} s  {job_of(record).name()}: KL"
        f" {'' if before is None else format(before['forward_kl'], '.4f')} ->"
        f" {report['forward_kl']:.4f} at k {report['mean_k']:.2f}, {report['kl_at_k']:.4f} at"
        f" {record['target_k']:g}; {record['tokens']:,} tokens in"
        f" {record['seconds']['training']:.0f} s",
        flush=True,
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def table(records: Sequence[dict[str, Any]], order: Sequence[str]) -> Iterator[str]:
    """Each arm at the rates that did best on the text to choose on, by tokens.

    An arm that ends farther from its teacher than it began has diverged, and has no numbers.
    """
    yield (
        "| tokens | arm | rates | seeds | KL, deployed | mean k | KL at k | perplexity at k |"
        " teacher's | KL at k, unseen sources |"
    )
    yield "|---" * 10 + "|"
    arms = {(r["tokens"], r["arm"]) for r in records}
    for tokens, arm in sorted(arms, key=lambda pair: (pair[0], order.index(pair[1]))):
        ours = [r for r in records if (r["tokens"], r["arm"]) == (tokens, arm)]
        by_rate = {
            rates: [r for r in ours if (r["rate"], r["gate_rate"]) == rates]
            for rates in sorted({(r["rate"], r["gate_rate"]) for r in ours})
        }
        best = min(by_rate, key=lambda rates: chosen_by(by_rate[rates]))
        runs = by_rate[best]
        reports, unseen = ([r[part] for r in runs] for part in ("report", "unseen"))
        cells = [f"{tokens:,}", arm, f"{best[0]:g}, {best[1]:g} of {len(by_rate)}", str(len(runs))]
        if any(map(has_diverged, runs)):
            yield f"| {' | '.join([*cells, 'diverged', '', '', '', '', ''])} |"
            continue
        cells += [
            spread([r["forward_kl"] for r in reports], 4),
            spread([r["mean_k"] for r in reports], 2),
            spread([r["kl_at_k"] for r in reports], 4),
            spread([r["perplexity_at_k"] for r in reports], 2),
            f"{reports[0]['teacher_perplexity']:.2f}",
            spread([u["kl_at_k"] for u in unseen], 4) if all(unseen) else "",
        ]
        yield f"| {' | '.join(cells)} |"


def chosen_by(records: Sequence[dict[str, Any]]) -> float:
    """What a rate is chosen by: the mean KL on the text that runs keep out of training."""
    return fmean(record["choose"]["after"]["forward_kl"] for record in records)


def has_diverged(record: dict[str, Any]) -> bool:
    """Whether a run ended farther from its teacher than it began."""
    before, after = (record["choose"][name] for name in ("before", "after"))
    return before is not None and after["forward_kl"] > before["forward_kl"]
