"""What a run of `arms.py` leaves: its job, its line on the terminal and its place in the table."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tiny_onn.errors import UserError

RECORDS = "arms.jsonl"
# The exit status of a run that a signal stopped, as that of the command line.
INTERRUPTED = 130
# The arm of the recipe; its variants have a comma after this name.
OURS = "smk"
# How the names of a recipe's arms end, and how pages call it: the presets' first, then the same in
# smaller steps, then the one before.
RECIPES = {
    ", muon, features x 16": "by Muon",
    ", muon, features x 16, steps of 1,024": "by Muon, steps of 1,024",
    "": "by AdamW",
}
# Arms whose mean k pages show, with their recipes; a budget that follows each sequence is measured.
FOLLOWED = {OURS + recipe: how for recipe, how in RECIPES.items()} | dict.fromkeys(
    ("smk, k = 8", "smk, k = 24"), RECIPES[""]
)
# The end of the name of an arm whose partition and gates are in the metric of the loss.
LOSS_METRIC = ", loss metric"
# The settings of the rule that teaches a gate.
RULE = "smk."
# These say where the text is and how often a run is saved, which changes no result.
PLACES = ("data.sources", "train.save_every_tokens")
# Older records do not name these settings, which then had these values.
UNNAMED = {"optim.name": "adamw", "loss.states_scale": "layer"}


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


def millions(tokens: float) -> str:
    """A number of tokens for readers, in two digits."""
    return f"{float(f'{tokens / 1e6:.2g}'):,g}M"


def job_of(record: dict[str, Any]) -> Job:
    """The job that left a record."""
    return Job(**{field.name: record[field.name] for field in fields(Job)})


def read_records(path: Path, *, needed: bool = False) -> list[dict[str, Any]]:
    """The lines of a record; none if there is none and none is needed.

    Raises:
        UserError: A line is no JSON object, or a record that is needed is not there.
    """
    if not path.is_file():
        if needed:
            raise UserError(f"{path}: got no file, expected a record; restore it")
        return []
    records = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            records.append(record := json.loads(line))
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(
                f"{path} line {number}: got {line[:20]!r}, expected a JSON object; remove the line"
            )
    return records


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


def by_arm(records: Sequence[dict[str, Any]]) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """The records by tokens and arm."""
    arms: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for record in records:
        arms.setdefault((record["tokens"], record["arm"]), []).append(record)
    return arms


def by_rates(
    records: Sequence[dict[str, Any]], tokens: int, arm: str
) -> dict[tuple[float, float], list[dict[str, Any]]]:
    """An arm's runs, seed by seed, by their rates of the experts and of the gates.

    The rates with the most seeds come first; among equals, those that did best.
    """
    groups: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for record in by_arm(records).get((tokens, arm), []):
        groups.setdefault((record["rate"], record["gate_rate"]), []).append(record)
    ordered = sorted(groups.items(), key=lambda group: (-len(group[1]), chosen_by(group[1])))
    return {rates: sorted(runs, key=lambda run: run["seed"]) for rates, runs in ordered}


def best_runs(records: Sequence[dict[str, Any]], tokens: int, arm: str) -> list[dict[str, Any]]:
    """An arm's runs at the rates that count for it, seed by seed; none if there are no runs.

    For a rival they are those that did best on the text that runs keep out of training, each
    compared with the rates of the most seeds in the seeds that both have. SMK and its variants stay
    at the rates of the most seeds, so that a lead over a rival is rather too small than too large.
    """
    groups = [*by_rates(records, tokens, arm).values()]
    most = groups[0] if groups else []
    if arm.split(",", maxsplit=1)[0] == OURS:
        return most
    usual = {run["seed"]: run for run in most}

    def behind(runs: list[dict[str, Any]]) -> float:
        shared = [run for run in runs if run["seed"] in usual]
        if not shared:
            return math.inf
        gap = chosen_by(shared) - chosen_by([usual[run["seed"]] for run in shared])
        return 0.0 if runs is most else gap

    return min(groups, key=behind, default=[])


def with_rates(arm: str, run: dict[str, Any]) -> str:
    """The name of an arm with the rates of a run, as far as they are not the recipe's."""
    rates = (("rate", run["rate"]), ("the gates' rate", run["gate_rate"]))
    return arm + "".join(f" at {what} x {rate:g}" for what, rate in rates if rate != 1)


