"""Ctrl-C and SIGTERM: the first one makes a run stop its work and save, the second one ends it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tiny_onn.console import say


class Stopped(KeyboardInterrupt):
    """A signal came during work that can be abandoned: a step or an evaluation."""


class StopRequest:
    """A request to stop the run, which is true once a signal has come.

    Attributes:
        graceful: true once there is a run whose steps can be saved.
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
            Stopped: the signal came during `breakable` work.
            KeyboardInterrupt: there is nothing to save yet, or this is the second signal.
        """
        if not self.graceful:
            name = signal.Signals(number).name
            say(f"Stopped by {name} before this run's first step; there is nothing new to save.")
            raise KeyboardInterrupt
        if self._received:
            raise KeyboardInterrupt
        self._received = True
        say(
            "Stopping: the current work is abandoned and finished steps are saved; press Ctrl-C"
            " again to end without saving."
        )
        if self._breakable:
            raise Stopped

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """Let a signal abandon the work in this context at any point, by raising `Stopped`."""
        self._breakable = True
        try:
            if self._received:
                raise Stopped
            yield
        finally:
            self._breakable = False

    def commit(self) -> None:
        """Let the rest of the breakable work run to its end, because it changes what is saved."""
        self._breakable = False


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn Ctrl-C and SIGTERM into a request to stop, within the context."""
    request = StopRequest()
    previous = {s: signal.signal(s, request.note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
