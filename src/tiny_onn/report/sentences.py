"""Sentences of the report: answers with their numbers, from records alone."""

import math
from collections.abc import Sequence

from tiny_onn.report.comparing import mflops, read_at, same_text
from tiny_onn.report.exact_k import EQUAL_K
from tiny_onn.report.run_data import Record, Run

# The number of last steps over which a sentence averages.
WINDOW = 32
KINDS = (
    ("static", "static choice: always the same experts"),
    ("random", "random routing by a frozen gate"),
    ("oracle", "oracle: the experts of largest true output"),
)


def kind_of(run: Run) -> str:
    """Describe a control in words; empty for a run that is no control."""
    return dict(KINDS).get(run.selection, "")


def state_of(run: Run) -> str:
    """Tell whether the run came to its end."""
    if run.finished:
        return f"The run finished after {run.tokens:,} training tokens."
    done = f"{run.tokens:,} of {run.planned_tokens:,} training tokens"
    if run.summary is None:
        return (
            f"The run has not ended: it recorded {done}. Either it still trains, or it was killed;"
            " `tiny-onn distill --resume --out FOLDER` continues a run that was killed."
        )
    return (
        f"The run was interrupted after {done}; `tiny-onn distill --resume --out FOLDER`"
        " continues it."
    )


def health_of(run: Run) -> str:
    """Tell the verdict of the health check in one sentence."""
    findings, called = run.health["findings"], run.health["verdict"]
    if run.is_control:
        return f"This run is a control to compare with; the health check calls it {called}."
    if run.last is None or run.last["step"] == 0:
        return "It is too early to tell: no evaluation was made after training began."
    if not findings:
        return "Healthy: it learns, every layer works, and no rule of the health check objects."
    count = (
        "one rule of the health check objects"
        if len(findings) == 1
        else f"{len(findings)} rules of the health check object"
    )
    if called == "dead":
        return f"Dead: {count}, and more training with these settings will not mend it."
    return f"Suspicious: {count}; read the findings before you trust the run's numbers."


def learning_of(run: Run) -> str:
    """Tell how far training changed the student's KL."""
    before, last = run.untrained, run.last
    if before is None or last is None or last["step"] == 0:
        return ""
    old, new = before["forward_kl"], last["forward_kl"]
    if not (math.isfinite(old) and math.isfinite(new) and old > 0):
        return f"Its held-out KL to the teacher went from {old:.4g} to {new:.4g} nats per token."
    word = "fell" if new < old else "rose"
    return (
        f"Its held-out KL to the teacher {word} from {old:.4f} to {new:.4f} nats per token"
        f" ({new / old - 1:+.0%}) over {last['tokens']:,} training tokens."
    )


def against_controls(runs: Sequence[Run]) -> list[str]:
    """Compare each run with each control on the same text, at equal compute if that is known."""
    students = [run for run in runs if not run.is_control and run.last is not None]
    controls = [run for run in runs if run.is_control and run.last is not None]
    if not students:
        return []
    if not controls:
        return [
            "There is no control to compare with: name also the folder of a run with"
            ' router.selection = "static" or "random", to see what the trained gate is worth.'
        ]
    return [_against(student, control) for student in students for control in controls]


def _against(student: Run, control: Run) -> str:
    ours, theirs = student.last, control.last
    assert ours is not None
    assert theirs is not None
    if not same_text(ours, theirs):
        return (
            f"{student.name} and {control.name} cannot be compared, because they were evaluated on"
            " different texts."
        )
    point = read_at(student, theirs["mean_k"]) or ours
    kl, control_kl = point["forward_kl"], theirs["forward_kl"]
    surplus = point["mean_k"] / theirs["mean_k"] - 1
    equal = abs(surplus) <= EQUAL_K
    budget = (
        f"at the same {theirs['mean_k']:.2f} active experts per token"
        if equal
        else f"with {point['mean_k']:.2f} active experts per token against"
        f" {theirs['mean_k']:.2f} ({surplus:+.1%}; its frontier would tell at equal compute)"
    )
    word = "beats" if kl < control_kl else "does not beat"
    return (
        f"{student.name} {word} {control.name} {budget}: KL {kl:.4f} against {control_kl:.4f} nats."
    )


def routing_of(run: Run) -> str:
    """Tell how the load is spread and how k varies, on held-out text."""
    last = run.last
    if last is None:
        return "No evaluation was made yet."
    layers = last["layers"]
    shares = sorted(load / max(1, layers["num_tokens"]) for row in layers["load"] for load in row)
    low, high = (shares[round(q * (len(shares) - 1))] for q in (0.1, 0.9))
    dead = sum(share == 0 for share in shares)
    unused = (
        "every expert is used"
        if dead == 0
        else f"{dead:,} of {len(shares):,} experts are used by no token"
    )
    if run.selection == "static":
        unused += ", as a static choice has it"
    return (
        f"On held-out text {unused}; eight experts in ten serve between {low:.0%} and {high:.0%} of"
        f" the tokens. A token has {last['mean_k']:.2f} active experts on average (of"
        f" {run.num_experts}), give or take {last['std_k']:.2f} within a layer; the layers' means"
        f" go from {last['min_layer_k']:.2f} to {last['max_layer_k']:.2f}."
    )


def gate_of(run: Run) -> str:
    """Tell whether the gate agrees with its targets more than a token-blind one would."""
    records = [record["smk"] for record in run.steps if record.get("smk")][-WINDOW:]
    total = sum(smk["num_targets"] for smk in records)
    if not total:
        return "This run's gates do not learn from surprise, so that they have no targets."
    agreement, shuffled, chance = (
        sum(smk[name] * smk["num_targets"] for smk in records) / total
        for name in ("agreement", "shuffled", "chance")
    )
    return (
        f"{_steps(len(records))} the gates' first choice was the target for {agreement:.1%} of the"
        f" tokens. It was another token's target for {shuffled:.1%} of them, and a random candidate"
        f" would be the target for {chance:.1%}."
    )


def _steps(number: int) -> str:
    return "In the only recorded step" if number == 1 else f"In the last {number} recorded steps"


def compute_of(record: Record) -> str:
    """Return the FFN FLOPs with their share of the teacher's."""
    return f"{mflops(record['ffn_flops'])} ({record['ffn_flops'] / record['dense_ffn_flops']:.0%})"