def table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Each arm at each of its rates, by tokens and from the least KL at k to the largest.

    An arm of which a run has diverged has no numbers.
    """
    yield (
        "| tokens | arm | seeds | KL, deployed | mean k | KL at k | perplexity at k |"
        " teacher's | KL at k, unseen sources |"
    )
    yield "|---" * 9 + "|"
    lines = []
    for tokens, arm in by_arm(records):
        for runs in by_rates(records, tokens, arm).values():
            reports, unseen = ([r[part] for r in runs] for part in ("report", "unseen"))
            cells = [f"{tokens:,}", with_rates(arm, runs[0]), str(len(runs))]
            if any(has_diverged(run, records) for run in runs):
                cells += ["diverged", *[""] * 5]
                lines.append((tokens, math.inf, cells))
                continue
            kl = [r["kl_at_k"] for r in reports]
            cells += [
                spread([r["forward_kl"] for r in reports], 4),
                spread([r["mean_k"] for r in reports], 2),
                spread(kl, 4),
                spread([r["perplexity_at_k"] for r in reports], 2),
                f"{reports[0]['teacher_perplexity']:.2f}",
                spread([u["kl_at_k"] for u in unseen], 4) if all(unseen) else "",
            ]
            lines.append((tokens, fmean(kl), cells))
    for _, _, cells in sorted(lines):
        yield f"| {' | '.join(cells)} |"


def chosen_by(records: Sequence[dict[str, Any]]) -> float:
    """What a rate is chosen by: the mean KL on the text that runs keep out of training."""
    kl = fmean(record["choose"]["after"]["forward_kl"] for record in records)
    return math.inf if math.isnan(kl) else kl


def has_diverged(record: dict[str, Any], records: Sequence[dict[str, Any]]) -> bool:
    """Whether a run ended with no finite KL, or its optimizer took it away from its teacher.

    A run that ended farther from its teacher than it began was taken there by the rule of its gate,
    which is a result, if one of `records` with the same seed, tokens and rates came nearer and
    differs from it in settings of that rule alone. Else its optimizer is to blame.
    """
    if not math.isfinite(record["choose"]["after"]["forward_kl"]):
        return True
    return gain(record) < 0 and not any(
        gain(other) > 0 and differ_in_rule(record, other) for other in records
    )


def gain(record: dict[str, Any]) -> float:
    """By how much a run came nearer to its teacher, nats; 0 if its start was not measured."""
    before, after = (record["choose"][name] for name in ("before", "after"))
    return 0.0 if before is None else before["forward_kl"] - after["forward_kl"]


def differing(record: dict[str, Any], settings: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """The names of settings that a run did not have so, its values, and these.

    Where its text and its teacher are, on which device it ran and how often it saved do not count.
    """
    had, asked = settings_of(record), settings_of({"settings": settings})
    for name in sorted((had.keys() | asked.keys()) - {*PLACES, "teacher.path", "train.device"}):
        one, other = (values.get(name, "not given") for values in (had, asked))
        if one != other:
            yield name, one, other


def differ_in_rule(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs have different settings of the gate's rule, and are equal in all others."""
    (rule, rest), (other_rule, other_rest) = map(rule_and_rest, (one, other))
    return rule != other_rule and rest == other_rest


def settings_of(record: dict[str, Any]) -> dict[str, str]:
    """The settings of a run by name, each as it was given last."""
    return UNNAMED | dict(setting.split("=", 1) for setting in record["settings"])


def rule_and_rest(record: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """The settings of a run that are of its gate's rule, and the others that matter."""
    settings = settings_of(record)
    rule = {name: value for name, value in settings.items() if name.startswith(RULE)}
    rest = {name: settings[name] for name in settings.keys() - rule.keys() - {*PLACES}}
    return rule, rest
