"""Ctrl-C and SIGTERM: the first one makes a run stop its work and save, the second one ends it.

Several processes of a run agree on a stop between two steps, since a process that left its work on
its own would leave the others waiting. A second signal then changes nothing; torchrun kills
processes that have not ended 30 seconds after it was asked to stop.

A signal that ends the run lets others do nothing for `CLEANUP_S` seconds, so that they do not end
the clean-up; after that they end it, because it may wait for ever.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tiny_onn.console import say
from tiny_onn.parallel import ALONE, World

CLEANUP_S = 5.0
"""Seconds that clean-up has after a signal before the next one may end it."""


class Stopped(KeyboardInterrupt):
    """A signal came during work that can be abandoned: a step or an evaluation."""


class StopRequest:
    """A request to stop the run, which is true once a signal has come and all processes know it.

    Args:
        world: the processes of the run.

    Attributes:
        graceful: true once there is a run whose steps can be saved.
    """

    def __init__(self, world: World = ALONE) -> None:
        self.graceful = False
        self._world, self._noted = world, False
        self._received = False
        self._breakable = False
        self._ended = -math.inf
        self._news: str | None = None

    def __bool__(self) -> bool:
        return self._received

    def agreed(self) -> bool:
        """Return True if any process was asked to stop; all of them call it at the same place."""
        self.tell()
        if self._world.size > 1:
            self._received = self._world.any_true(self._noted)
        return self._received

    def note(self, number: int, _: object) -> None:
        """Handle a signal, of which `tell` prints a line later: the signal may interrupt a print.

        Raises:
            Stopped: the signal came during `breakable` work.
            KeyboardInterrupt: there is nothing to save yet, or this is the second signal. None is
                raised within `CLEANUP_S` seconds of the last one.
        """
        if not self.graceful:
            name = signal.Signals(number).name
            self._news = (
                f"Stopped by {name} before this run's first step; there is nothing new to save."
            )
            self._end()
        elif self._world.size > 1:
            self._noted = True
            self._news = (
                "Stopping: all processes finish the current work, and finished steps are saved."
            )
        elif self._received:
            self._news = None
            self._end()
        else:
            self._received = True
            self._news = (
                "Stopping: the current work is abandoned and finished steps are saved; press Ctrl-C"
                " again to end without saving."
            )
            if self._breakable:
                raise Stopped

    def _end(self) -> None:
        """Raise `KeyboardInterrupt`, unless clean-up is at work after the last one."""
        now = time.monotonic()
        if now - self._ended >= CLEANUP_S:
            self._ended = now
            raise KeyboardInterrupt

    def tell(self) -> None:
        """Print the line on a signal that has come, once."""
        news, self._news = self._news, None
        if news is not None:
            say(news)

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """Let a signal abandon the work in this context at any point, by raising `Stopped`."""
        self._breakable = self._world.size == 1
        try:
            if self._breakable and self._received:
                raise Stopped
            yield
        finally:
            self._breakable = False
            self.tell()

    def commit(self) -> None:
        """Let the rest of the breakable work run to its end, because it changes what is saved."""
        self._breakable = False


@contextmanager
def stop_on_signal(world: World = ALONE) -> Iterator[StopRequest]:
    """Turn Ctrl-C and SIGTERM into a request to stop a run of some processes, in the context."""
    request = StopRequest(world)
    with _handled(request.note):
        try:
            yield request
        except KeyboardInterrupt:
            request.tell()
            raise


@contextmanager
def held_back() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end of the context."""
    came: list[int] = []
    with _handled(lambda number, _: came.append(number)):
        yield
    for number in came:
        signal.raise_signal(number)


@contextmanager
def _handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Call the handler for Ctrl-C and SIGTERM in the context."""
    previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
