"""Text with its teacher's hidden states, which are computed once for all students.

Legend: T tokens, D hidden.
"""

from collections.abc import Iterable, Iterator, Sequence
from operator import length_hint

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tiny_onn.console import Bar
from tiny_onn.data.packing import PackedRow, uncounted
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import last_hidden_states
from tiny_onn.parallel import ALONE, World

CACHED_BYTES = 2**30
"""Largest total size of hidden states that stay in host memory between evaluations."""


class TaughtText:
    """Text to evaluate students on, and the teacher's last hidden states on it.

    The states are computed at the first evaluation. Those of the first rows, up to `CACHED_BYTES`,
    stay in host memory, in the teacher's number format, so that later evaluations read the same
    bits.

    Args:
        teacher: the reference model, whose weights must not change.
        rows: packed text, which can be iterated several times and may be read anew each time.
    """

    def __init__(self, teacher: PreTrainedModel, rows: Iterable[PackedRow]) -> None:
        self.teacher, self._rows = teacher, rows
        self._cached: dict[int, Tensor] = {}
        self._cached_bytes = 0

    @torch.no_grad()
    def visit(self, text: str, world: World = ALONE) -> Iterator[tuple[PackedRow, Tensor]]:
        """Yield each row on the teacher's device, with the teacher's last hidden states (T, D).

        Every process gets as many rows, because those whose models are cut make forward passes
        together. If the rows do not divide evenly, some end with the last row, of which no token
        counts.

        Args:
            text: the text of the progress bar.
            world: the processes, of which each gets its share of the rows.
        """
        device = self.teacher.device
        with Bar(text, length_hint(self._rows) or None) as bar:
            index, row = -1, None
            for index, row in enumerate(self._rows):
                if index % world.size == world.rank:
                    yield self._taught(index, row.to(device))
                bar.update()
            if row is not None and world.lacks_one(index + 1):
                yield self._taught(-1, uncounted(row.to(device)))

    def _taught(self, index: int, row: PackedRow) -> tuple[PackedRow, Tensor]:
        """Return a row and its hidden states, which are kept under the index if there is room."""
        if index in self._cached:
            return row, self._cached[index].to(row.input_ids.device)
        hidden_TD = last_hidden_states(self.teacher, row.input_ids, **packed_kwargs(row))[0]
        if self._cached_bytes + hidden_TD.nbytes <= CACHED_BYTES:
            self._cached[index] = hidden_TD.cpu()
            self._cached_bytes += hidden_TD.nbytes
        return row, hidden_TD


class HeldOut(TaughtText):
    """The held-out rows of a run, which are in memory.

    Args:
        teacher: the reference model, whose weights must not change.
        rows: packed text.
    """

    def __init__(self, teacher: PreTrainedModel, rows: Sequence[PackedRow]) -> None:
        super().__init__(teacher, rows)
        self.rows = rows
