"""Ctrl-C and SIGTERM: a run gives up the work in hand and saves; a second one ends it at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tiny_onn.console import say


class Stopped(KeyboardInterrupt):
    """A signal came inside work that can be given up: a step or an evaluation."""


class StopRequest:
    """Whether someone asked the run to stop; true once a signal has come.

    Attributes:
        graceful: Set once there is a run whose steps can be saved.
    """

    def __init__(self) -> None:
        self.graceful = False
        self._received = False
        self._breakable = False

    def __bool__(self) -> bool:
        return self._received

    def note(self, number: int, _: object) -> None:
        """Handle a signal.

        Raises:
            Stopped: The signal came inside `breakable` work.
            KeyboardInterrupt: There is nothing to save yet, or it is the second signal.
        """
        if not self.graceful:
            name = signal.Signals(number).name
            say(f"Stopped by {name} before the first step of this run; nothing new to save.")
            raise KeyboardInterrupt
        if self._received:
            raise KeyboardInterrupt
        self._received = True
        say(
            "Stopping: the work in hand is given up, finished steps are saved; press Ctrl-C again"
            " to end without saving."
        )
        if self._breakable:
            raise Stopped

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """Work that a signal gives up wherever it is, by raising `Stopped`."""
        self._breakable = True
        try:
            if self._received:
                raise Stopped
            yield
        finally:
            self._breakable = False

    def commit(self) -> None:
        """Let the rest of the breakable work end, because it changes what is saved."""
        self._breakable = False


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn Ctrl-C and SIGTERM into a request within the context."""
    request = StopRequest()
    previous = {s: signal.signal(s, request.note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
