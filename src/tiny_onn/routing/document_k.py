"""The standard error over documents of a mean number of experts.

Tokens of one document are alike, so that the number of tokens says little about the error of their
mean. With n_d tokens and K_d active experts in document d (mean over layers), the mean is the ratio
m = sum K_d / sum n_d, whose standard error over D documents is

    sqrt(D / (D - 1) * sum (K_d - m n_d)^2) / sum n_d

Source: Cochran, "Sampling Techniques", 1977, section 6.4, the ratio of two totals.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tiny_onn.data.packing import NO_ORIGIN, PackedRow
from tiny_onn.model.router import Routing
from tiny_onn.parallel import World


class DocumentK:
    """A count of tokens and active experts by document, over the rows of an evaluation."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._documents: list[tuple[object, ...]] = []

    @torch.no_grad()
    def add(self, routings: Sequence[Routing], row: PackedRow) -> None:
        """Count a row and the routing of all layers on it; fragments of a document belong together.

        A fragment of unknown origin counts as a document of its own.
        """
        mask_T = row.router_mask[0]
        k_T = torch.stack([routing.active.sum(-1) for routing in routings]).double().mean(0)
        ends = row.cu_seqlens.long()
        sums_2T = torch.stack([mask_T.double(), k_T * mask_T]).cumsum(-1)
        upto_2N = torch.nn.functional.pad(sums_2T, (1, 0)).index_select(-1, ends)
        self._append(upto_2N.diff(dim=-1), row)

    def _append(self, sums_2N: Tensor, row: PackedRow) -> None:
        """Append a row's sums by fragment, and the fragments' documents."""
        self._sums.append(sums_2N)
        origins = row.origins or (NO_ORIGIN,) * row.num_documents
        for number in range(len(row.cu_seqlens) - 1):
            # Padding comes last, has no origin and no counted token.
            origin = origins[number] if number < len(origins) else NO_ORIGIN
            known = origin.source != NO_ORIGIN.source
            place = (len(self._sums), number)
            self._documents.append((origin.source, origin.document) if known else place)

    def add_up(self, rows: Sequence[PackedRow], world: World, device: torch.device) -> None:
        """Replace the counts of this process's share of some rows, on a device, by those of all."""
        if world.size == 1:
            return
        own = iter(self._sums)
        self._sums, self._documents = [], []
        for number, row in enumerate(rows):
            is_mine = number % world.size == world.rank
            empty_2N = torch.zeros(2, len(row.cu_seqlens) - 1, dtype=torch.float64, device=device)
            self._append(next(own) if is_mine else empty_2N, row)
        # A sum with zeros is exact.
        world.all_reduce_sum(self._sums)

    def standard_error(self) -> float | None:
        """Return the standard error of the mean over documents; None with fewer than two."""
        totals: dict[tuple[object, ...], tuple[float, float]] = {}
        pairs = torch.cat(self._sums, dim=-1).T.tolist() if self._sums else []
        for document, (tokens, experts) in zip(self._documents, pairs, strict=True):
            before = totals.get(document, (0.0, 0.0))
            totals[document] = (before[0] + tokens, before[1] + experts)
        counted = [pair for pair in totals.values() if pair[0]]
        if (number := len(counted)) < 2:
            return None
        tokens, experts = (sum(column) for column in zip(*counted, strict=True))
        mean = experts / tokens
        squares = sum((k - mean * n) ** 2 for n, k in counted)
        return (number / (number - 1) * squares) ** 0.5 / tokens
