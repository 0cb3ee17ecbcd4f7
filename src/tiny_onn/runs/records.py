"""The fields of the records of `metrics.jsonl`, which need no torch to be read.

`distill/records.py` makes the records. `distill/record_docs.py` writes `docs/metrics.md` from the
docstrings here, and a test compares the page with the records.
"""

import inspect
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingSummary:
    """Routing in one number per statistic. Counted tokens exclude first tokens and padding."""

    mean_k: float
    """Active experts per token, over layers and counted tokens."""
    std_k: float
    """Standard deviation of k over counted tokens, mean over layers."""
    min_layer_k: float
    """Smallest mean k of a layer."""
    max_layer_k: float
    """Largest mean k of a layer."""
    zero_expert_rate: float
    """Share of counted tokens without an active expert, mean over layers."""
    dead_experts: float
    """Number of experts that no counted token activated, all layers together."""
    load_entropy: float
    """Entropy of the routed experts' shares of a layer's activations, nats, mean over layers."""
    max_load_share: float
    """Largest share of a layer's activations that one routed expert has, in the worst layer."""
    gate_entropy: float
    """Entropy of the softmax of a token's router logits, shared experts left out, nats, mean over
    tokens and layers."""
    tie_rate: float
    """Share of counted tokens whose lowest active logit equals their highest inactive one, so that
    the order of the experts decided, not the gate; mean over layers."""
    first_mean_k: float
    """Active experts per first token of a document; the other statistics leave these tokens out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation(RoutingSummary):
    """Means over tokens with a label; FLOPs are per token, forward only, 2 per multiply-add."""

    num_tokens: int
    """The number of tokens that have a label."""
    forward_kl: float
    """KL(teacher || student) in nats per token."""
    top1_agreement: float
    """Share of tokens for which student and teacher rank the same next token first."""
    student_perplexity: float
    """exp of `student_nll`."""
    teacher_perplexity: float
    """exp of `teacher_nll`."""
    student_nll: float
    """The student's next-token loss on the text, -log p(next token), in nats."""
    teacher_nll: float
    """The teacher's next-token loss on the text, in nats."""
    teacher_entropy: float
    """Entropy of the teacher's next-token distribution in nats; added to `forward_kl` it gives the
    soft-label cross-entropy."""
    tau: float
    """Entropy of the student's next-token distribution in nats."""
    uniform_nll: float
    """The logarithm of the vocabulary's size, which is the loss of a uniform guess."""
    unigram_nll: float
    """Loss that the labels' own frequencies reach without context (`evaluation/compare.py`)."""
    oracle_overlap: float
    """Share of a token's k active experts that are among its k experts with the largest output
    norms, as a mean over tokens and layers on the first row."""
    oracle_chance: float
    """The overlap that random sets of the same sizes would have, k / E."""
    min_expert_norm: float
    """Mean output norm of an active expert on the first row, in the layer where it is smallest."""
    ffn_flops: float
    """FLOPs of the active experts and the gates, as measured from the routing."""
    dense_ffn_flops: float
    """FLOPs of the teacher's MLPs."""
    total_flops: float
    """FLOPs of the student: experts and gates as measured, projections, attention scores of these
    documents, and the head."""
    dense_total_flops: float
    """FLOPs of the teacher, counted in the same way."""
    k_error: float | None = None
    """Standard error of `mean_k` over documents; null with fewer than two documents."""

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers by field name."""
        return asdict(self)


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
    """Learning rates of the experts, and of the gates if they learn."""
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
    """The distillation loss, nats per token. Cross-entropy has its share (`loss.label_coef`)."""
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


def field_names(cls: type) -> list[str]:
    """Return a record's fields: kind, step and tokens, then own before inherited, then layers."""
    names = [field for base in cls.__mro__ for field in inspect.get_annotations(base)]
    first = [name for name in ("kind", "step", "tokens") if name in names]
    last = [name for name in ("layers",) if name in names]
    return first + [name for name in names if name not in first + last] + last
