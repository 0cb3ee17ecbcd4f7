"""The wall time of a step's phases."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function


class Clock:
    """The wall time of a step's phases, which are also named ranges in a profiler's trace.

    On a GPU, phases are timed only with `wait=True`, which synchronises after each.
    """

    def __init__(self, device: torch.device, *, wait: bool = False) -> None:
        self._cuda, self._wait = device.type == "cuda", wait
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the phase."""
        start = time.perf_counter()
        with record_function(name):
            yield
            if self._cuda and self._wait:
                torch.cuda.synchronize()
        if self._wait or not self._cuda:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
