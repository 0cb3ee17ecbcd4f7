"""Ctrl-C and SIGTERM: the first one makes a run stop its work and save, the second one ends it.

Several processes of a run agree on a stop between two steps, since a process that left its work on
its own would leave the others waiting. A second signal then changes nothing; torchrun kills
processes that have not ended 30 seconds after it was asked to stop.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tiny_onn.console import say
from tiny_onn.parallel import ALONE, World


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

    def __bool__(self) -> bool:
        return self._received

    def agreed(self) -> bool:
        """Return True if any process was asked to stop; all of them call it at the same place."""
        if self._world.size > 1:
            self._received = self._world.any_true(self._noted)
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
        if self._world.size > 1:
            self._noted = True
            say("Stopping: all processes finish the current work, and finished steps are saved.")
            return
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
        self._breakable = self._world.size == 1
        try:
            if self._breakable and self._received:
                raise Stopped
            yield
        finally:
            self._breakable = False

    def commit(self) -> None:
        """Let the rest of the breakable work run to its end, because it changes what is saved."""
        self._breakable = False


@contextmanager
def stop_on_signal(world: World = ALONE) -> Iterator[StopRequest]:
    """Turn Ctrl-C and SIGTERM into a request to stop a run of some processes, in the context."""
    request = StopRequest(world)
    previous = {s: signal.signal(s, request.note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
