"""Lines for people, on standard error: standard output belongs to results."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


def say(text: str) -> None:
    """Print one line, as it is."""
    Console(stderr=True).print(text, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def stage(text: str) -> Iterator[None]:
    """Show what is being done: a spinner on a terminal, a line elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        say(f"{text} ...")
        yield
        return
    with console.status(text):
        yield
