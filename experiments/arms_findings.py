"""The tables and sentences of docs/results.md, made from the records of `arms.py`.

A pair of arms is compared at exactly k, seed by seed. What it shows counts as established with at
least three seeds and a 95 % interval of the mean difference (Student's t) that leaves out zero.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

from experiments.arms import planned
from experiments.arms_law import T_975, law_of
from experiments.arms_settings import ARMS, RIVALS, TOKENS
from experiments.arms_table import (
    FOLLOWED,
    OURS,
    RECIPES,
    best_runs,
    by_arm,
    by_rates,
    has_diverged,
    job_of,
    millions,
    spread,
    table,
    with_rates,
)
from experiments.options import RESULTS

Record = dict[str, Any]

TARGET = 16.0
PLAN = RESULTS.parent / "arms_plan.json"
MUON = next(iter(RECIPES))
ENOUGH_SEEDS = 3
RIVALS_BY_MUON = tuple(rival + MUON for rival in RIVALS)
SMALL_STEPS = [*RECIPES][1]
PAIRS = (
    *((OURS, other) for other in ARMS if other not in (OURS, *RIVALS_BY_MUON)),
    ("frozen ridge gate", "half-width"),
    ("frozen ridge gate, loss metric", "frozen ridge gate"),
    *((f"smk{MUON}", rival) for rival in RIVALS_BY_MUON),
    *((arm + SMALL_STEPS, arm + MUON) for arm in (OURS, "half-width")),
    (OURS + SMALL_STEPS, "half-width" + SMALL_STEPS),
    (f"smk{MUON}, loss metric", f"smk{MUON}"),
    *zip(RIVALS_BY_MUON, RIVALS, strict=True),
)
# Tokens and the KL at exactly k that SMK was meant to reach.
GOALS = {1_998_848: 0.20, 20_000_768: 0.10, 99_999_744: 0.06}
# The same on embedded text and a manual.
MANUAL_GOAL = (1_998_848, 0.10)
# In percent.
PERPLEXITY_GOAL, LEAD_GOAL = (99_999_744, 2), 100 / 3
# The ways to set thresholds, by their part of a record.
WAYS = {None: "settled", "followed": "follow each sequence"}
K_GOALS = {"report": 0.01, "unseen": 0.02}
COMPARED = (
    "| arm | against | tokens | KL lower by | 95 % interval | seed by seed | of the latter's KL |"
    " on unseen sources |"
)


def sections(
    records: Sequence[Record],
    earlier: Sequence[Record],
    in_order: Sequence[Record],
    short_decay: Sequence[Record],
    manual: Sequence[Record],
) -> dict[str, Iterator[str]]:
    """The lines of each generated place of the pages.

    `earlier` is the study without a refit, `short_decay` that with rates which fall over the second
    half, `in_order` the one after it, in which rows came in the order of the documents. `manual` is
    that on embedded text and a manual.
    """
    budgets_in_order = budgets(in_order)
    at_half, in_order, short_decay = (
        [r for r in part if r["target_k"] == TARGET] for part in (records, in_order, short_decay)
    )
    found = [*compared(at_half), *compared(earlier, ", 21 projects, no refit")]
    return {
        "answer": answer(at_half),
        "leads": leads(at_half),
        "arms": table(at_half),
        "machines": machines(records),
        "established": comparisons(line for sure, line in found if sure),
        "open": comparisons(line for sure, line in found if not sure),
        "goals": goals(at_half, manual),
        "rates": rates(at_half),
        "gate_rates": rates(at_half, "gate_rate"),
        "laws": laws(at_half),
        "budgets": budgets(records),
        "missing": missing(records),
        "in_order": table(in_order),
        "compared_in_order": comparisons(line for _, line in compared(in_order)),
        "laws_in_order": laws(in_order),
        "budgets_in_order": budgets_in_order,
        "short_decay": table(short_decay),
        "manual": table(manual),
        "laws_short_decay": laws(short_decay),
    }


def missing(records: Sequence[Record]) -> Iterator[str]:
    """The runs of the plan that have no record."""
    defaults = {"arms": [], "tokens": TOKENS, "seeds": [0], "rates": [1.0], "gate_rates": [1.0]}
    done = {job_of(record) for record in records}
    left: dict[int, dict[str, list[str]]] = {}
    for job in planned(json.loads(PLAN.read_text("utf-8")), defaults):
        if job not in done:
            name = with_rates(job.arm, asdict(job))
            left.setdefault(job.asked_tokens, {}).setdefault(name, []).append(str(job.seed))
    if not left:
        yield "Every run of the plan has its record."
        return
    yield "Runs of the plan (`experiments/arms_plan.json`) that are **missing**, with their seeds:"
    yield ""
    for tokens, arms in sorted(left.items()):
        names = "; ".join(f"{name} ({', '.join(numbers)})" for name, numbers in arms.items())
        yield f"- {millions(tokens)} tokens: {names}."


def by_length(
    records: Sequence[Record], columns: dict[str, Any], cell: Callable[[int, str, Any], str]
) -> Iterator[str]:
    """A table with a row for each length and recipe that has any cell.

    `cell` gets the tokens, the end of the recipe's arms and what `columns` names.
    """
    yield f"| tokens | recipe | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 2) + "|"
    lengths = sorted({r["tokens"] for r in records})
    for tokens, (recipe, how) in itertools.product(lengths, RECIPES.items()):
        cells = [cell(tokens, recipe, column) for column in columns.values()]
        if any(cells):
            yield f"| {' | '.join((millions(tokens), how, *cells))} |"


def answer(records: Sequence[Record]) -> Iterator[str]:
    """What the arms of most interest reach."""
    arms = (OURS, *RIVALS, "model card's rule")

    def cell(tokens: int, recipe: str, arm: str) -> str:
        return result(records, tokens, arm + recipe)

    return by_length(records, {arm: arm for arm in arms}, cell)


def result(records: Sequence[Record], tokens: int, arm: str) -> str:
    """KL of an arm's runs, their number, and how far perplexity is above the teacher's."""
    runs = best_runs(records, tokens, arm)
    if not runs or any(has_diverged(run, records) for run in runs):
        return ""
    kl = spread([r["report"]["kl_at_k"] for r in runs], 3)
    above = [excess(runs, text) for text in ("report", "unseen")]
    shares = " / ".join(f"{fmean(values):+.1%}" for values in above if values)
    number = with_rates(f"{len(runs)}", runs[0]).replace(" at rate", ", rate")
    return f"{kl} ({number})<br>{shares}".replace("%", " %")


def excess(runs: Sequence[Record], text: str) -> list[float]:
    """By which share of the teacher's the perplexity at exactly k is above it, run by run."""
    reports = [r[text] for r in runs if r[text]]
    return [r["perplexity_at_k"] / r["teacher_perplexity"] - 1 for r in reports]


