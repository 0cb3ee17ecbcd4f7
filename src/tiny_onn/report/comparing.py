"""Comparison of runs at equal compute, with the differences of their settings.

A budget is met within a few percent only, and a few percent of the experts change the KL. So each
run has two sets of numbers: those of its own last evaluation, as it is deployed, and those at
exactly the k of the comparison, which `exact_k` reads between two measurements at several budgets
(`frontier.json`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from tiny_onn.report.exact_k import EQUAL_K, at_k, neighbours, perplexity
from tiny_onn.report.run_data import Run

# The share by which the teacher's own loss of two runs may differ and count as equal.
EQUAL_LOSS = 1e-3
# The share by which a run's k may differ from the comparison's k while the run is still ranked by
# its KL; runs that differ more are ranked after all others.
NEAR_K = 0.02
# The marks of numbers at another k, and of numbers on another text.
OTHER_K, OTHER_TEXT = " *", " #"
# What is told of a measurement that numbers were read from.
ENDS = ("mean_k", "forward_kl", "thresholds")
NUMBERS = ("forward_kl", "top1_agreement", "student_nll", "ffn_flops", "total_flops")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A run of a comparison."""

    name: str
    mean_k: float
    """The mean number of active experts per token at which the numbers hold."""
    measured_k: float
    """The mean number of active experts per token in the run's own last evaluation."""
    equal: bool
    """True if `mean_k` is the k of the comparison."""
    same_text: bool
    """True if the run was evaluated on the text of the first run."""
    tokens: int
    """The number of training tokens."""
    forward_kl: float
    top1_agreement: float
    perplexity: float
    ffn_flops: float
    total_flops: float
    deployed_kl: float
    """The KL of the run's own last evaluation, at `measured_k`."""
    deployed_perplexity: float
    interval: Sequence[float] | None
    """The 95 % interval of `forward_kl` over documents, if `eval` measured it at this k."""
    between: Sequence[Mapping[str, Any]]
    """The measurements that were read between, with `mean_k` and `thresholds` if those are known;
    one if the k itself was measured, none if the run cannot be read at that k."""
    verdict: str
    finished: bool
    """True if the run came to its end."""
    settings: Mapping[str, Any]
    """The settings that differ between the runs, by name."""


class NamedTable(NamedTuple):
    """A table as text."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Runs ranked by their held-out KL at equal compute, the best first."""

    mean_k: float
    """The mean number of active experts per token at which the runs are compared."""
    rows: Sequence[Row]

    def as_json(self) -> str:
        """Return the comparison as indented JSON."""
        return json.dumps(asdict(self), indent=2)

    def tables(self) -> list[NamedTable]:
        """Return the numbers at equal compute, those as deployed, and the settings that differ."""
        with_interval = any(row.interval is not None for row in self.rows)
        header = ("run", "k", "KL", *(["95 %"] * with_interval), "agree", "perplexity", "MFLOPs")
        at_k = [
            (
                row.name,
                f"{row.mean_k:.2f}{'' if row.equal else OTHER_K}",
                f"{row.forward_kl:.4f}{'' if row.same_text else OTHER_TEXT}",
                *([_shown_interval(row)] * with_interval),
                f"{row.top1_agreement:.1%}",
                f"{row.perplexity:.2f}",
                mflops(row.ffn_flops),
            )
            for row in self.rows
        ]
        deployed = [
            (
                row.name,
                f"{row.measured_k:.2f}",
                f"{row.deployed_kl:.4f}{'' if row.same_text else OTHER_TEXT}",
                f"{row.deployed_perplexity:.2f}",
                f"{row.tokens:,}",
                row.verdict if row.finished else f"{row.verdict}, unfinished",
            )
            for row in self.rows
        ]
        tables = [
            NamedTable("At equal compute", header, [*at_k]),
            NamedTable("As deployed", (*header[:3], "perplexity", "tokens", "health"), [*deployed]),
        ]
        names = list(self.rows[0].settings) if self.rows else []
        settings = [(name, *(shown(row.settings[name]) for row in self.rows)) for name in names]
        if settings:
            header = ("setting", *(row.name for row in self.rows))
            tables.append(NamedTable("What differs in the settings", header, [*settings]))
        return tables

    def markdown(self) -> str:
        """Return the tables in Markdown, under a line on how to read them."""
        escape = str.maketrans({"|": "\\|", "\n": " ", "<": "&lt;"})
        parts = [self.caption()]
        for title, header, rows in self.tables():
            lines = [[cell.translate(escape) for cell in row] for row in (header, *rows)]
            lines.insert(1, ["---"] * len(header))
            parts.append(f"{title}:")
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return "\n\n".join(parts) + "\n"

    def caption(self) -> str:
        """Describe the numbers in sentences."""
        text = (
            f"Held-out KL to the teacher at {self.mean_k:.2f} active experts per token, the"
            " smallest first; FFN MFLOPs per token."
        )
        read = [row for row in self.rows if len(row.between) > 1]
        if read:
            text += (
                " Between two measurements the logarithm of the KL is read on a straight line over"
                " k, and the other numbers on a straight line: "
                + "; ".join(f"{row.name} {_ends(row)}" for row in read)
                + "."
            )
        if any(not row.equal for row in self.rows):
            text += (
                f" {OTHER_K.strip()} marks a run that was not measured around that k:"
                " `tiny-onn eval RUN --frontier --out RUN` measures it."
            )
        if any(not row.same_text for row in self.rows):
            text += (
                f" {OTHER_TEXT.strip()} marks a run that was evaluated on another text than the"
                " first run."
            )
        return text


