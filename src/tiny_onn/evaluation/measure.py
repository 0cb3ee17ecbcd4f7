"""A student at one or several budgets, measured against its teacher in one pass over a text.

The teacher reads each row once, however many budgets there are, and no more than a row is in memory
beside what `TaughtText` keeps for a second pass. `distill` evaluates with `compare.evaluate`
instead, which measures less and keeps the bits of its records.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tiny_onn.data.packing import PackedRow
from tiny_onn.data.passages import domain_of
from tiny_onn.evaluation.compare import document_lengths, frequency_nll
from tiny_onn.evaluation.document_sums import (
    by_domain,
    intervals_of,
    numbers_of,
    resampled,
)
from tiny_onn.evaluation.tally import Tally
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import head_of, last_hidden_states
from tiny_onn.model.experts import recorded_routings
from tiny_onn.model.student import TinyOnnForCausalLM, eval_mode
from tiny_onn.ops.predictions import compare_predictions
from tiny_onn.planning.costs import forward_flops
from tiny_onn.routing.budgets import at_budget
from tiny_onn.routing.document_k import DocumentK
from tiny_onn.routing.statistics import OracleStats, RoutingStats
from tiny_onn.runs.records import Evaluation
from tiny_onn.teacher.held_out import TaughtText

# Numbers that hold for a whole evaluation, and for each of its domains.
DIFFERENCES = (
    "reverse_kl",
    "top5_agreement",
    "nll_difference",
    "perplexity_ratio",
    "student_bits_per_byte",
    "teacher_bits_per_byte",
    "bits_per_byte_difference",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A student at one budget, measured on a text.

    Attributes:
        budget: the budget that was set; None: the student as it is deployed.
        target_k: the budget, or that of the deployed student.
        evaluation: the numbers that a run's records hold too.
        tally: the sums that all other numbers follow from.
        thresholds: each layer's threshold; None: the selection has none.
        flops: FLOPs per token by one more active expert, and by one more attended position.
        num_layers: the number of layers with experts.
    """

    budget: float | None
    target_k: float
    evaluation: Evaluation
    tally: Tally
    thresholds: list[float] | None
    flops: tuple[float, float]
    num_layers: int

    @property
    def sums(self) -> Float[Tensor, "documents columns"]:
        """The sums of all documents."""
        return torch.stack(list(self.tally.documents.values()))

    @property
    def num_documents(self) -> int:
        """The number of documents with a predicted token."""
        return int((self.sums[:, 0] > 0).sum())

    def numbers(self) -> dict[str, Any]:
        """Return the numbers of `evaluation` and those beyond them, without intervals."""
        means = numbers_of(self.sums.sum(0))
        return {
            **self.evaluation.as_dict(),
            "num_documents": self.num_documents,
            "num_bytes": int(self.sums[:, 9].sum()),
            **{name: means[name] for name in DIFFERENCES},
            **self.tally.calibration(),
            "spread": self.spread(),
            "thresholds": self.thresholds,
        }

    def intervals(self, seed: int) -> dict[str, list[float] | None]:
        """Return the intervals of the means by name, from resamples of this seed."""
        return intervals_of(resampled(self.sums, seed), self.num_documents)

    def spread(self) -> dict[str, dict[str, float]]:
        """Return the spread over tokens of k and of the FLOPs that follow from it, by quantity."""
        k, joint = (x(self.num_layers) for x in (self.tally.spread_of_k, self.tally.covariance))
        by_k, by_context = self.flops
        mean_ffn, mean_k = self.evaluation.ffn_flops, self.evaluation.mean_k
        ffn = {
            name: by_k * value if name == "std" else mean_ffn + by_k * (value - mean_k)
            for name, value in k.items()
        }
        variance = ffn["std"] ** 2 + (by_context * joint["std_context"]) ** 2
        variance += 2 * by_k * by_context * joint["covariance"]
        return {"k": k, "ffn_flops": ffn, "total_flops": {"std": max(0.0, variance) ** 0.5}}

    def domains(self, seed: int) -> dict[str, dict[str, Any]]:
        """Return the numbers of each domain with their intervals, the largest domain first."""
        found = {}
        for name, sums_NC in by_domain(self.tally.sums_by_domain()).items():
            num_documents = int((sums_NC[:, 0] > 0).sum())
            intervals = intervals_of(resampled(sums_NC, seed), num_documents)
            total = sums_NC.sum(0)
            found[name] = {
                "num_tokens": int(total[0]),
                "num_documents": num_documents,
                "num_bytes": int(total[9]),
                **numbers_of(total),
                **self.tally.calibration(name),
                "intervals": intervals,
            }
        return found