def leads(records: Sequence[Record]) -> Iterator[str]:
    """By which share of a rival's KL an arm is closer."""
    pairs = (
        (OURS, "half-width"),
        ("frozen ridge gate", "half-width"),
        (OURS, "static choice"),
        (OURS, "frozen ridge gate"),
    )

    def cell(tokens: int, recipe: str, pair: tuple[str, str]) -> str:
        ours, theirs = (arm + recipe for arm in pair)
        runs = pairs_of(records, tokens, ours, best_runs(records, tokens, theirs))
        found = [shares_of(runs, text) for text in ("report", "unseen")]
        told = " / ".join(f"{fmean(shares):.1f} %" for shares in found if shares)
        return f"{told} ({len(runs)})" if runs else ""

    return by_length(
        records, {f"{ours} over {theirs}": (ours, theirs) for ours, theirs in pairs}, cell
    )


def pairs_of(
    records: Sequence[Record], tokens: int, ours: str, theirs: Sequence[Record]
) -> list[tuple[Record, Record]]:
    """An arm's runs beside others of the same seeds; none if one of them has diverged."""
    runs = [{r["seed"]: r for r in part} for part in (best_runs(records, tokens, ours), theirs)]
    common = sorted(runs[0].keys() & runs[1].keys())
    pairs = [(runs[0][seed], runs[1][seed]) for seed in common]
    return [] if any(has_diverged(run, records) for pair in pairs for run in pair) else pairs


