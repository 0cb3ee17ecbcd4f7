"""The records of `metrics.jsonl`: what they hold, and their making from a step or an evaluation.

The dataclasses here are the layout; `metrics_docs` writes `docs/metrics.md` from their docstrings,
and a test holds page and records to each other. Making a record is where a run waits for the
device; no step does so for statistics.
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
    """What surprise said to the gates in a step, all layers together (objective `smk` only).

    Agreement means something only above `chance` and `shuffled`: a gate that always says the same
    expert agrees with targets that always are that expert, and knows nothing.
    """

    targets: float
    """Share of counted tokens whose surprise gave a target; 0: there is nothing to learn from."""
    num_targets: float
    """Tokens with a target, summed over layers."""
    agreement: float
    """Share of tokens with a target whose largest candidate logit is at it; 0 without any."""
    chance: float
    """The agreement of a random candidate."""
    shuffled: float
    """The agreement with another token's target, mean over all others of the step and layer."""
    mean_surprise: float
    """Surprise per counted token and expert, 0 for experts that are no candidates; in units of the
    per-token loss, and signed for `gain`."""
    active_surprise: float
    """Surprise per counted token and active expert: the surprise of `pi`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayersRecord:
    """What routers did layer by layer: lists over layers, or over layers and experts."""

    num_tokens: int
    """Counted tokens."""
    num_first: int
    """First tokens of documents."""
    mean_k: list[float]
    """Per layer: active experts per counted token."""
    std_k: list[float]
    """Per layer: their standard deviation over tokens."""
    k_histogram: list[list[int]]
    """Per layer: counted tokens with 0, 1, ... E active experts."""
    load: list[list[int]]
    """Per layer and expert: counted tokens that activated it; 0: a dead expert."""
    load_entropy: list[float]
    """Per layer: entropy of the experts' shares of the load, nats; log E at most."""
    max_load_share: list[float]
    """Per layer: the largest of those shares."""
    zero_expert_rate: list[float]
    """Per layer: share of counted tokens without an active expert."""
    gate_entropy: list[float]
    """Per layer: mean entropy of the softmax of a token's router logits, nats."""
    tie_rate: list[float]
    """Per layer: share of counted tokens with a tie at the border."""
    first_load: list[list[int]]
    """Per layer and expert: first tokens that activated it."""
    first_mean_k: list[float]
    """Per layer: active experts per first token."""
    oracle_overlap: list[float] | None = None
    """Evaluations, per layer: share of the active experts among the k largest |expert(x)|."""
    oracle_chance: list[float] | None = None
    """Evaluations, per layer: the overlap of random sets of the same sizes."""
    expert_norm: list[float] | None = None
    """Evaluations, per layer: mean norm of an active expert's output; 0: the layer is silent."""
    smk_agreement: list[float] | None = None
    """Steps with SMK, per layer: `smk.agreement`."""
    smk_shuffled: list[float] | None = None
    """Steps with SMK, per layer: `smk.shuffled`."""
    surprise: list[list[float]] | None = None
    """Steps with SMK, per layer and expert: mean surprise over counted tokens."""
    active_surprise: list[list[float]] | None = None
    """Steps with SMK, per layer and expert: mean surprise over those that activated it; 0 if none
    did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateRecord(RoutingSummary):
    """What the steps of both stages have."""

    step: int
    """Updates so far."""
    tokens: int
    """Training tokens so far."""
    expert_grad_norm: float
    """Of the experts' gradients together, before clipping."""
    gate_grad_norm: float
    """The same of the gates'."""
    lr: list[float]
    """Learning rates, one per parameter group."""
    tokens_per_s: float
    """Training tokens per second of this step."""
    seconds: dict[str, float]
    """Time of the step's phases; empty on a GPU, where nothing waits for them."""
    smk: SmkRecord | None
    """What surprise said; null with other objectives."""
    layers: LayersRecord | None
    """Layer by layer, every `train.stats_every_steps`; else null."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord(UpdateRecord):
    """One step, every `train.log_every_steps`; means over the tokens that have a label."""

    kind: Literal["step"]
    """Always `step`."""
    loss: float
    """The distillation loss, nats per token."""
    forward_kl: float
    """KL(teacher || student), nats per token, whatever the loss is."""
    top1_agreement: float
    """Share of tokens for which both rank the same next token first."""
    tau: float
    """Entropy of the student's next-token distribution, nats."""
    states_error: float | None
    """Share of the teacher's hidden states' variance that the student's leave unexplained, mean
    over layers; `loss.states_coef` times it is in the gradient. Null where that is 0."""
    pi: float | None
    """`exp(-alpha ((1 - gamma) loss / tau + gamma smk.active_surprise))`, alpha 1, gamma 0.5; null
    without SMK. It can mislead: a student that knows nothing has a large tau, a dead one no
    surprise. Never optimised."""
    loss_chunk_tokens: int
    """Tokens whose logits existed at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockwiseRecord(UpdateRecord):
    """One step of the blockwise stage, every `train.log_every_steps`; means over counted tokens."""

    kind: Literal["blockwise"]
    """Always `blockwise`."""
    loss: float
    """Mean of `errors`."""
    errors: list[float]
    """Per layer: squared distance to the teacher's MLP output from the teacher's own MLP input, in
    units of that output's mean square on the calibration text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlocksRecord:
    """Every layer alone on held-out text, before and after the blockwise stage."""

    kind: Literal["blocks"]
    """Always `blocks`."""
    step: int
    """Updates so far."""
    tokens: int
    """Training tokens so far."""
    errors: list[float]
    """Per layer: as in a step of the stage, in units of the mean square on this very text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRecord(Evaluation):
    """An evaluation on held-out text, before the first step, between steps and after the last."""

    kind: Literal["start", "eval", "end"]
    """When it was."""
    step: int
    """Updates so far."""
    tokens: int
    """Training tokens so far."""
    layers: LayersRecord
    """Layer by layer."""


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
    """A step's record, as `StepRecord` or `BlockwiseRecord` lays it out. Waits for the device.

    Args:
        result: what the step measured.
        step: updates so far.
        tokens: training tokens so far.
        lr: learning rates.
        tokens_per_s: of this step.
        loss_chunk_tokens: tokens whose logits existed at once.
        with_layers: whether to say it layer by layer too.
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
    """An evaluation's record, as `EvaluationRecord` lays it out, from `evaluate_layers`."""
    record = EvaluationRecord(
        kind=kind,
        step=step,
        tokens=tokens,
        layers=LayersRecord(**layers),
        **result.as_dict(),
    )
    return _ordered(record)


