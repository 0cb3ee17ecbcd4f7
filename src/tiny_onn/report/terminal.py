"""Tables of numbers for a terminal of 80 columns."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text


def narrow_table(title: Text) -> Table:
    """Return a table with this title, whose columns stand close enough for 80 characters."""
    padding = (0, 1, 0, 0)
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=padding)


def add_numbers(table: Table, names: Sequence[str]) -> None:
    """Add columns of numbers, which a narrower terminal wraps, since a cut number misleads."""
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")


def drop_empty_columns(table: Table) -> None:
    """Remove the columns without text, as that of intervals is over a single document."""
    table.columns = [column for column in table.columns if any(column.cells)]


def counted(number: int, thing: str) -> str:
    """Return a number of things in words, such as `1 document` or `1,100 documents`."""
    return f"{number:,} {thing}{'s' * (number != 1)}"
