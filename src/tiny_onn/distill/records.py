"""The records of `metrics.jsonl`: their fields, and functions that make them from measurements.

The dataclasses define the records. `record_docs.metrics_docs` writes `docs/metrics.md` from their
docstrings, and a test compares the page with the records. A run waits for the device's statistics
only when it makes a record.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tiny_onn.distill.step import StepResult
from tiny_onn.evaluation.compare import Evaluation
from tiny_onn.ops.router_gradient import SurpriseTally
from tiny_onn.routing.statistics import RoutingSummary


@dataclass(frozen=True, kw_only=True, slots=True)
class SmkRecord:
    """The gates' targets from surprise in a step, all layers together (objective `smk` only).

    Agreement is evidence only above `chance` and `shuffled`: a gate that names the same expert for
    every token agrees with targets that are always that expert, and has learned nothing.
    """

    targets: float
    """Share of counted tokens that got a target from surprise; at 0 gates have nothing to learn."""
    num_targets: float
    """Number of tokens with a target, summed over layers."""
    agreement: float
    """Share of tokens with a target whose largest candidate logit is the target's; 0 if no token
    has a target."""
    chance: float
    """Agreement of a candidate drawn at random."""
    shuffled: float
    """Agreement with another token's target, mean over all other tokens of the step and layer."""
    mean_surprise: float
    """Surprise per counted token and expert, in units of the per-token loss; experts that are no
    candidates count as 0, and `gain` has a sign."""
    active_surprise: float
    """Surprise per counted token and active expert, from which `pi` is computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayersRecord:
    """Routing layer by layer: lists over layers, or over layers and experts."""

    num_tokens: int
    """Number of counted tokens."""
    num_first: int
    """Number of documents' first tokens."""
    mean_k: list[float]
    """Active experts per counted token, by layer."""
    std_k: list[float]
    """Standard deviation of the number of active experts over counted tokens, by layer."""
    k_histogram: list[list[int]]
    """Number of counted tokens with 0, 1, ... E active experts, by layer."""
    load: list[list[int]]
    """Number of counted tokens that activated the expert, by layer and expert; 0: a dead expert."""
    load_entropy: list[float]
    """Entropy of the experts' shares of the load, by layer, nats; log E at most."""
    max_load_share: list[float]
    """Largest share of the load that one expert has, by layer."""
    zero_expert_rate: list[float]
    """Share of counted tokens without an active expert, by layer."""
    gate_entropy: list[float]
    """Mean entropy of the softmax of a token's router logits, by layer, nats."""
    tie_rate: list[float]
    """Share of counted tokens whose lowest active logit equals their highest inactive one, by
    layer."""
    first_load: list[list[int]]
    """Number of first tokens that activated the expert, by layer and expert."""
    first_mean_k: list[float]
    """Active experts per first token, by layer."""
    oracle_overlap: list[float] | None = None
    """Share of a token's k active experts that are among the k largest |expert(x)|, by layer;
    evaluations only."""
    oracle_chance: list[float] | None = None
    """Overlap of random sets of the same sizes, by layer; evaluations only."""
    expert_norm: list[float] | None = None
    """Mean norm of an active expert's output, by layer; 0: the layer puts out nothing; evaluations
    only."""
    smk_agreement: list[float] | None = None
    """Value of `smk.agreement` by layer; steps with SMK only."""
    smk_shuffled: list[float] | None = None
    """Value of `smk.shuffled` by layer; steps with SMK only."""
    surprise: list[list[float]] | None = None
    """Mean surprise over counted tokens, by layer and expert; steps with SMK only."""
    active_surprise: list[list[float]] | None = None
    """Mean surprise over the tokens that activated the expert, by layer and expert; 0 if no token
    did; steps with SMK only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateRecord(RoutingSummary):
    """The fields that steps of both stages have."""

    step: int
    """Number of updates so far."""
    tokens: int
    """Number of training tokens so far."""
    expert_grad_norm: float
    """Global L2 norm of the experts' gradients before clipping."""
    gate_grad_norm: float
    """Global L2 norm of the gates' gradients before clipping."""
    lr: list[float]
    """Learning rates, one per parameter group."""
    tokens_per_s: float
    """Training tokens per second of this step."""
    seconds: dict[str, float]
    """Seconds of the step's phases; empty on a GPU, where no phase waits for the device."""
    smk: SmkRecord | None
    """Targets and surprise of the gates; null with other objectives than `smk`."""
    layers: LayersRecord | None
    """Routing by layer, every `train.stats_every_steps`; else null."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord(UpdateRecord):
    """A step of the global stage, written every `train.log_every_steps`.

    Values are means over the tokens that have a label.
    """

    kind: Literal["step"]
    """Always `step`."""
    loss: float
    """The distillation loss, nats per token."""
    forward_kl: float
    """KL(teacher || student), nats per token, whatever the loss is."""
    top1_agreement: float
    """Share of tokens for which teacher and student rank the same next token first."""
    tau: float
    """Entropy of the student's next-token distribution, nats."""
    states_error: float | None
    """Share of the variance of the teacher's hidden states that the student's leave unexplained,
    mean over layers. The total loss contains it times `loss.states_coef`; null if that is 0."""
    pi: float | None
    """Predictive integrity `exp(-alpha ((1 - gamma) loss / tau + gamma smk.active_surprise))` with
    alpha 1 and gamma 0.5; null without SMK. It can mislead: a student that has learned nothing has
    a large tau, and a dead one has no surprise. It is never optimised."""
    loss_chunk_tokens: int
    """Number of tokens whose logits are in memory at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockwiseRecord(UpdateRecord):
    """A step of the blockwise stage, written every `train.log_every_steps`.

    Values are means over counted tokens.
    """

    kind: Literal["blockwise"]
    """Always `blockwise`."""
    loss: float
    """Mean of `errors`."""
    errors: list[float]
    """Squared distance between the outputs of the layer's experts and of the teacher's MLP, both on
    the teacher's MLP input, by layer; in units of the mean square of the MLP's output on the
    calibration text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlocksRecord:
    """Errors of every layer alone on held-out text, before and after the blockwise stage."""

    kind: Literal["blocks"]
    """Always `blocks`."""
    step: int
    """Number of updates so far."""
    tokens: int
    """Number of training tokens so far."""
    errors: list[float]
    """Squared distance as in a step of the blockwise stage, by layer; in units of the mean square
    of the MLP's output on the held-out text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRecord(Evaluation):
    """An evaluation on held-out text, before the first step, between steps and after the last."""

    kind: Literal["start", "eval", "end"]
    """`start` before the first step, `end` after the last one, `eval` between steps."""
    step: int
    """Number of updates so far."""
    tokens: int
    """Number of training tokens so far."""
    layers: LayersRecord
    """Routing by layer."""


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
        lr: Learning rates, one per parameter group.
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


def field_names(cls: type) -> list[str]:
    """Return a record's fields: kind, step and tokens, then own before inherited, then layers."""
    names = [field for base in cls.__mro__ for field in inspect.get_annotations(base)]
    first = [name for name in ("kind", "step", "tokens") if name in names]
    last = [name for name in ("layers",) if name in names]
    return first + [name for name in names if name not in first + last] + last


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
