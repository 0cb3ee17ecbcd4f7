"""What a benchmark is, and where all of them are.

A benchmark is a module of this folder with a function `run` that `benchmark` describes: its name is
the module's, its sentence and its options stand at the function. The runner adds the options that
all of them have, and prints and writes what the function returns.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NAMES = (
    "expert_layer",
    "sparse_layer",
    "layer_peers",
    "packed_attention",
    "layer_scaling",
    "surprise_overhead",
    "distill_step",
    "distill_loss",
    "scaling",
    "full_size",
    "small_step",
    "muon_step",
    "conversion",
    "teacher_cache",
    "plan_memory",
    "decode",
    "decode_step",
    "cpu_inference",
    "scaling_gpus",
    "gpu",
)


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a benchmark; its type is that of its default value."""

    default: Any
    """A list takes several values; a boolean can be switched with `--name` and `--no-name`."""
    help: str = ""
    smoke: Any = None
    """The value in a smoke run; None leaves the one that was given."""
    choices: Sequence[str] | None = None
    type: Callable[[str], Any] | None = None
    """How the value is read where the default is None; text if this is None too."""


@dataclass(frozen=True, slots=True)
class Goal:
    """The range in which a ratio should be."""

    at_most: float | None = None
    at_least: float | None = None

    def __str__(self) -> str:
        """The range in words."""
        bounds = (("at least", self.at_least), ("at most", self.at_most))
        return " and ".join(f"{word} {value:g}" for word, value in bounds if value is not None)

    def is_met(self, value: float) -> bool:
        """Whether the value is in the range, ends included."""
        low = self.at_least is None or value >= self.at_least
        return low and (self.at_most is None or value <= self.at_most)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a benchmark measured, after its parity check passed."""

    rows: Sequence[Mapping[str, Any]]
    """The lines of its table: text and whole numbers say what a line is about, floats and names
    that end in `_bytes` are what was measured."""
    ratios: Mapping[str, float | None]
    """Ratios to peers of the same run, with what is divided by what in the name."""
    settings: Mapping[str, Any]
    parity: Any = None
    goals: Mapping[str, Goal] = field(default_factory=dict)
    """By the name of a ratio."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else the record holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """A function that measures, and what the command line has to know about it."""

    name: str
    measures: str
    options: Mapping[str, Option]
    run: Callable[[argparse.Namespace], Result | None]
    """Gets the options' values; returns None if it has written its records itself."""
    case: Callable[[dict[str, Any]], dict[str, Any]] | None
    """The part that `common.in_subprocess` runs in a process of its own."""
    about: str
    """The module's docstring."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add this benchmark's own options to a parser."""
        for name, option in self.options.items():
            keywords: dict[str, Any] = {"default": option.default, "help": option.help}
            if isinstance(option.default, bool):
                keywords["action"] = argparse.BooleanOptionalAction
            else:
                several = isinstance(option.default, list)
                first = option.default[0] if several else option.default
                plain = str if first is None else type(first)
                keywords |= {"type": option.type or plain, "choices": option.choices}
                keywords |= {"nargs": "+"} if several else {}
            parser.add_argument(f"--{name.replace('_', '-')}", **keywords)

    def shrink(self, arguments: argparse.Namespace) -> None:
        """Give the options the values of a smoke run."""
        for name, option in self.options.items():
            if option.smoke is not None:
                setattr(arguments, name, option.smoke)


def benchmark(
    measures: str,
    *,
    case: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    **options: Option,
) -> Callable[[Callable[[argparse.Namespace], Result | None]], Benchmark]:
    """Describe a module's function as the benchmark of the module's name.

    Args:
        measures: One sentence on what it measures.
        case: The part that `common.in_subprocess` runs in a process of its own.
        options: Its options by name, beside those that all benchmarks have.
    """

    def describe(run: Callable[[argparse.Namespace], Result | None]) -> Benchmark:
        module = sys.modules[run.__module__]
        return Benchmark(
            name=run.__module__.rpartition(".")[2],
            measures=measures,
            options=options,
            run=run,
            case=case,
            about=module.__doc__ or "",
        )

    return describe


def find(name: str) -> Benchmark:
    """The benchmark of a name in `NAMES`."""
    return importlib.import_module(f"benchmarks.{name}").run
