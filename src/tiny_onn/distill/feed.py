"""The rows of each step, which are read while a GPU still works on the step before.

Every process of a run reads all rows of a step, so that the order of the text does not depend on
their number. The host's time for a row would therefore count as often as there are processes if a
GPU waited for it.
"""

from typing import Any

from tiny_onn.data.packing import PackedRow
from tiny_onn.data.stream import TokenStream


class RowFeed:
    """The rows of the next step, and the text's state that a checkpoint stores.

    Args:
        stream: The training text.
        rows_per_step: Number of rows of a step.
    """

    def __init__(self, stream: TokenStream, rows_per_step: int) -> None:
        self._stream, self._rows_per_step = stream, rows_per_step
        self._state = stream.state_dict()
        self._ahead: tuple[dict[str, Any], list[PackedRow]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the text after the last finished step."""
        return self._state

    def take(self) -> list[PackedRow]:
        """Return the rows of the step that begins."""
        if self._ahead is None:
            self.read_ahead()
        assert self._ahead is not None
        self._state, rows = self._ahead
        self._ahead = None
        return rows

    def read_ahead(self) -> None:
        """Read the rows of the next step."""
        state = self._stream.state_dict()
        self._ahead = state, [next(self._stream) for _ in range(self._rows_per_step)]

    def finish(self) -> None:
        """Count the rows taken last as read, because their step is finished."""
        self._state = self._ahead[0] if self._ahead else self._stream.state_dict()
