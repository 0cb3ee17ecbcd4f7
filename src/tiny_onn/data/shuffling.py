"""The shuffling of training rows, which spreads the rows of a long document over many steps.

A long document fills many rows in a row, and a student that reads them one after another follows
that document: its gates, its thresholds and the moments of its optimizer, too. Rows are therefore
shuffled in blocks. While a block is read, the next one is filled row by row, so that no step waits
for more text than it reads.
"""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from tiny_onn.config.schema import DataConfig
from tiny_onn.data.packing import PackedRow
from tiny_onn.data.stream import TokenStream, shuffled_order


class ShuffledStream(TokenStream):
    """The rows of a `TokenStream` for training, shuffled in blocks of `num_rows`.

    A state is that of the text where the block in hand begins, and the number of rows taken since:
    a stream that goes on from it reads up to two blocks again.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        row_tokens: int,
        num_rows: int,
    ) -> None:
        super().__init__(config, tokenizer, split="train", seed=seed, row_tokens=row_tokens)
        self._num_rows = num_rows
        self._number = -1
        self._start = self._next_start = super().state_dict()
        self._block: list[PackedRow] = []
        self._next_block: list[PackedRow] = []

    def __next__(self) -> PackedRow:
        read, taken = super().__next__, len(self._next_block)
        if taken == len(self._block):
            if not taken:
                self._next_block = [read() for _ in range(self._num_rows)]
            self._begin_block(self._number + 1)
            taken = 0
        self._next_block.append(read())
        # Caches of a teacher's states know a row by its place.
        return replace(self._block[taken], number=self._number * self._num_rows + taken)

    def _begin_block(self, number: int) -> None:
        """Shuffle the block that is filled, and begin to fill another."""
        self._number, self._start = number, self._next_start
        self._next_start = super().state_dict()
        order = shuffled_order(f"rows {self._seed}:{number}", self._num_rows)
        self._block, self._next_block = [self._next_block[i] for i in order], []

    def state_dict(self) -> dict[str, Any]:
        """Return everything on which the next rows depend, as JSON values."""
        block = {"number": self._number, "taken": len(self._next_block)}
        return {**self._start, "identity": self.identity(), "block": block}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with exactly the row that would have followed `state_dict`.

        Raises:
            UserError: the text, the tokenizer or a setting differs from that of the saved stream.
        """
        super().load_state_dict(state)
        # A stream of which no row was taken has no block in hand, as before block 0.
        self._number, self._block, self._next_block = max(state["block"]["number"], 0) - 1, [], []
        self._start = self._next_start = super().state_dict()
        for _ in range(state["block"]["taken"]):
            next(self)

    def identity(self) -> dict[str, Any]:
        """Return the values that must be equal for a saved state to mean the same rows."""
        return {**super().identity(), "shuffled rows": self._num_rows}
