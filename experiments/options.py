"""The options that all studies have, and where their records are."""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.common import ROOT
from tiny_onn.errors import UserError, reason_line

RESULTS = ROOT / "experiments" / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every study has."""
    first = (description or "").partition("\n")[0]
    options = argparse.ArgumentParser(description=first)
    options.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    options.add_argument("--smoke", action="store_true", help="a tiny size, to see that it runs")
    options.add_argument(
        "--out",
        type=Path,
        help="folder of the JSON record; default: experiments/results, with --smoke none",
    )
    return options


def whole(least: int) -> Callable[[str], int]:
    """A reader of an option's integer, which refuses what is below the least."""

    def read(text: str) -> int:
        with suppress(ValueError):
            if (value := int(text)) >= least:
                return value
        raise argparse.ArgumentTypeError(f"got {text}, expected an integer of at least {least}")

    return read


def positive(text: str) -> float:
    """An option's number, refused unless it is finite and above 0."""
    with suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"got {text}, expected a number above 0")


@contextmanager
def mistakes_told() -> Iterator[None]:
    """End the program with one line about a user's mistake, and status 1."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"error: {reason_line(error)}") from error


def results_folder(arguments: argparse.Namespace) -> Path | None:
    """Where the record goes: `--out`, or `results/` unless it is a smoke run."""
    return arguments.out or (None if arguments.smoke else RESULTS)
