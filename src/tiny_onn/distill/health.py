"""The health of a run: faults that its records show, each with a remedy.

Agreement, mean k and a falling SMK loss can all look well in a model that is dead, so that no
verdict rests on them. A verdict asks whether the student beats a guess without any knowledge,
whether there are gradients and surprise, and whether the choice of experts depends on the token.
Every rule has the form "report, unless the value is good", so that NaN is reported.

The thresholds are the project's own, and lie far from the values of any working run.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from tiny_onn.config.routing_checks import has_budget
from tiny_onn.config.schema import RunConfig
from tiny_onn.console import say
from tiny_onn.report.evaluation import budget_advice
from tiny_onn.report.run_data import token_blind_layers

Record = dict[str, Any]
Severity = Literal["suspicious", "dead"]

# The records of the last WINDOW steps are averaged; rates need at least ENOUGH of them.
WINDOW = 32
ENOUGH = 16
# The share by which the mean number of experts on held-out text may miss its budget.
BUDGET_TOLERANCE = 0.02


class Finding(NamedTuple):
    """A fault of a run."""

    severity: Severity
    code: str
    """The name of the rule, the same in every run."""
    what: str
    """The fault in numbers."""
    advice: str
    """The likely cause, and a remedy."""


def diagnose(records: Sequence[Record], config: RunConfig) -> list[Finding]:
    """Return the faults that these records show at their end, the worst first.

    The last evaluation is compared with the first, and the last `WINDOW` steps are judged. An
    evaluation before the first step shows no fault, because an untrained student may be anything.

    Args:
        records: The records of `metrics.jsonl` (`docs/metrics.md`) with the first evaluation.
        config: The run's settings.
    """
    steps = [record for record in records if record["kind"] == "step"][-WINDOW:]
    evaluations = [record for record in records if record["kind"] in ("start", "eval", "end")]
    findings = list(_learning(steps, config))
    if evaluations and evaluations[-1]["step"] > 0:
        last = evaluations[-1]
        findings += _quality(evaluations[0], last, config)
        findings += _experts(last, config)
        findings += _held_out_budget(last, config)
    if config.router.selection not in ("static", "random"):
        findings += _gates(steps, config)
    return sorted(findings, key=lambda finding: finding.severity == "suspicious")


def verdict(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return `{"verdict": "healthy" | "suspicious" | "dead", "findings": [...]}` as JSON values."""
    severities = {finding.severity for finding in findings}
    worst = "dead" if "dead" in severities else "suspicious" if severities else "healthy"
    return {"verdict": worst, "findings": [finding._asdict() for finding in findings]}


@dataclass(slots=True)
class HealthWatch:
    """A watch over a running run, which warns once of each finding.

    Findings of the `records` that it begins with are not repeated.
    """

    config: RunConfig
    title: str
    records: list[Record]
    _known: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self._known = {finding.code for finding in diagnose(self.records, self.config)}

    def observe(self, record: Record) -> None:
        """Add a record, and warn of findings that it shows for the first time."""
        steps = [i for i, earlier in enumerate(self.records) if earlier["kind"] == "step"]
        if len(steps) > WINDOW:
            del self.records[steps[0]]
        self.records.append(record)
        for finding in diagnose(self.records, self.config):
            if finding.code not in self._known:
                self._known.add(finding.code)
                kind = f"{finding.severity} ({finding.code})"
                say(f"{self.title}: {kind}: {finding.what}; {finding.advice}")

    def verdict(self) -> dict[str, Any]:
        """Return the verdict on the records so far."""
        return verdict(diagnose(self.records, self.config))


def _quality(first: Record, last: Record, config: RunConfig) -> Iterator[Finding]:
    """Yield a finding if the student is worse than blind guesses or than before training."""
    cross_entropy, uniform = last["forward_kl"] + last["teacher_entropy"], last["uniform_nll"]
    if not cross_entropy < uniform:
        yield Finding(
            "dead",
            "above_uniform",
            f"the cross-entropy to the teacher is {cross_entropy:.3f} nats, a uniform guess has"
            f" {uniform:.3f}",
            "the student predicts worse than a blind guess: lower optim.expert_lr, and see whether"
            " the start was better",
        )
    teacher, student, unigram = (last[f"{n}_nll"] for n in ("teacher", "student", "unigram"))
    if not teacher < unigram:
        yield Finding(
            "suspicious",
            "teacher_above_unigram",
            f"the teacher's own loss is {teacher:.3f} nats, token frequencies alone have"
            f" {unigram:.3f}",
            "the teacher does not know this text: check teacher.path and data.sources, and set"
            ' teacher.quantization = "none" to compare',
        )
    elif not student < unigram:
        if first["student_nll"] < unigram:
            advice = (
                "the student used context before training and lost it: lower optim.expert_lr and"
                " optim.gate_lr"
            )
        elif config.router.selection == "random":
            advice = (
                "this control chooses experts at random: it shows what other runs gain over that"
            )
        else:
            advice = (
                "the student uses no context: train longer, or start from the teacher's neurons"
                ' (experts.init = "importance")'
            )
        yield Finding(
            "dead",
            "above_unigram",
            f"the student's loss is {student:.3f} nats, token frequencies alone have {unigram:.3f}"
            f" and the teacher {teacher:.3f}",
            advice,
        )
    before, after = first["forward_kl"], last["forward_kl"]
    if not after <= 1.02 * before:
        yield Finding(
            "suspicious",
            "worse_than_untrained",
            f"the held-out KL is {after:.4f}, it was {before:.4f} before training",
            "training harms the student: lower optim.expert_lr and optim.gate_lr",
        )


