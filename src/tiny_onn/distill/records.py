"""The records of `metrics.jsonl`, made from measurements; `runs/records.py` defines their fields.

A run waits for the device's statistics only when it makes a record.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from tiny_onn.distill.step import StepResult
from tiny_onn.ops.router_gradient import SurpriseTally
from tiny_onn.runs.records import (
    BlocksRecord,
    BlockwiseRecord,
    Evaluation,
    EvaluationRecord,
    LayersRecord,
    SmkRecord,
    StepRecord,
    UpdateRecord,
    field_names,
)


def step_record(
    result: StepResult,
    *,
    step: int,
    tokens: int,
    lr: Sequence[float],
    tokens_per_s: float,
    loss_chunk_tokens: int,
    with_layers: bool,
) -> dict[str, Any]:
    """Return a step's record, as `StepRecord` or `BlockwiseRecord` defines it.

    The function waits for the device.

    Args:
        result: The step's measurements.
        step: Number of updates so far.
        tokens: Number of training tokens so far.
        lr: Learning rates of the experts, and of the gates if they learn.
        tokens_per_s: Training tokens per second of this step.
        loss_chunk_tokens: Number of tokens whose logits are in memory at once.
        with_layers: Whether the record holds routing by layer too.
    """
    tallies = SurpriseTally.read(result.tallies)
    smk, layers, loss = _smk_record(result, tallies) if tallies else None, None, float(result.loss)
    if with_layers:
        layers = LayersRecord(
            **result.stats.layers(), **result.stats.counts(), **_smk_layers(result, tallies)
        )
    common: dict[str, Any] = {
        "step": step,
        "tokens": tokens,
        "loss": loss,
        "expert_grad_norm": float(result.expert_grad_norm),
        "gate_grad_norm": float(result.gate_grad_norm),
        "lr": list(lr),
        "tokens_per_s": tokens_per_s,
        "seconds": result.seconds,
        "smk": smk,
        "layers": layers,
        **result.stats.summary(),
    }
    if result.error_L is not None:
        errors: list[float] = result.error_L.tolist()
        return _ordered(BlockwiseRecord(kind="blockwise", errors=errors, **common))
    assert result.forward_kl is not None
    assert result.agreement is not None
    assert result.student_entropy is not None
    tau = float(result.student_entropy)
    record = StepRecord(
        kind="step",
        forward_kl=float(result.forward_kl),
        top1_agreement=float(result.agreement),
        tau=tau,
        states_error=None if result.states_error is None else float(result.states_error),
        pi=None if smk is None else predictive_integrity(loss, tau, smk.active_surprise),
        loss_chunk_tokens=loss_chunk_tokens,
        **common,
    )
    return _ordered(record)


def evaluation_record(
    kind: Literal["start", "eval", "end"],
    result: Evaluation,
    layers: dict[str, Any],
    *,
    step: int,
    tokens: int,
) -> dict[str, Any]:
    """Return an evaluation's record, as `EvaluationRecord` defines it, from `evaluate_layers`."""
    record = EvaluationRecord(
        kind=kind,
        step=step,
        tokens=tokens,
        layers=LayersRecord(**layers),
        **result.as_dict(),
    )
    return _ordered(record)


def blocks_record(errors: Sequence[float], *, step: int, tokens: int) -> dict[str, Any]:
    """Return the record of `block_errors`, as `BlocksRecord` defines it."""
    return asdict(BlocksRecord(kind="blocks", step=step, tokens=tokens, errors=list(errors)))


def _ordered(record: UpdateRecord | EvaluationRecord) -> dict[str, Any]:
    """Return the record in the order of `field_names`, with the lists per layer rounded."""
    fields = asdict(record)
    return {name: fields[name] for name in field_names(type(record))} | {
        "layers": _rounded(fields["layers"])
    }


def _rounded(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Return a JSON value with six significant digits per float, because the lists are long."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _smk_record(result: StepResult, tallies: Sequence[SurpriseTally]) -> SmkRecord:
    targets, tokens = (_total(tallies, name) for name in ("num_targets", "num_tokens"))
    active = max(1.0, float(result.stats.load_LE.sum()))
    experts = tallies[0].surprise_E.shape[0]
    return SmkRecord(
        targets=targets / max(1.0, tokens),
        num_targets=targets,
        agreement=_total(tallies, "num_agree") / max(1.0, targets),
        chance=_total(tallies, "chance") / max(1.0, targets),
        shuffled=sum(tally.shuffled_agreements() for tally in tallies) / max(1.0, targets),
        mean_surprise=_total(tallies, "surprise_E") / max(1.0, tokens * experts),
        active_surprise=_total(tallies, "active_surprise_E") / active,
    )


def _smk_layers(result: StepResult, tallies: Sequence[SurpriseTally]) -> dict[str, Any]:
    """Return the fields of `LayersRecord` that SMK fills."""
    num_tokens = max(1, int(result.stats.num_tokens))
    if not tallies:
        return {}
    num_targets = [max(1.0, float(tally.num_targets)) for tally in tallies]
    pairs = list(zip(tallies, num_targets, strict=True))
    active = [
        (tally.active_surprise_E / load_E.clamp_min(1)).tolist()
        for tally, load_E in zip(tallies, result.stats.load_LE.cpu(), strict=True)
    ]
    return {
        "smk_agreement": [float(tally.num_agree) / n for tally, n in pairs],
        "smk_shuffled": [tally.shuffled_agreements() / n for tally, n in pairs],
        "surprise": [(tally.surprise_E / num_tokens).tolist() for tally in tallies],
        "active_surprise": active,
    }


def _total(tallies: Sequence[SurpriseTally], name: str) -> float:
    return sum(float(getattr(tally, name).sum()) for tally in tallies)


# Predictive integrity keeps the constants with which the project introduced it.
ALPHA = 1.0
GAMMA = 0.5


def predictive_integrity(loss: float, tau: float, surprise: float) -> float:
    """Return `exp(-alpha * ((1 - gamma) * loss / tau + gamma * surprise))`.

    The value is 1 without loss and surprise. It is reported and never optimised, because it can
    mislead: a student that has learned nothing has a large tau, which excuses its loss, and a dead
    one has no surprise at all. It should be read beside its loss, tau and surprise. Values of two
    kinds of surprise, or of two losses, do not compare; `gain` has a sign and may lift the value
    above 1.

    Args:
        loss: The step's loss, nats per token.
        tau: The entropy of the student's next-token distribution, nats, mean over the same tokens.
        surprise: The mean surprise over active pairs of token and expert, in units of the per-token
            loss.

    Returns:
        0 for a positive loss at a tau of 0.
    """
    ratio = loss / tau if tau > 0 else (math.inf if loss > 0 else 0.0)
    exponent = -ALPHA * ((1 - GAMMA) * ratio + GAMMA * surprise)
    # The exponential of more than 700 does not fit a float; only a negative surprise exceeds it.
    return math.exp(min(exponent, 700.0))