def blocks_record(errors: Sequence[float], *, step: int, tokens: int) -> dict[str, Any]:
    """The record of `block_errors`, as `BlocksRecord` lays it out."""
    return asdict(BlocksRecord(kind="blocks", step=step, tokens=tokens, errors=list(errors)))


def _ordered(record: UpdateRecord | EvaluationRecord) -> dict[str, Any]:
    """The record in the order of `_names`, lists per layer rounded."""
    fields = asdict(record)
    return {name: fields[name] for name in _names(type(record))} | {
        "layers": _rounded(fields["layers"])
    }


def _names(cls: type) -> list[str]:
    """A record's fields: what names it first, then a class's own before its base's, lists last."""
    names = [field for base in cls.__mro__ for field in inspect.get_annotations(base)]
    first = [name for name in ("kind", "step", "tokens") if name in names]
    last = [name for name in ("layers",) if name in names]
    return first + [name for name in names if name not in first + last] + last


def _rounded(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """The same with every float to six significant digits: lists are long."""
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
    """The fields of `LayersRecord` that SMK fills."""
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


# Constants of the project's lineage.
ALPHA = 1.0


GAMMA = 0.5


def predictive_integrity(loss: float, tau: float, surprise: float) -> float:
    """`exp(-alpha * ((1 - gamma) * loss / tau + gamma * surprise))`: 1 without loss and surprise.

    Reported, never optimised: it can mislead. A student that knows nothing has a large tau, which
    excuses its loss; a dead one has no surprise at all. A PI without its loss, tau and surprise
    beside it says little, and PIs of two kinds of surprise, or of two losses, do not compare:
    `gain` has a sign and may lift PI above 1.

    Args:
        loss: the step's loss, nats per token.
        tau: entropy of the student's next-token distribution, nats, mean over the same tokens.
        surprise: mean over the active pairs of token and expert, in units of the per-token loss.

    Returns:
        0 for a positive loss at a tau of 0.
    """
    ratio = loss / tau if tau > 0 else (math.inf if loss > 0 else 0.0)
    exponent = -ALPHA * ((1 - GAMMA) * ratio + GAMMA * surprise)
    # exp of more does not fit a float; only a negative surprise gets there.
    return math.exp(min(exponent, 700.0))