def _shown_interval(row: Row) -> str:
    return "" if row.interval is None else "{:.4f} to {:.4f}".format(*row.interval)


def _ends(row: Row) -> str:
    return " and ".join(shown_end(end) for end in row.between)


def shown_end(end: Mapping[str, Any]) -> str:
    """Describe a measurement by its k, and by the mean of its layers' thresholds if it has any."""
    thresholds = end.get("thresholds")
    if not thresholds:
        return f"k = {end['mean_k']:.3f}"
    mean = sum(thresholds) / len(thresholds)
    return f"k = {end['mean_k']:.3f} (threshold {mean:.4g}, mean over layers)"


def shown(value: object) -> str:
    """Return a setting's value as TOML and JSON write it."""
    return json.dumps(value)


def points_of(run: Run) -> list[dict[str, Any]]:
    """Return the measured points of a run with rising mean k: its frontier and last evaluation.

    The last evaluation counts as a point of the frontier if it was made on the same text.
    """
    measured: list[Mapping[str, Any]] = []
    if run.frontier:
        # Runs of an earlier version have no points beside their budgets.
        measured += [*run.frontier["points"], *run.frontier.get("beside", ())]
    if run.last is not None and (not measured or same_text(measured[0], run.last)):
        measured.append(run.last)
    names = ("mean_k", "num_tokens", "teacher_nll", "dense_ffn_flops", *NUMBERS)
    points: dict[float, dict[str, Any]] = {}
    for point in measured:
        optional = {name: point[name] for name in ("thresholds", "intervals") if name in point}
        # An evaluation of the run at the k of a point adds nothing to that point.
        points.setdefault(point["mean_k"], {**{name: point[name] for name in names}, **optional})
    return [points[k] for k in sorted(points)]


def read_at(run: Run, mean_k: float) -> dict[str, Any] | None:
    """Return a run's numbers at exactly `mean_k`; None if it was not measured around it.

    What `eval` read there counts, with its `intervals`; where it read nothing, the run's points do.
    `between` holds the measurements that were read between, see `ENDS`.
    """
    points = points_of(run)
    ends = list(neighbours(points, mean_k) or ())
    if ends and ends[0] is ends[1]:
        del ends[1]
    found = at_k(points, mean_k)
    numbers = None if found is None else {**found, "intervals": {}, "between": ends}
    if run.frontier and (run.last is None or same_text(run.frontier["points"][0], run.last)):
        for exact in run.frontier.get("exact", ()):
            if math.isclose(exact["mean_k"], mean_k, rel_tol=EQUAL_K):
                return {**(numbers or points[0]), **exact}
    return numbers


