"""Lines and bars for people, which go to standard error because standard output is for results."""

import errno
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from rich import filesize
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")

LINE_SECONDS = 30.0
"""Seconds between two lines of progress where no terminal shows a bar."""


class _LossyFile:
    """A text file that drops what it cannot write, so that work does not end for want of readers.

    Args:
        file: the file, which is otherwise used as it is.
    """

    def __init__(self, file: Any) -> None:  # noqa: ANN401 - such files share no type
        self._file = file

    def write(self, text: str) -> None:
        """Write the text if that is possible."""
        with self._dropping():
            self._file.write(text)

    def flush(self) -> None:
        """Flush the file if that is possible."""
        with self._dropping():
            self._file.flush()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - it stands for any attribute
        return getattr(self._file, name)

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        """Drop the file's buffered text where the file system or a pipe refuses to take it."""
        try:
            yield
        except OSError as error:
            with suppress(OSError), Path(os.devnull).open("wb") as nowhere:
                descriptor = self._file.fileno()
                kept = os.dup(descriptor)
                os.dup2(nowhere.fileno(), descriptor)
                self._file.flush()
                # A full disk may have space again, but a reader or terminal that has left is gone.
                if error.errno not in (errno.EPIPE, errno.EIO):
                    os.dup2(kept, descriptor)
                os.close(kept)


class _ErrorConsole(Console):
    """The console of standard error, which raises no error if nobody can get its lines."""

    @property
    def file(self) -> Any:  # noqa: ANN401 - that of the library is IO[str], which has more methods
        """The file to write to."""
        return _LossyFile(super().file)

    @file.setter
    def file(self, new_file: Any) -> None:  # noqa: ANN401 - as above
        self._file = new_file


@cache
def console() -> Console:
    """Return the one console of standard error, whose sharing keeps lines from breaking bars."""
    return _ErrorConsole(stderr=True)


def say(text: str) -> None:
    """Print one line unchanged."""
    console().print(text, highlight=False, soft_wrap=True, markup=False, emoji=False)


@contextmanager
def silenced(silent: bool) -> Iterator[None]:
    """Print nothing within the context if asked to, as all but one of several processes are."""
    before = console().quiet
    console().quiet = before or silent
    try:
        yield
    finally:
        console().quiet = before


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show the text beside a spinner and the time on a terminal, or as one line elsewhere."""
    if not console().is_terminal:
        say(f"{text} ...")
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console(), transient=True) as progress:
        progress.add_task(text, total=None)
        yield


class Bar:
    """A bar that shows how much of some work is done and the time left until it is closed.

    Where there is no terminal, a line every `LINE_SECONDS` says the same. A bar is a context
    manager.

    Args:
        text: the name of the work.
        total: units of the work; None if unknown.
        done: units that were done before, which do not count for the time left.
        in_bytes: True if the units are bytes.

    Attributes:
        total: units of the work, which may change on the way.
    """

    def __init__(
        self, text: str, total: int | None, *, done: int = 0, in_bytes: bool = False
    ) -> None:
        self.total = total
        self._text, self._done, self._done_before = text, done, done
        self._format = filesize.decimal if in_bytes else str
        self._start = self._last = time.monotonic()
        self._progress = _new_progress(in_bytes) if console().is_terminal else None
        if self._progress is not None:
            self._progress.start()
            self._task = self._progress.add_task(text, total=total, completed=done)

    def update(self, units: int = 1) -> None:
        """Count more units as done."""
        self._done += units
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done, total=self.total)
            return
        now = time.monotonic()
        if now - self._last < LINE_SECONDS:
            return
        self._last, done = now, self._format(self._done)
        if self.total is None:
            say(f"{self._text}: {done}")
        elif self._done < self.total:
            speed = (self._done - self._done_before) / (now - self._start)
            left = (self.total - self._done) / max(speed, 1e-9)
            say(f"{self._text}: {done} of {self._format(self.total)}, {left:.0f} s left")

    def close(self) -> None:
        """Remove the bar from the screen."""
        if self._progress is not None:
            self._progress.stop()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class DownloadBar(Bar):
    """A bar with the methods that huggingface_hub calls on its `tqdm_class` for one file.

    Args:
        desc: the end of the file's address, which a colon and the work on it may follow.
        total: bytes of the file.
        initial: bytes of the file that were there before.
        options: tqdm's other options, which are ignored.
    """

    def __init__(
        self, *, desc: str, total: int | None = None, initial: int = 0, **options: object
    ) -> None:
        name = desc.partition(": ")[0].rpartition("/")[2]
        super().__init__(f"Downloading {name}", total, done=initial, in_bytes=True)

    def update_transfer(self, size: int) -> None:
        """Ignore the bytes that came by network; without this method there is a second bar."""

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Ignore the speed, because the bar measures its own."""

    def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Ignore the network's speed."""


def track(items: Collection[Item], text: str) -> Iterator[Item]:
    """Yield the items in order while a `Bar` shows how many are done and the time left."""
    with Bar(text, len(items)) as bar:
        for item in items:
            yield item
            bar.update()


def _new_progress(in_bytes: bool) -> Progress:
    amount = DownloadColumn() if in_bytes else TextColumn("{task.completed}/{task.total}")
    return Progress(
        SpinnerColumn(),
        TextColumn("  {task.description}", markup=False),
        BarColumn(bar_width=20),
        amount,
        TimeRemainingColumn(),
        console=console(),
        transient=True,
    )
