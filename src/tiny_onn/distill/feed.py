"""The rows of each step, which are read while a GPU still works on the step before.

Every process of a run reads all rows of a step, so that the order of the text does not depend on
their number. The host's time for a row would therefore count as often as there are processes if a
GPU waited for it.
"""

from collections.abc import Callable
from typing import Any

from tiny_onn.data.packing import PackedRow
from tiny_onn.data.stream import TokenStream
from tiny_onn.errors import UserError


class RowFeed:
    """The rows of the next step, and the text's state that a checkpoint stores.

    Args:
        stream: The training text.
        read: Takes the rows of a step from the text.

    Attributes:
        error: The reason why the next rows cannot be read; None: they can, or nobody tried yet.
    """

    def __init__(self, stream: TokenStream, read: Callable[[], list[PackedRow]]) -> None:
        self._stream, self._read = stream, read
        self._state = stream.state_dict()
        self._ahead: tuple[dict[str, Any], list[PackedRow]] | None = None
        self.error: UserError | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the text after the last finished step."""
        return self._state

    def take(self) -> list[PackedRow]:
        """Return the rows of the step that begins.

        Raises:
            UserError: They cannot be read.
        """
        self.read_ahead()
        if self.error is not None:
            raise self.error
        assert self._ahead is not None
        self._state, rows = self._ahead
        self._ahead = None
        return rows

    def read_ahead(self) -> None:
        """Read the rows of the next step, unless they are read.

        An error waits in `error`, because the step before may not be finished yet.
        """
        if self._ahead is not None or self.error is not None:
            return
        before = self._stream.state_dict()
        try:
            self._ahead = before, self._read()
        except UserError as error:
            self._ahead, self.error = (before, []), error

    def finish(self) -> None:
        """Count the rows taken last as read, because their step is finished."""
        self._state = self._ahead[0] if self._ahead else self._stream.state_dict()
