"""Ctrl-C and SIGTERM: a run finishes its step and saves, a second signal ends it at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tiny_onn.console import say


class StopRequest:
    """Whether someone asked the run to stop; true once a signal has come.

    Attributes:
        graceful: set when there is a step to finish and something to save.
    """

    def __init__(self) -> None:
        self.graceful = False
        self._received = False

    def __bool__(self) -> bool:
        return self._received

    def note(self, number: int, _: object) -> None:
        """Handle a signal.

        Raises:
            KeyboardInterrupt: there is nothing to finish, or it is the second one.
        """
        if not self.graceful:
            say(f"Stopped by {signal.Signals(number).name} before the first step; nothing to save.")
            raise KeyboardInterrupt
        if self._received:
            raise KeyboardInterrupt
        self._received = True
        say("Stopping after this step, a last evaluation and saving; once more to stop at once.")


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
