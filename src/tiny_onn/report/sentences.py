"""What a report says in words: answers with their numbers, from records alone."""

import math
from collections.abc import Iterable, Sequence

from tiny_onn.report.comparing import EQUAL_K, at_k, mflops, points_of, same_text
from tiny_onn.report.run_data import Record, Run

# Steps whose mean a sentence tells.
WINDOW = 32
KINDS = (
    ("static", "static choice: always the same experts"),
    ("random", "random routing by a frozen gate"),
    ("oracle", "oracle: the experts of largest true output"),
)


def kind_of(run: Run) -> str:
    """What a control is, in words; empty for a run that is none."""
    return dict(KINDS).get(run.selection, "")


def state_of(run: Run) -> str:
    """Whether the run came to its end."""
    if run.finished:
        return f"The run finished after {run.tokens:,} training tokens."
    done = f"{run.tokens:,} of {run.planned_tokens:,} training tokens"
    if run.summary is None:
        return (
            f"The run has not ended: it recorded {done}. It goes on elsewhere, or it was cut off;"
            " then `tiny-onn distill --resume --out FOLDER` continues it."
        )
    return (
        f"The run was interrupted after {done}; `tiny-onn distill --resume --out FOLDER`"
        " continues it."
    )


def health_of(run: Run) -> str:
    """The verdict as one sentence."""
    findings, called = run.health["findings"], run.health["verdict"]
    if run.is_control:
        return f"A control, which is there to be beaten; the health check calls it {called}."
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
        return f"Dead: {count}, and more of the same training will not mend it."
    return f"Suspicious: {count}; look before you trust its numbers."


def learning_of(run: Run) -> str:
    """How far training moved the student from where it began."""
    before, last = run.untrained, run.last
    if before is None or last is None or last["step"] == 0:
        return ""
    old, new = before["forward_kl"], last["forward_kl"]
    if not (math.isfinite(old) and math.isfinite(new) and old > 0):
        return f"Its held-out KL to the teacher went from {old:.4g} to {new:.4g} nats a token."
    word = "fell" if new < old else "rose"
    return (
        f"Its held-out KL to the teacher {word} from {old:.4f} to {new:.4f} nats a token"
        f" ({new / old - 1:+.0%}) over {last['tokens']:,} training tokens."
    )


def against_controls(runs: Sequence[Run]) -> list[str]:
    """Each run against each control on the same text, at equal compute where that is known."""
    students = [run for run in runs if not run.is_control and run.last is not None]
    controls = [run for run in runs if run.is_control and run.last is not None]
    if not students:
        return []
    if not controls:
        return [
            "No control stands beside it: give the folder of a run with"
            ' router.selection = "static" or "random" too, to see what the trained gate is worth.'
        ]
    return [_against(student, control) for student in students for control in controls]


def _against(student: Run, control: Run) -> str:
    ours, theirs = student.last, control.last
    assert ours is not None
    assert theirs is not None
    if not same_text(ours, theirs):
        return f"{student.name} and {control.name} were evaluated on other texts: no comparison."
    found = at_k(points_of(student), theirs["mean_k"]) or ours
    kl, other = found["forward_kl"], theirs["forward_kl"]
    surplus = found["mean_k"] / theirs["mean_k"] - 1
    equal = abs(surplus) <= EQUAL_K
    where = (
        f"at the same {theirs['mean_k']:.2f} active experts a token"
        if equal
        else f"with {found['mean_k']:.2f} active experts a token against {theirs['mean_k']:.2f}"
        f" ({surplus:+.1%}; its frontier would tell at equal compute)"
    )
    word = "beats" if kl < other else "does not beat"
    return f"{student.name} {word} {control.name} {where}: KL {kl:.4f} against {other:.4f} nats."


def routing_of(run: Run) -> str:
    """How the load is spread and how k varies, on held-out text."""
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
    """Whether the gate agrees with its targets more than a blind one would."""
    said = [record["smk"] for record in run.steps if record.get("smk")][-WINDOW:]
    total = sum(smk["num_targets"] for smk in said)
    if not total:
        return "This run's gates learn from no surprise, so that there is nothing to agree with."
    agreement, shuffled, chance = (
        sum(smk[name] * smk["num_targets"] for smk in said) / total
        for name in ("agreement", "shuffled", "chance")
    )
    return (
        f"{_steps(len(said))} the gates' first choice was the target of"
        f" {agreement:.1%} of the tokens; with another token's target it agrees at {shuffled:.1%},"
        f" and a random candidate at {chance:.1%}."
    )


def _steps(number: int) -> str:
    return "In the only recorded step" if number == 1 else f"In the last {number} recorded steps"


def compute_of(record: Record) -> str:
    """FFN FLOPs with their share of the teacher's."""
    return f"{mflops(record['ffn_flops'])} ({record['ffn_flops'] / record['dense_ffn_flops']:.0%})"


def joined(sentences: Iterable[str]) -> str:
    """The sentences that say something, one after the other."""
    return " ".join(sentence for sentence in sentences if sentence)
