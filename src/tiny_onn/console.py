"""Lines and bars for people, on standard error: standard output belongs to results."""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

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

# Seconds between the lines by which work that no terminal shows tells how far it is.
LINE_SECONDS = 30.0


@cache
def console() -> Console:
    """The one console of standard error, which bars and lines share so that neither breaks."""
    return Console(stderr=True)


def say(text: str) -> None:
    """Print one line, as it is."""
    console().print(text, highlight=False, soft_wrap=True, markup=False, emoji=False)


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show what is being done and for how long: a spinner on a terminal, a line elsewhere."""
    if not console().is_terminal:
        say(f"{text} ...")
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console(), transient=True) as progress:
        progress.add_task(text, total=None)
        yield


class Bar:
    """How much of some work is done and the time left, from its making until it is closed.

    A terminal shows a bar; where there is none, a line every `LINE_SECONDS` says the same. A
    context manager.

    Args:
        text: what is being done.
        total: units of the work; None: nobody knows.
        done: units that were done before, which do not count for the time left.
        in_bytes: whether the units are bytes.

    Attributes:
        total: as given; it may be changed on the way.
    """

    def __init__(
        self, text: str, total: int | None, *, done: int = 0, in_bytes: bool = False
    ) -> None:
        self.total = total
        self._text, self._done, self._done_before = text, done, done
        self._shown = filesize.decimal if in_bytes else str
        self._start = self._last = time.monotonic()
        self._progress = _drawn(in_bytes) if console().is_terminal else None
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
        self._last, done = now, self._shown(self._done)
        if self.total is None:
            say(f"{self._text}: {done}")
        elif self._done < self.total:
            speed = (self._done - self._done_before) / (now - self._start)
            left = (self.total - self._done) / max(speed, 1e-9)
            say(f"{self._text}: {done} of {self._shown(self.total)}, {left:.0f} s left")

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._progress is not None:
            self._progress.stop()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class DownloadBar(Bar):
    """A bar with what huggingface_hub asks of its `tqdm_class` for one file.

    Args:
        desc: the end of the file's address; what is done to it may follow after a colon.
        total: bytes of the file.
        initial: bytes of it that were there before.
        about: how tqdm would draw it.
    """

    def __init__(
        self, *, desc: str, total: int | None = None, initial: int = 0, **about: object
    ) -> None:
        name = desc.partition(": ")[0].rpartition("/")[2]
        super().__init__(f"Downloading {name}", total, done=initial, in_bytes=True)

    def update_transfer(self, size: int) -> None:
        """Pass over the bytes that came by network; a method of this name saves a second bar."""

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Pass over the speed, which the bar counts itself."""

    def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Pass over the network's speed."""


def track(items: Collection[Item], text: str) -> Iterator[Item]:
    """The items in order, while a `Bar` shows how many of them are done and the time left."""
    with Bar(text, len(items)) as bar:
        for item in items:
            yield item
            bar.update()


def _drawn(in_bytes: bool) -> Progress:
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
