"""Sums of an evaluation by document, and what follows from them: means, differences, intervals.

A document is the unit that is drawn at random: its tokens depend on each other, and the student and
its teacher read the same ones. So a resample draws whole documents with replacement, and takes the
sums of both models, at all budgets, from the same draw (a paired bootstrap). Source: Efron and
Tibshirani, "An Introduction to the Bootstrap", 1993.

Legend: T tokens, F fragments of a row, N documents, A arms (one student at several budgets),
C columns, B resamples.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95
# The values of a document that are added up. `counted` tokens are those of the router's mask.
COLUMNS = (
    "num_tokens",
    "forward_kl",
    "reverse_kl",
    "top1_agreement",
    "top5_agreement",
    "student_nll",
    "teacher_nll",
    "student_entropy",
    "teacher_entropy",
    "num_bytes",
    "num_counted",
    "active",
)
# The means that have an interval; the differences are those of the student to its teacher.
WITH_INTERVAL = (
    "forward_kl",
    "reverse_kl",
    "top1_agreement",
    "top5_agreement",
    "student_nll",
    "student_perplexity",
    "nll_difference",
    "perplexity_ratio",
    "student_bits_per_byte",
    "bits_per_byte_difference",
    "mean_k",
)


def means_of(sums: Float[Tensor, "*batch columns"]) -> dict[str, Float[Tensor, "*batch"]]:
    """Return the means that follow from sums, by name; a mean of nothing is NaN.

    Divergences, losses and entropies are in nats per token. Bits per byte are all bits of the
    predicted tokens over the bytes of their text. `mean_k` is the number of active experts of a
    counted token, and `perplexity_ratio` is the student's perplexity over the teacher's.
    """
    columns = dict(zip(COLUMNS, sums.unbind(-1), strict=True))
    tokens, counted = columns["num_tokens"], columns["num_counted"]
    found = {name: columns[name] / tokens for name in COLUMNS[1:9]}
    bits_per_nat = tokens / columns["num_bytes"] / math.log(2)
    difference = found["student_nll"] - found["teacher_nll"]
    return found | {
        "mean_k": columns["active"] / counted,
        "nll_difference": difference,
        "perplexity_ratio": difference.exp(),
        "student_perplexity": found["student_nll"].exp(),
        "teacher_perplexity": found["teacher_nll"].exp(),
        "student_bits_per_byte": found["student_nll"] * bits_per_nat,
        "teacher_bits_per_byte": found["teacher_nll"] * bits_per_nat,
        "bits_per_byte_difference": difference * bits_per_nat,
    }


def numbers_of(sums_C: Float[Tensor, " columns"]) -> dict[str, float | None]:
    """Return `means_of` as numbers; None where there is nothing to average, as without bytes."""
    return {name: _number(value) for name, value in means_of(sums_C).items()}


def resampled(
    sums: Float[Tensor, "documents *arms columns"], seed: int
) -> Float[Tensor, "resamples *arms columns"]:
    """Return the sums over as many documents as there are, drawn with replacement, many times.

    The seed and the number of documents decide which documents are drawn.
    """
    N, generator = len(sums), torch.Generator().manual_seed(seed)
    flat = sums.reshape(N, -1)
    found = flat.new_empty(NUM_RESAMPLES, flat.shape[1])
    for number in range(NUM_RESAMPLES):
        drawn = torch.randint(N, (N,), generator=generator)
        found[number] = torch.bincount(drawn, minlength=N).to(flat.dtype) @ flat
    return found.reshape(NUM_RESAMPLES, *sums.shape[1:])


def intervals_of(
    sums_BC: Float[Tensor, "resamples columns"], num_documents: int
) -> dict[str, list[float] | None]:
    """Return the central 95 % of the resampled means by name; None for fewer than two documents."""
    means = means_of(sums_BC)
    return {name: interval(means[name], num_documents) for name in WITH_INTERVAL}


def interval(values_B: Float[Tensor, " resamples"], num_documents: int) -> list[float] | None:
    """Return the central 95 % of resampled values; None for fewer than two documents."""
    if num_documents < 2 or not bool(values_B.isfinite().all()):
        return None
    tail = (1 - CONFIDENCE) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=values_B.dtype)
    return values_B.quantile(ends).tolist()


def by_domain(
    sums: Mapping[str, Sequence[Tensor]],
) -> dict[str, Float[Tensor, "documents columns"]]:
    """Return each domain's sums by document as one table, the largest domain first."""
    tables = {name: torch.stack(list(rows)) for name, rows in sums.items()}
    return dict(sorted(tables.items(), key=lambda pair: (-float(pair[1][:, 0].sum()), pair[0])))


def _number(value: Tensor) -> float | None:
    return float(value) if bool(value.isfinite()) else None
