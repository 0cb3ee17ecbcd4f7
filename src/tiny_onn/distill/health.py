"""Whether a run is alive: what its records say is wrong, and what to do about it.

Agreement, mean k and a falling SMK loss can all look well in a model that is dead, so a verdict
never rests on them: it asks whether the student beats a guess that knows nothing, whether gradients
and surprise exist, and whether the choice of experts depends on the token. Every rule is of the
form "unless it is well", so that NaN counts as ill.

Thresholds are ours, chosen to be far from anything a working run shows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from tiny_onn.config.routing_checks import has_budget
from tiny_onn.config.schema import RunConfig
from tiny_onn.console import say

Record = dict[str, Any]
Severity = Literal["suspicious", "dead"]

# Steps whose records are averaged, and how few are too few for a rate to mean something.
WINDOW = 32
ENOUGH = 16


class Finding(NamedTuple):
    """One thing that is wrong with a run."""

    severity: Severity
    code: str
    """Names the rule; the same for every run."""
    what: str
    """In numbers."""
    advice: str


def diagnose(records: Sequence[Record], config: RunConfig) -> list[Finding]:
    """What is wrong at the end of these records, worst first; none: the run is healthy.

    Judged are the last evaluation against the first, and the last `WINDOW` steps. The evaluation
    before the first step is no evidence against a run: an untrained student may be anything.

    Args:
        records: as `metrics.jsonl` holds them (`docs/metrics.md`), the first evaluation among them.
        config: the run's settings.
    """
    steps = [record for record in records if record["kind"] == "step"][-WINDOW:]
    evaluations = [record for record in records if record["kind"] in ("start", "eval", "end")]
    found = list(_learning(steps, config))
    if evaluations and evaluations[-1]["step"] > 0:
        last = evaluations[-1]
        found += _quality(evaluations[0], last)
        found += _experts(last, config)
    if config.router.selection not in ("static", "random"):
        found += _gates(steps, config)
    return sorted(found, key=lambda finding: finding.severity == "suspicious")


def verdict(findings: Sequence[Finding]) -> dict[str, Any]:
    """`{"verdict": "healthy" | "suspicious" | "dead", "findings": [...]}` for a JSON file."""
    severities = {finding.severity for finding in findings}
    worst = "dead" if "dead" in severities else "suspicious" if severities else "healthy"
    return {"verdict": worst, "findings": [finding._asdict() for finding in findings]}


@dataclass(slots=True)
class HealthWatch:
    """Warns once of each finding while a run goes on. Findings of `records` are not said again."""

    config: RunConfig
    title: str
    records: list[Record]
    _known: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self._known = {finding.code for finding in diagnose(self.records, self.config)}

    def see(self, record: Record) -> None:
        """Take a new record, and warn of what it shows for the first time."""
        steps = sum(kept["kind"] == "step" for kept in self.records)
        if steps > WINDOW:
            oldest = next(i for i, kept in enumerate(self.records) if kept["kind"] == "step")
            del self.records[oldest]
        self.records.append(record)
        for finding in diagnose(self.records, self.config):
            if finding.code not in self._known:
                self._known.add(finding.code)
                kind = f"{finding.severity} ({finding.code})"
                say(f"{self.title}: {kind}: {finding.what}; {finding.advice}")

    def verdict(self) -> dict[str, Any]:
        """The verdict on the records seen so far."""
        return verdict(diagnose(self.records, self.config))


def _quality(first: Record, last: Record) -> Iterator[Finding]:
    """Whether the student beats guesses that know nothing, and its untrained self."""
    soft, uniform = last["forward_kl"] + last["teacher_entropy"], last["uniform_nll"]
    if not soft < uniform:
        yield Finding(
            "dead",
            "above_uniform",
            f"the cross-entropy to the teacher is {soft:.3f} nats, a uniform guess has"
            f" {uniform:.3f}",
            "the student knows less than nothing: lower optim.expert_lr, and see whether the start"
            " was better",
        )
    teacher, student, unigram = (last[f"{n}_nll"] for n in ("teacher", "student", "unigram"))
    if not teacher < unigram:
        yield Finding(
            "suspicious",
            "teacher_above_unigram",
            f"the teacher's own loss is {teacher:.3f} nats, token frequencies alone have"
            f" {unigram:.3f}",
            "it does not know this text: check teacher.path and data.sources, and set"
            ' teacher.quantization = "none" to compare',
        )
    elif not student < unigram:
        yield Finding(
            "dead",
            "above_unigram",
            f"the student's loss is {student:.3f} nats, token frequencies alone have {unigram:.3f}"
            f" and the teacher {teacher:.3f}",
            "it uses no context: train longer, or start from the teacher's neurons (experts.init ="
            ' "importance")',
        )
    before, after = first["forward_kl"], last["forward_kl"]
    if not after <= 1.02 * before:
        yield Finding(
            "suspicious",
            "worse_than_untrained",
            f"the held-out KL is {after:.4f}, it was {before:.4f} before training",
            "training harms it: lower optim.expert_lr and optim.gate_lr",
        )


def _experts(last: Record, config: RunConfig) -> Iterator[Finding]:
    """Whether every layer computes something, and lets the token choose."""
    layers, S = last["layers"], config.experts.num_shared
    num_routed = config.experts.num_experts - S
    silent = [i for i, norm in enumerate(layers["expert_norm"]) if not norm > 0]
    if silent:
        yield Finding(
            "dead",
            "silent_layers",
            f"the expert layers {_few(silent)} put out nothing",
            "their experts are zero or no token has any: check the conversion, or raise"
            " router.target_k",
        )
    if config.router.selection in ("static", "random") or num_routed == 1:
        return
    # Equal when every token has the same experts; then the load's entropy is log k, at any k.
    same = [
        i
        for i, (entropy, k) in enumerate(zip(layers["load_entropy"], layers["mean_k"], strict=True))
        if k - S < 0.95 * num_routed and not math.exp(entropy) > 1.02 * (k - S)
    ]
    if same:
        yield Finding(
            "dead" if 2 * len(same) >= len(layers["load"]) else "suspicious",
            "same_experts",
            f"in the layers {_few(same)} every token has the same experts",
            "the gate does not look at the token: lower optim.gate_lr, or use"
            ' experts.gate_init = "ridge"',
        )
    taken = [i for i, share in enumerate(layers["max_load_share"]) if not share < 0.9]
    if taken:
        yield Finding(
            "dead" if 2 * len(taken) >= len(layers["load"]) else "suspicious",
            "one_expert",
            f"in the layers {_few(taken)} one expert has nine tenths of the load or more",
            "the others cannot learn: lower optim.gate_lr, or balance the load",
        )
    dead = last["dead_experts"] / (num_routed * len(layers["load"]))
    if not dead < 0.25:
        yield Finding(
            "suspicious",
            "dead_experts",
            f"{dead:.0%} of the experts are chosen by no held-out token",
            "their parameters are lost: lower optim.gate_lr, or balance the load",
        )


def _learning(steps: Sequence[Record], config: RunConfig) -> Iterator[Finding]:
    """Whether gradients reach what should learn."""
    if not steps:
        return
    gates = config.router.objective != "none"
    for name, learns in (("expert", True), ("gate", gates)):
        if learns and not any(record[f"{name}_grad_norm"] > 0 for record in steps):
            yield Finding(
                "dead",
                f"no_{name}_gradient",
                f"no gradient reaches the {name}s in {len(steps)} steps",
                "nothing can be learned: see whether loss and surprise are 0",
            )
    if not any(record["loss"] > 0 for record in steps):
        yield Finding(
            "suspicious",
            "no_loss",
            f"the loss is 0 in {len(steps)} steps",
            "the student is the teacher: lower router.target_k to have something to learn",
        )
    smk = [record["smk"] for record in steps if record["smk"] is not None]
    if not smk:
        return
    targets = _mean(record["targets"] for record in smk)
    if not targets > 0.5:
        yield Finding(
            "dead" if not targets > 0.01 else "suspicious",
            "no_targets",
            f"surprise gives {targets:.1%} of the tokens a target",
            "the gate has nothing to learn: surprise is zero or the same for all candidates; choose"
            ' another smk.surprise, or smk.candidates = "all"',
        )


def _gates(steps: Sequence[Record], config: RunConfig) -> Iterator[Finding]:
    """Whether the gates say anything, and keep to their budget."""
    num_routed = config.experts.num_experts - config.experts.num_shared
    if len(steps) < ENOUGH or num_routed == 1:
        return
    most = math.log(num_routed)
    entropy = _mean(record["gate_entropy"] for record in steps)
    ties = _mean(record["tie_rate"] for record in steps)
    if not entropy > 0.02 * most:
        yield Finding(
            "dead",
            "saturated_gates",
            f"the gates' entropy is {entropy:.4f} nats of at most {most:.2f}",
            "their softmax is one-hot and passes no gradient: lower optim.gate_lr",
        )
    if not ties < 0.5:
        yield Finding(
            "dead",
            "tied_gates",
            f"{ties:.0%} of the tokens have a tie between an active and an inactive expert",
            'the gate does not tell experts apart: use experts.gate_init = "ridge", and see that it'
            " learns",
        )
    smk = [record["smk"] for record in steps if record["smk"] is not None]
    total = sum(record["num_targets"] for record in smk)
    if total:
        agreement, shuffled = (
            sum(record[name] * record["num_targets"] for record in smk) / total
            for name in ("agreement", "shuffled")
        )
        # Two standard deviations of a share, as if tokens were independent.
        error = 2 * math.sqrt(max(0.0, shuffled * (1 - shuffled)) / total)
        if not agreement > shuffled + error:
            yield Finding(
                "suspicious",
                "agreement_of_chance",
                f"the gates agree with their targets at {agreement:.1%}, with another token's at"
                f" {shuffled:.1%}",
                "they know the targets' frequencies and nothing of the token: train longer or raise"
                " optim.gate_lr",
            )
    if has_budget(config.router):
        mean_k, target = _mean(record["mean_k"] for record in steps), config.router.target_k
        if not abs(mean_k - target) < 0.1 * target:
            yield Finding(
                "suspicious",
                "k_off_target",
                f"tokens have {mean_k:.2f} experts on average, the target is {target:g}",
                "the student costs something else than asked: lower optim.gate_lr, or raise"
                " router.budget_rate",
            )
    empty = _mean(record["zero_expert_rate"] for record in steps)
    if not empty < 0.1:
        yield Finding(
            "suspicious" if empty < 0.5 else "dead",
            "no_expert",
            f"{empty:.0%} of the tokens have no expert",
            "their layer does nothing: raise router.target_k",
        )


def _mean(values: Any) -> float:  # noqa: ANN401 - an iterable of numbers
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _few(indices: Sequence[int]) -> str:
    shown = ", ".join(str(index) for index in indices[:8])
    return shown if len(indices) <= 8 else f"{shown} and {len(indices) - 8} more"
