"""Saving that overlaps training: a thread writes the copy of a run's state.

Between two steps the tensors are copied to host memory (a `Snapshot`), and the thread writes the
copy while the next steps run.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path

from tiny_onn.errors import UserError
from tiny_onn.parallel import ALONE, World
from tiny_onn.runs.checkpoint import (
    Snapshot,
    remove_old,
    step_of,
    valid_checkpoints,
    write_checkpoint,
)
from tiny_onn.runs.signals import held_back

WAITING_S = 0.5
"""Seconds between two calls of `while_waiting`."""


class Checkpointer:
    """A context manager that writes snapshots in a thread of its own, one at a time.

    At the end of the context the write in flight is waited for, and its error is ignored. If
    Ctrl-C ends the context, the write is abandoned after the file in hand. Of a checkpoint of
    several processes each one writes its part, and an error is told to all.

    Args:
        folder: the folder of the checkpoints.
        keep: the number of newest checkpoints to keep, the best one not counted.
        world: the processes of the run.
        while_waiting: called from time to time while a write is waited for.

    Attributes:
        best: the step of the best checkpoint, which is kept besides the newest; None: no step.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        world: World = ALONE,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self.best: int | None = None
        self._while_waiting, self._abandoned = while_waiting, threading.Event()
        self._folder, self._keep, self._world = folder, keep, world
        self._partial = folder / f".partial-{world.of_first(os.getpid())}"
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def save(self, snapshot: Snapshot) -> str | None:
        """Wait for the previous write, begin this one, and return the previous one's error."""
        error = self.wait()
        self._writing = self._executor.submit(
            write_checkpoint,
            self._folder,
            snapshot,
            keep=self._keep,
            best=self.best,
            partial=self._partial,
            world=self._world,
            between_files=self._check,
        )
        return error

    def poll(self) -> str | None:
        """Return the error of a write that has failed since the last call, or None."""
        done = self._writing is not None and self._writing.done()
        return self.wait() if done else None

    def wait(self) -> str | None:
        """Wait for the write in flight, if there is one, and return its error or None."""
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        while wait([writing], timeout=WAITING_S).not_done:
            self._while_waiting()
        try:
            writing.result()
        except UserError as error:
            return str(error)
        return None

    def tidy(self) -> None:
        """Remove checkpoints that are neither newest nor best; no write may be in flight."""
        if newest := valid_checkpoints(self._folder):
            remove_old(self._folder, step_of(newest[0]), self._keep, self.best)

    def _check(self) -> None:
        if self._abandoned.is_set():
            raise CancelledError

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._abandoned.set()
        # Whoever holds the run's lock frees it afterwards, when no thread may write there any more.
        with held_back():
            self._executor.shutdown(wait=True)