def _experts(last: Record, config: RunConfig) -> Iterator[Finding]:
    """Yield a finding if layers put out nothing, or their experts do not depend on the token."""
    layers, S = last["layers"], config.experts.num_shared
    num_routed = config.experts.num_experts - S
    silent = [i for i, norm in enumerate(layers["expert_norm"]) if not norm > 0]
    if silent:
        yield Finding(
            "dead",
            "silent_layers",
            f"the expert layers {_enumerated(silent)} put out nothing",
            "their experts are zero or no token has any: check the conversion, or raise"
            " router.target_k",
        )
    if config.router.selection in ("static", "random") or num_routed == 1:
        return
    same = token_blind_layers(layers, S, config.experts.num_experts)
    if same:
        yield Finding(
            "dead" if 2 * len(same) >= len(layers["load"]) else "suspicious",
            "same_experts",
            f"in the layers {_enumerated(same)} every token has the same experts",
            "the gate does not look at the token: lower optim.gate_lr, or use"
            ' experts.gate_init = "ridge"',
        )
    dominated = [i for i, share in enumerate(layers["max_load_share"]) if not share < 0.9]
    if dominated:
        yield Finding(
            "dead" if 2 * len(dominated) >= len(layers["load"]) else "suspicious",
            "one_expert",
            f"in the layers {_enumerated(dominated)} one expert has nine tenths of the load or"
            " more",
            "the others cannot learn: lower optim.gate_lr, or balance the load",
        )
    dead = last["dead_experts"] / (num_routed * len(layers["load"]))
    if not dead < 0.25:
        yield Finding(
            "suspicious",
            "dead_experts",
            f"{dead:.0%} of the experts are chosen by no held-out token",
            "their parameters do nothing: lower optim.gate_lr, or balance the load",
        )


def _held_out_budget(last: Record, config: RunConfig) -> Iterator[Finding]:
    """Yield a finding if held-out text misses its budget by more than chance explains."""
    error, target = last.get("k_error"), config.router.target_k
    if error is None or not has_budget(config.router):
        return
    missed = abs(last["mean_k"] - target)
    # Two standard errors of a few documents may be more than the tolerance.
    if not missed < max(BUDGET_TOLERANCE * target, 2 * error):
        yield Finding(
            "suspicious",
            "held_out_k",
            f"held-out tokens have {last['mean_k']:.2f} experts on average, with a standard error"
            f" of {error:.2f} over documents; the target is {target:g}",
            budget_advice(config),
        )


def _learning(steps: Sequence[Record], config: RunConfig) -> Iterator[Finding]:
    """Yield a finding if experts or gates get no gradient, or have no loss or no targets."""
    if not steps:
        return
    gates_learn = config.router.objective != "none"
    for name, learns in (("expert", True), ("gate", gates_learn)):
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
            "the student equals the teacher: lower router.target_k to have something to learn",
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
    """Yield a finding if gates do not tell experts or tokens apart, or miss their budget."""
    num_routed = config.experts.num_experts - config.experts.num_shared
    if len(steps) < ENOUGH or num_routed == 1:
        return
    max_entropy = math.log(num_routed)
    entropy = _mean(record["gate_entropy"] for record in steps)
    ties = _mean(record["tie_rate"] for record in steps)
    if not entropy > 0.02 * max_entropy:
        yield Finding(
            "dead",
            "saturated_gates",
            f"the gates' entropy is {entropy:.4f} nats of at most {max_entropy:.2f}",
            "their softmax is one-hot and passes no gradient: lower optim.gate_lr",
        )
    if not ties < 0.5:
        yield Finding(
            "dead",
            "tied_gates",
            f"{ties:.0%} of the tokens have a tie between an active and an inactive expert",
            'the gates do not tell experts apart: use experts.gate_init = "ridge", and check that'
            " they learn",
        )
    smk = [record["smk"] for record in steps if record["smk"] is not None]
    total = sum(record["num_targets"] for record in smk)
    if total:
        agreement, shuffled = (
            sum(record[name] * record["num_targets"] for record in smk) / total
            for name in ("agreement", "shuffled")
        )
        # These are two standard deviations of a share of independent tokens.
        error = 2 * math.sqrt(max(0.0, shuffled * (1 - shuffled)) / total)
        if not agreement > shuffled + error:
            yield Finding(
                "suspicious",
                "agreement_of_chance",
                f"the gates agree with their targets at {agreement:.1%}, with another token's at"
                f" {shuffled:.1%}",
                "the gates know how frequent targets are, and nothing of the token: train longer or"
                " raise optim.gate_lr",
            )
    if has_budget(config.router):
        mean_k, target = _mean(record["mean_k"] for record in steps), config.router.target_k
        if not abs(mean_k - target) < 0.1 * target:
            yield Finding(
                "suspicious",
                "k_off_target",
                f"tokens have {mean_k:.2f} experts on average in the last {len(steps)} steps, the"
                f" target is {target:g}",
                "the student does not cost what was asked for: lower optim.gate_lr, or raise"
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


def _enumerated(indices: Sequence[int]) -> str:
    first = ", ".join(str(index) for index in indices[:8])
    return first if len(indices) <= 8 else f"{first} and {len(indices) - 8} more"