def machines(records: Sequence[Record]) -> Iterator[str]:
    """The GPUs, the versions and the days of the runs."""
    where = [r["environment"] for r in records if r.get("environment")]
    gpus = sorted({w["gpu"] for w in where})
    days = sorted({w["time"][:10] for w in where})
    versions = [
        f"{name} {', '.join(sorted({w['versions'][name] for w in where}))}"
        for name in ("torch", "transformers")
    ]
    span = " to ".join(dict.fromkeys(days[:1] + days[-1:]))
    yield f"The runs were made on {' or '.join(gpus)}, {', '.join(versions)}, {span}."


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean; None with one value."""
    if len(values) == 1:
        return None
    t = T_975[min(len(values) - 1, len(T_975)) - 1]
    half = t * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def compared(records: Sequence[Record], where: str = "") -> Iterator[tuple[bool, str]]:
    """Yield each pair's row, with True if it is established."""
    for tokens in sorted({r["tokens"] for r in records}):
        for ours, theirs in PAIRS:
            for runs in by_rates(records, tokens, theirs).values():
                if pairs := pairs_of(records, tokens, ours, runs):
                    names = with_rates(ours, pairs[0][0]), with_rates(theirs, runs[0])
                    yield comparison(f"{' | '.join(names)} | {millions(tokens)}{where}", pairs)


def comparisons(lines: Iterable[str]) -> Iterator[str]:
    """The table of pairs of arms with these rows."""
    yield COMPARED
    yield "|---" * 8 + "|"
    yield from lines


def comparison(names: str, pairs: Sequence[tuple[Record, Record]]) -> tuple[bool, str]:
    """The row on a pair of arms, and whether it is established."""
    found, unseen = (leads_of(pairs, text) for text in ("report", "unseen"))
    ends = interval(found)
    sure = ends is not None and len(found) >= ENOUGH_SEEDS and (ends[0] > 0 or ends[1] < 0)
    cells = (
        names,
        f"{fmean(found):.3f}",
        "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}",
        ", ".join(f"{lead:.3f}" for lead in found),
        f"{round(fmean(shares_of(pairs, 'report')))} %",
        spread(unseen, 3) if unseen else "",
    )
    return sure, f"| {' | '.join(cells)} |"


def leads_of(pairs: Sequence[tuple[Record, Record]], text: str) -> list[float]:
    """By how much the first of each pair is closer to the teacher at exactly k, nats.

    Nothing where a run was not measured on this text.
    """
    if not all(a[text] and b[text] for a, b in pairs):
        return []
    return [b[text]["kl_at_k"] - a[text]["kl_at_k"] for a, b in pairs]


def shares_of(pairs: Sequence[tuple[Record, Record]], text: str) -> list[float]:
    """The leads of `leads_of` in percent of the second's KL."""
    found = leads_of(pairs, text)
    return [100 * lead / b[text]["kl_at_k"] for lead, (_, b) in zip(found, pairs, strict=False)]


def goals(records: Sequence[Record], manual: Sequence[Record]) -> Iterator[str]:
    """What SMK was meant to reach, and what it reached by each recipe."""
    yield f"| goal, at exactly 16 experts | {' | '.join(RECIPES.values())} |"
    yield "|---" * (1 + len(RECIPES)) + "|"

    def row(goal: str, cells: Iterable[str]) -> str:
        return f"| {' | '.join((goal, *cells))} |"

    def reached(values: Sequence[float], digits: int, most: float) -> str:
        if not values:
            return "not run"
        return f"{spread(values, digits)}: {'yes' if fmean(values) <= most else 'no'}"

    asked = [(records, "", tokens, goal) for tokens, goal in GOALS.items()]
    asked.append((manual, " on embedded text and Django's manual", *MANUAL_GOAL))
    for study, where, tokens, most in asked:
        runs = [best_runs(study, tokens, OURS + recipe) for recipe in RECIPES]
        found = ([r["report"]["kl_at_k"] for r in part] for part in runs)
        goal = f"KL at {millions(tokens)} tokens{where}: at most {most:.2f}"
        yield row(goal, (reached(kl, 3, most) for kl in found))
    tokens, most = PERPLEXITY_GOAL
    runs = [best_runs(records, tokens, OURS + recipe) for recipe in RECIPES]
    for text, where in (("report", ""), ("unseen", " on unseen sources")):
        found = ([100 * value for value in excess(part, text)] for part in runs)
        goal = f"perplexity at {millions(tokens)} tokens{where}, % above the teacher's"
        yield row(f"{goal}: at most {most:g}", (reached(part, 1, most) for part in found))
    for tokens in sorted({r["tokens"] for r in records}):
        cells = [lead_reached(records, tokens, recipe) for recipe in RECIPES]
        if any(cells):
            goal = f"lead over half-width at {millions(tokens)} tokens, % of its KL"
            yield row(f"{goal}: at least {LEAD_GOAL:.1f}", (cell or "not run" for cell in cells))


