"""Lines and bars for people, on standard error: standard output belongs to results."""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
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
def stage(text: str) -> Iterator[None]:
    """Show what is being done and for how long: a spinner on a terminal, a line elsewhere."""
    if not console().is_terminal:
        say(f"{text} ...")
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console(), transient=True) as progress:
        progress.add_task(text, total=None)
        yield


def track(items: Collection[Item], text: str) -> Iterator[Item]:
    """The items in order, while a bar shows how many of them are done and the time left.

    Where no terminal shows the bar, a line every `LINE_SECONDS` says the same.
    """
    if console().is_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=20),
        )
        columns += (TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
        with Progress(*columns, console=console(), transient=True) as progress:
            task = progress.add_task(text, total=len(items))
            for item in items:
                yield item
                progress.advance(task)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= LINE_SECONDS and done < len(items):
            last, left = now, (now - start) / done * (len(items) - done)
            say(f"{text}: {done} of {len(items)}, {left:.0f} s left")