def interval_at(numbers: Mapping[str, Any]) -> Sequence[float] | None:
    """Return the 95 % interval of the KL that `read_at` found, if `eval` measured one."""
    return numbers.get("intervals", {}).get("forward_kl")


def same_text(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return True if two evaluations agree in their size and the teacher's loss on the text."""
    close = math.isclose(one["teacher_nll"], other["teacher_nll"], rel_tol=EQUAL_LOSS)
    return one["num_tokens"] == other["num_tokens"] and close


def common_k(runs: Sequence[Run]) -> float:
    """Return the k at which most of the runs can be read, and among those the nearest to the first.

    Runs that were evaluated on another text than the first do not count.

    Args:
        runs: the runs, each with an evaluation.
    """
    wanted = runs[0].last
    assert wanted is not None
    alike = [run for run in runs if run.last is not None and same_text(wanted, run.last)]
    curves = [points_of(run) for run in alike]
    candidates = [run.last["mean_k"] for run in alike if run.last is not None]

    def reach(k: float) -> tuple[int, float]:
        return sum(at_k(points, k) is not None for points in curves), -abs(k - wanted["mean_k"])

    return max(candidates, key=reach)


def compare(runs: Sequence[Run], mean_k: float | None = None) -> Comparison:
    """Rank runs by held-out KL at equal compute; runs without an evaluation are left out.

    Args:
        runs: the runs, at least one.
        mean_k: the mean number of active experts per token to compare at; None: `common_k`.
    """
    measured = [run for run in runs if run.last is not None]
    if not measured:
        return Comparison(mean_k=math.nan, rows=[])
    k = common_k(measured) if mean_k is None else mean_k
    names = differing([run.config for run in measured])
    first = points_of(measured[0])[0]
    rows = []
    for run in measured:
        last, points = run.last, points_of(run)
        assert last is not None
        at_equal_k = read_at(run, k)
        numbers: Mapping[str, Any] = last if at_equal_k is None else at_equal_k
        ends = numbers.get("between", ())
        rows.append(
            Row(
                name=run.name,
                mean_k=numbers["mean_k"],
                measured_k=last["mean_k"],
                equal=at_equal_k is not None,
                same_text=same_text(first, points[0]),
                tokens=run.tokens,
                forward_kl=numbers["forward_kl"],
                top1_agreement=numbers["top1_agreement"],
                perplexity=perplexity(numbers["student_nll"]),
                ffn_flops=numbers["ffn_flops"],
                total_flops=numbers["total_flops"],
                deployed_kl=last["forward_kl"],
                deployed_perplexity=perplexity(last["student_nll"]),
                interval=interval_at(numbers),
                between=[
                    {
                        name: end[name]
                        for name in ("mean_k", "forward_kl", "thresholds")
                        if name in end
                    }
                    for end in ends
                ],
                verdict=run.health["verdict"] if run.was_judged else "unknown",
                finished=run.finished,
                settings={name: setting(run.config, name) for name in names},
            )
        )

    def order(row: Row) -> tuple[bool, bool, float]:
        # NaN cannot be ordered, so that a run that diverged counts as infinitely far away.
        kl = row.forward_kl if math.isfinite(row.forward_kl) else math.inf
        far = not math.isclose(row.mean_k, k, rel_tol=NEAR_K)
        return not row.same_text, far, kl

    return Comparison(mean_k=k, rows=sorted(rows, key=order))


def differing(configs: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Return the names `section.key` of the settings that differ between configurations."""
    names = {
        f"{section}.{key}": None
        for config in configs
        for section, keys in config.items()
        for key in keys
    }
    return [
        name
        for name in names
        if any(setting(config, name) != setting(configs[0], name) for config in configs[1:])
    ]


def setting(config: Mapping[str, Mapping[str, Any]], name: str) -> object:
    """Return the value of `section.key`, or None if the run has no such setting."""
    section, _, key = name.partition(".")
    return config.get(section, {}).get(key)


def mflops(flops: float) -> str:
    """Return FLOPs in millions, to four digits or to the unit."""
    millions = flops / 1e6
    return f"{millions:,.0f}" if millions >= 1000 else f"{millions:#.4g}"