def lead_reached(records: Sequence[Record], tokens: int, recipe: str) -> str:
    """SMK's lead over the half-width model in percent, and whether it is as large as it should be.

    It is open where the rival has one rate: a better one could only make the lead smaller.
    """
    rival = f"half-width{recipe}"
    pairs = pairs_of(records, tokens, OURS + recipe, best_runs(records, tokens, rival))
    if not (shares := shares_of(pairs, "report")):
        return ""
    word = "yes" if len(by_rates(records, tokens, rival)) > 1 else "open, one rate"
    return f"{spread(shares, 1)}: {word if fmean(shares) >= LEAD_GOAL else 'no'}"


def rates(records: Sequence[Record], kind: str = "rate") -> Iterator[str]:
    """What every rate gave on the text that rates are chosen on, for arms with several.

    `kind` is `rate`, that of the experts, or `gate_rate`; the other one is that of the recipe.
    """
    other = {"rate": "gate_rate", "gate_rate": "rate"}[kind]
    tried = by_arm([r for r in records if r[other] == 1])
    tried = {key: runs for key, runs in tried.items() if len({r[kind] for r in runs}) > 1}
    factors = sorted({r[kind] for runs in tried.values() for r in runs})
    yield f"| tokens | arm | {' | '.join(f'rate x {factor:g}' for factor in factors)} | chosen |"
    yield f"|{'---|' * (len(factors) + 3)}"
    for (tokens, arm), runs in sorted(tried.items()):
        # A seed that has all rates compares them; others would mix in their own spread.
        shared = set.intersection(
            *({r["seed"] for r in runs if r[kind] == rate} for rate in {r[kind] for r in runs})
        )
        cells = []
        for factor in factors:
            kl = [
                r["choose"]["after"]["forward_kl"]
                for r in runs
                if r[kind] == factor and r["seed"] in shared
            ]
            cells.append(spread(kl, 3) if kl else "")
        cells.append(f"x {best_runs(records, tokens, arm)[0][kind]:g}")
        yield f"| {millions(tokens)} | {arm} | {' | '.join(cells)} |"


def laws(records: Sequence[Record]) -> Iterator[str]:
    """The fitted law of each arm that has several lengths."""
    for arm in ARMS:
        law = law_of(records, arm)
        if law is not None:
            yield f"- **{arm}**: {law.sentence()}"


def budgets(records: Sequence[Record]) -> Iterator[str]:
    """The mean k of deployed students on text that no run reads."""
    yield (
        "| target k | tokens | recipe | text | thresholds | seeds | mean k | off target |"
        " standard error | goal |"
    )
    yield "|---" * 10 + "|"
    mine = [r for r in records if r["arm"] in FOLLOWED and r["rate"] == r["gate_rate"] == 1]
    for target, tokens, arm in sorted({(r["target_k"], r["tokens"], r["arm"]) for r in mine}):
        runs = [r for r in mine if (r["target_k"], r["tokens"], r["arm"]) == (target, tokens, arm)]
        texts = (("report", "mixed"), ("unseen", "unseen sources"))
        for (text, name), (way, words) in itertools.product(texts, WAYS.items()):
            parts = [r[text] if way is None else r[text].get(way) for r in runs if r[text]]
            counted = [part["counted"] for part in parts if part and part.get("counted")]
            if not counted:
                continue
            found = [c["mean_k"] for c in counted]
            error = fmean(c["standard_error"] for c in counted) / target
            off, goal = fmean(found) / target - 1, K_GOALS[text]
            cells = (
                f"{target:g}",
                millions(tokens),
                FOLLOWED[arm],
                name,
                words,
                str(len(found)),
                spread(found, 2),
                f"{off:+.1%}",
                f"{error:.1%}",
                f"{goal:.0%}: {'kept' if abs(off) <= goal else 'missed'}",
            )
            yield f"| {' | '.join(cells)} |".replace("%", " %")