class _Arm:
    """The student at one budget, and what was counted of it."""

    def __init__(
        self, student: TinyOnnForCausalLM, budget: float | None, sources: tuple[str, ...]
    ) -> None:
        banks = student.banks()
        with at_budget(student, budget):
            routers = [bank.router for bank in banks]
            thresholds = [float(router.settled) for router in routers]
            self.target_k = float(routers[0].rule.target_k)
        self.budget = budget
        self.thresholds = thresholds if routers[0].rule.has_budget else None
        self.stats, self.oracle = RoutingStats.zeros(banks), OracleStats.zeros(banks)
        self.document_k = DocumentK()
        self.tally = Tally(domain_of=partial(domain_of, sources=sources))

    def add(
        self,
        student: TinyOnnForCausalLM,
        text: TaughtText,
        row: PackedRow,
        hidden_TD: Tensor,
        num_bytes: Sequence[int],
    ) -> None:
        """Measure one row, whose last hidden states of the teacher are `hidden_TD`."""
        banks, first = student.banks(), not self.tally.documents
        with at_budget(student, self.budget):
            with recorded_routings(banks) as routings:
                ours_TD = last_hidden_states(student, row.input_ids, **packed_kwargs(row))[0]
            if first:
                with self.oracle.watch(banks, row.router_mask[0]):
                    last_hidden_states(student, row.input_ids, **packed_kwargs(row))
        predictions = compare_predictions(
            ours_TD, hidden_TD, head_of(student), head_of(text.teacher), row.labels[0]
        )
        self.stats.add(routings, row)
        self.document_k.add(routings, row)
        self.tally.add(row, routings, predictions, num_bytes)

    def measured(
        self, student: TinyOnnForCausalLM, label_counts: Tensor, mean_context: float
    ) -> Measured:
        """Return what was measured.

        Args:
            student: the student, whose shapes decide the FLOPs.
            label_counts: how often each token is a label.
            mean_context: mean number of positions that a token attends to.
        """
        means = {
            name: math.nan if value is None else value
            for name, value in numbers_of(
                torch.stack(list(self.tally.documents.values())).sum(0)
            ).items()
        }
        summary = self.stats.summary() | self.oracle.summary()
        evaluation = Evaluation(
            num_tokens=int(label_counts.sum()),
            forward_kl=means["forward_kl"],
            top1_agreement=means["top1_agreement"],
            student_perplexity=_exp(means["student_nll"]),
            teacher_perplexity=_exp(means["teacher_nll"]),
            student_nll=means["student_nll"],
            teacher_nll=means["teacher_nll"],
            teacher_entropy=means["teacher_entropy"],
            tau=means["student_entropy"],
            uniform_nll=math.log(len(head_of(student).weight)),
            unigram_nll=frequency_nll(label_counts[label_counts > 0]),
            k_error=self.document_k.standard_error(),
            **summary,
            **forward_flops(student, summary["mean_k"], mean_context),
        )
        none, one, position = (
            forward_flops(student, k, context)["total_flops"]
            for k, context in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))
        )
        return Measured(
            budget=self.budget,
            target_k=self.target_k,
            evaluation=evaluation,
            tally=self.tally,
            thresholds=self.thresholds,
            flops=(one - none, position - none),
            num_layers=len(student.banks()),
        )


@torch.no_grad()
def measure(
    student: TinyOnnForCausalLM,
    text: TaughtText,
    tokenizer: PreTrainedTokenizerBase,
    budgets: Sequence[float | None] = (None,),
    *,
    sources: tuple[str, ...] = (),
    title: str = "evaluating, rows",
) -> list[Measured]:
    """Measure a student at several budgets in one pass; afterwards it runs as it did before.

    Args:
        student: the student.
        text: the text with the teacher.
        tokenizer: the tokenizer of both, which counts the bytes of labels.
        budgets: mean numbers of active experts per token; None: as the student is deployed.
        sources: the sources of the text as the user named them, see `domain_of`.
        title: the text of the bar of progress.

    Raises:
        UserError: the text cannot be read, or the student cannot run at a budget.
    """
    arms = [_Arm(student, budget, sources) for budget in budgets]
    counts = torch.zeros(len(head_of(student).weight), dtype=torch.int64)
    pairs = positions = 0
    with eval_mode(student):
        for row, hidden_TD in text.visit(title):
            labels = row.labels[row.loss_mask].cpu()
            counts += torch.bincount(labels, minlength=len(counts))
            pairs += sum(n * (n + 1) // 2 for n in document_lengths(row))
            positions += row.labels.numel()
            num_bytes = _bytes_of_labels(row, tokenizer)
            for arm in arms:
                arm.add(student, text, row, hidden_TD, num_bytes)
    return [arm.measured(student, counts, pairs / positions) for arm in arms]


def _bytes_of_labels(row: PackedRow, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return for each fragment of text the bytes in UTF-8 of the text that its labels spell.

    Special tokens spell nothing, so that the end of a document costs bits and has no bytes.
    """
    labels_T, mask_T = row.labels[0].cpu(), row.loss_mask[0].cpu()
    found = []
    # Padding, which comes last, has no origin.
    for _, (begin, end) in zip(row.origins, pairwise(row.cu_seqlens.tolist()), strict=False):
        ids = labels_T[begin:end][mask_T[begin:end]].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found.append(len(str(text).encode("utf-8", "replace")))
    return found


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
