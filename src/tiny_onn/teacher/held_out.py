"""Held-out rows with their teacher's hidden states, which are computed once for all students.

Legend: T tokens, D hidden.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tiny_onn.console import track
from tiny_onn.data.packing import PackedRow
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import last_hidden_states

CACHED_BYTES = 2**30
"""Largest total size of hidden states that stay in host memory between evaluations."""


class HeldOut:
    """Rows to evaluate students on, and the teacher's last hidden states on them.

    The states are computed at the first evaluation. If they take at most `CACHED_BYTES`, they stay
    in host memory, in the teacher's number format, so that later evaluations read the same bits.

    Args:
        teacher: the reference model, whose weights must not change.
        rows: packed text.
    """

    def __init__(self, teacher: PreTrainedModel, rows: Sequence[PackedRow]) -> None:
        self.teacher, self.rows = teacher, rows
        self._cached: dict[int, Tensor] = {}

    @torch.no_grad()
    def visit(self, text: str) -> Iterator[tuple[PackedRow, Tensor]]:
        """Yield each row on the teacher's device, with the teacher's last hidden states (T, D).

        Args:
            text: the text of the progress bar.
        """
        device = self.teacher.device
        for index, row in track(list(enumerate(self.rows)), text):
            row = row.to(device)  # noqa: PLW2901
            hidden_TD = self._cached.get(index)
            if hidden_TD is None:
                hidden_TD = last_hidden_states(self.teacher, row.input_ids, **packed_kwargs(row))[0]
                if hidden_TD.nbytes * len(self.rows) <= CACHED_BYTES:
                    self._cached[index] = hidden_TD.cpu()
            yield row, hidden_TD.to(device)
