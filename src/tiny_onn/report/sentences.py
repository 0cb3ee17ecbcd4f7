"""Sentences of the report: answers with their numbers, from records alone."""

import math
from collections.abc import Sequence

from tiny_onn.report.comparing import interval_at, mflops, read_at, same_text
from tiny_onn.report.exact_k import EQUAL_K
from tiny_onn.report.run_data import Record, Run, token_blind_layers

# The number of last steps over which a sentence averages.
WINDOW = 32
# A gate that meets its targets less often than this many times another token's knows little.
LITTLE = 1.2
# A spread of k below this is a rounding of equal numbers.
FIXED_K = 0.005
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
    share = run.tokens / max(1, run.planned_tokens)
    done = f"{run.tokens:,} of {run.planned_tokens:,} training tokens ({share:.0%})"
    if run.process == "trains":
        return f"The run still trains: {done} were recorded when this page was written."
    what = {
        "lost": "'s process ended without saving after",
        "silent": f" is on another machine and gives no news since {run.news}, when it had done",
    }.get(run.process, " was stopped after")
    ended = "If it has ended, go on with" if run.process == "silent" else "To go on:"
    return (
        f"The run{what} {done}. {ended} `tiny-onn distill --resume --out FOLDER`, with the"
        f" path of this run's folder, `{run.name}`."
    )


def status_of(run: Run) -> str:
    """Return the name of a verdict's colour, in which only a finished run is healthy."""
    if run.is_control:
        return "control"
    called = run.health["verdict"]
    return "early" if called == "healthy" and not (run.finished and run.was_judged) else called


def health_of(run: Run) -> str:
    """Tell the verdict of the health check, after the state of an unfinished run."""
    if run.finished or run.is_control:
        return _verdict_of(run)
    state = {
        "ended": "Stopped",
        "trains": "Still training",
        "lost": "Killed",
        "silent": f"No news since {run.news}",
    }[run.process]
    verdict = _verdict_of(run)
    return f"{state}. {verdict.replace(':', ' so far:', 1) if run.was_judged else verdict}"


def _verdict_of(run: Run) -> str:
    findings, called = run.health["findings"], run.health["verdict"]
    if run.is_control:
        return f"This run is a control to compare with; the health check calls it {called}."
    if not run.was_judged:
        return "It is too early to tell its health: no evaluation was made after training began."
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
        f" ({new / old - 1:+.0%}){_measured_at(run, last)}."
    )


def _measured_at(run: Run, last: Record) -> str:
    same = last["tokens"] == run.tokens
    return "" if same else f", as measured after {last['tokens']:,} training tokens"


def against_controls(runs: Sequence[Run]) -> list[str]:
    """Compare each run with each control on the same text, at equal compute if that is known."""
    students = [run for run in runs if not run.is_control and run.last is not None]
    controls = [run for run in runs if run.is_control and run.last is not None]
    if not students:
        return []
    if not controls:
        return [
            "There is no control to compare with, so that this page cannot tell. A control is a run"
            " with the same settings but `--set router.selection=static --set"
            " router.objective=none`, or random for static. `tiny-onn report RUN CONTROL` compares."
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
    if not student.was_judged:
        return (
            f"{student.name} was not evaluated since its training began, so that nothing can be"
            f" said yet about it and {control.name}."
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
    word, chance = _told_apart(kl, control_kl, interval_at(point))
    unequal = (
        ""
        if ours["tokens"] == theirs["tokens"]
        else " They did not train equally long:"
        f" {ours['tokens']:,} and {theirs['tokens']:,} tokens."
    )
    return (
        f"{student.name} {word} {control.name} {budget}: KL {kl:.4f} against {control_kl:.4f}"
        f" nats{chance}.{unequal}"
    )


def _told_apart(kl: float, other: float, interval: Sequence[float] | None) -> tuple[str, str]:
    """Return the verb for a KL against another one, and where that one lies in its interval."""
    if interval is None:
        verb = "beats" if kl < other else "does not beat"
        return verb, " (no interval was measured, so that chance may explain a small difference)"
    low, high = interval
    inside = low <= other <= high
    verb = "cannot be told apart from" if inside else "beats" if kl < other else "loses to"
    return verb, (
        f"; the latter lies {'inside' if inside else 'outside'} the student's 95 % interval over"
        f" documents, {low:.4f} to {high:.4f}"
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
        f"{_choice_of(run, last)} On held-out text {unused}; eight experts in ten serve between"
        f" {low:.0%} and {high:.0%} of the tokens. A token has {last['mean_k']:.2f} active experts"
        f" on average (of {run.num_experts}), give or take {last['std_k']:.2f} within a"
        f" layer; the layers' means go from {last['min_layer_k']:.2f} to {last['max_layer_k']:.2f}."
    )


def _choice_of(run: Run, last: Record) -> str:
    """Tell whether the experts, and their number, depend on the token."""
    layers = last["layers"]
    num_layers = len(layers["load"])
    varied = num_layers - len(token_blind_layers(layers, run.num_shared, run.num_experts))
    untrained = " This is the routing before training." if last["step"] == 0 else ""
    if varied == 0:
        return f"Every token has the same experts, in every layer.{untrained}"
    if varied < num_layers:
        return (
            f"Which experts a token has depends on the token in {varied} of {num_layers} layers;"
            f" in the others every token has the same experts.{untrained}"
        )
    number = (
        "their number is always the same" if last["std_k"] < FIXED_K else "so does their number"
    )
    return (
        f"Which experts a token has depends on the token in every layer, and {number}.{untrained}"
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
    # Two standard errors of a share of independent tokens, as the health check takes them.
    known = agreement > shuffled + 2 * math.sqrt(max(0.0, shuffled * (1 - shuffled)) / total)
    knowledge = (
        f"The gates know {'something' if agreement > LITTLE * shuffled else 'little'} about the"
        " token."
        if known
        else "The gates know how popular experts are, and nothing about the token."
    )
    return (
        f"{knowledge} {_steps(len(records))} the gates' first choice was the target for"
        f" {agreement:.1%} of the tokens. It was another token's target for {shuffled:.1%} of them,"
        f" and a random candidate would be the target for {chance:.1%}."
    )


def _steps(number: int) -> str:
    return "In the only recorded step" if number == 1 else f"In the last {number} recorded steps"


def compute_of(record: Record) -> str:
    """Return the FFN FLOPs with their share of the teacher's."""
    return f"{mflops(record['ffn_flops'])} ({record['ffn_flops'] / record['dense_ffn_flops']:.0%})"
