"""The counts and sums of one evaluation, filled row by row, whose size does not grow with tokens.

Legend: T tokens, F fragments of a row, L layers, E experts, C columns of `document_sums`, M models
(student and teacher), S confidence sums, W confidence bins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tiny_onn.data.packing import PackedRow
from tiny_onn.evaluation.document_sums import COLUMNS
from tiny_onn.model.router import Routing
from tiny_onn.ops.predictions import Predictions

BINS = 15
"""Number of equal bins of confidence. Source: Guo et al., "On calibration of modern neural
networks", arXiv 1706.04599."""
QUANTILES = (0.05, 0.5, 0.95)


def calibration_error(bins_SW: Float[Tensor, "3 bins"]) -> float | None:
    """Return the expected calibration error, in shares of 1; None without tokens.

    It is the distance between confidence and share of right predictions, as a mean over bins that
    counts each bin by its tokens.

    Args:
        bins_SW: by bin of confidence, the number of tokens, the sum of their confidences, and the
            number of right predictions.
    """
    count_W, confidence_W, correct_W = bins_SW
    total = count_W.sum()
    return float((confidence_W - correct_W).abs().sum() / total) if total else None


@dataclass(kw_only=True, slots=True)
class Tally:
    """The counts and sums of an evaluation at one budget so far.

    Attributes:
        domain_of: a function from the source of a document to its domain.
        documents: the sums of each document by its source and number.
        bins: confidence sums of student and teacher by domain, see `calibration_error`.
        k_histogram: number of counted tokens by active experts, all layers together.
        context: sum over counted tokens of the positions that a token attends to, of their squares,
            and of their products with the token's active experts.
    """

    domain_of: Callable[[str], str]
    documents: dict[tuple[str, int], Float[Tensor, " columns"]] = field(default_factory=dict)
    bins: dict[str, Float[Tensor, "models 3 bins"]] = field(default_factory=dict)
    k_histogram: Int[Tensor, " numbers"] | None = None
    context: Float[Tensor, " 3"] = field(
        default_factory=lambda: torch.zeros(3, dtype=torch.float64)
    )

    def add(
        self,
        row: PackedRow,
        routings: Sequence[Routing],
        predictions: Predictions,
        num_bytes: Sequence[int],
    ) -> None:
        """Count a row.

        Args:
            row: the row, on the device of the rest.
            routings: the routing of every layer on the row.
            predictions: the student compared with its teacher on the row.
            num_bytes: for each fragment, the bytes of the text of its labels.
        """
        lengths_F = row.cu_seqlens.diff().long()
        fragment_T = torch.arange(len(lengths_F), device=lengths_F.device).repeat_interleave(
            lengths_F
        )
        active_T = torch.stack([routing.active.sum(-1) for routing in routings]).sum(0)
        self._add_documents(row, active_T / len(routings), predictions, num_bytes, fragment_T)
        self._add_confidence(row, predictions, fragment_T)
        counted_T = row.router_mask[0]
        most = len(routings) * routings[0].active.shape[-1]
        counts = torch.bincount(active_T[counted_T], minlength=most + 1).cpu()
        self.k_histogram = counts if self.k_histogram is None else self.k_histogram + counts
        context_T = (row.position_ids[0][counted_T] + 1).double()
        k_T = active_T[counted_T].double() / len(routings)
        moments = (context_T.sum(), context_T.square().sum(), (context_T * k_T).sum())
        self.context += torch.stack(moments).cpu()

    def _add_documents(
        self,
        row: PackedRow,
        k_T: Tensor,
        predictions: Predictions,
        num_bytes: Sequence[int],
        fragment_T: Tensor,
    ) -> None:
        scored_T, counted_T = row.loss_mask[0], row.router_mask[0]
        per_token = {
            "num_tokens": scored_T,
            "forward_kl": predictions.forward_kl,
            "reverse_kl": predictions.reverse_kl,
            "top1_agreement": predictions.agrees,
            "top5_agreement": predictions.top5_overlap,
            "student_nll": predictions.nll,
            "teacher_nll": predictions.reference_nll,
            "student_entropy": predictions.entropy,
            "teacher_entropy": predictions.reference_entropy,
        }
        # `where` leaves tokens without a label out even if their value is not finite.
        columns = {
            name: torch.where(scored_T, value_T.double(), 0) for name, value_T in per_token.items()
        }
        columns["num_counted"] = counted_T.double()
        columns["active"] = torch.where(counted_T, k_T.double(), 0)
        columns["num_bytes"] = torch.zeros_like(columns["active"])
        values_TC = torch.stack([columns[name] for name in COLUMNS], dim=-1)
        sums_FC = values_TC.new_zeros(len(row.cu_seqlens) - 1, len(COLUMNS))
        sums_FC = sums_FC.index_add_(0, fragment_T, values_TC).cpu()
        for origin, size, sums_C in zip(row.origins, num_bytes, sums_FC, strict=False):
            sums_C[COLUMNS.index("num_bytes")] = size
            key = (origin.source, origin.document)
            before = self.documents.get(key)
            self.documents[key] = sums_C.clone() if before is None else before + sums_C

    def _add_confidence(self, row: PackedRow, predictions: Predictions, fragment_T: Tensor) -> None:
        names = [self.domain_of(origin.source) for origin in row.origins]
        domains = list(dict.fromkeys(names))
        # Padding comes last and has no label, so that any domain will do for it.
        numbers = [domains.index(name) for name in names] + [0]
        domain_F = torch.tensor(numbers, device=fragment_T.device)
        scored_T = row.loss_mask[0]
        domain_S = domain_F[fragment_T[scored_T]]
        pairs = (
            (predictions.confidence, predictions.correct),
            (predictions.reference_confidence, predictions.reference_correct),
        )
        tables = []
        for confidence_T, correct_T in pairs:
            confidence_S = confidence_T[scored_T].double().nan_to_num()
            bin_S = (confidence_S * BINS).long().clamp(0, BINS - 1) + BINS * domain_S
            weights = (torch.ones_like(confidence_S), confidence_S, correct_T[scored_T].double())
            size = BINS * len(domains)
            sums = [torch.bincount(bin_S, weight, minlength=size) for weight in weights]
            tables.append(torch.stack(sums).reshape(3, len(domains), BINS))
        for number, name in enumerate(domains):
            found = torch.stack([table[:, number] for table in tables]).cpu()
            self.bins[name] = self.bins[name] + found if name in self.bins else found

    def spread_of_k(self, num_layers: int) -> dict[str, float]:
        """Return the spread over counted tokens of the number of active experts, a layer's mean.

        The keys are `std`, and `p5`, `p50` and `p95` for the quantiles.
        """
        assert self.k_histogram is not None
        counts = self.k_histogram.double()
        values = torch.arange(len(counts)) / num_layers
        total = counts.sum().clamp_min(1)
        mean = (counts * values).sum() / total
        std = (counts * (values - mean).square()).sum().div(total).sqrt()
        reached = counts.cumsum(0) / total
        found = {"std": float(std)}
        for share in QUANTILES:
            place = int(torch.searchsorted(reached, torch.tensor(share, dtype=reached.dtype)))
            found[f"p{100 * share:.0f}"] = float(values[min(place, len(values) - 1)])
        return found

    def covariance(self, num_layers: int) -> dict[str, float]:
        """Return over counted tokens `std_context` and `covariance`, that of context and k."""
        assert self.k_histogram is not None
        counts = self.k_histogram.double()
        total = float(counts.sum().clamp_min(1))
        mean_k = float((counts * torch.arange(len(counts)) / num_layers).sum()) / total
        mean, square, product = (self.context / total).tolist()
        return {
            "std_context": max(0.0, square - mean**2) ** 0.5,
            "covariance": product - mean * mean_k,
        }

    def sums_by_domain(self) -> dict[str, list[Tensor]]:
        """Return the documents' sums by domain."""
        found: dict[str, list[Tensor]] = {}
        for (source, _), sums_C in self.documents.items():
            found.setdefault(self.domain_of(source), []).append(sums_C)
        return found

    def calibration(self, domain: str | None = None) -> dict[str, Any]:
        """Return the calibration errors of both models, in all text or in one domain."""
        chosen = list(self.bins.values()) if domain is None else [self.bins[domain]]
        student, teacher = torch.stack(chosen).sum(0)
        return {
            "student_calibration_error": calibration_error(student),
            "teacher_calibration_error": calibration_error(teacher),
        }
