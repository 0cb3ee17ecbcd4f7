"""The command line of all benchmarks: read options, run one, print and write its record."""

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.base import against
from benchmarks.common import RESULTS, environment, report, write_record
from benchmarks.registry import NAMES, Benchmark, Result, find


def main(given: Sequence[str]) -> int:
    """Run the benchmark that the first argument names.

    Returns:
        1 if `--gate` was given and a goal is missed, else 0.
    """
    first = argparse.ArgumentParser(prog="python -m benchmarks", allow_abbrev=False)
    first.add_argument("name", nargs="?", choices=NAMES, help="the benchmark")
    first.add_argument("--list", action="store_true", help="list all benchmarks")
    if not given or given[0].startswith("-"):
        if first.parse_known_args(given)[0].list:
            for name in NAMES:
                print(f"{name:18} {find(name).measures}")
            return 0
        first.error(f"expected the name of a benchmark, one of {', '.join(NAMES)}")
    name, *rest = given
    # Inductor imports parts of torch that torch itself deprecates.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
    return run(find(first.parse_args([name]).name), rest)


def run(benchmark: Benchmark, given: Sequence[str]) -> int:
    """Run one benchmark with the options that are given; the exit status."""
    outer, inner = _parsers(benchmark)
    own, rest = outer.parse_known_args(given)
    arguments = inner.parse_args(rest)
    if arguments.case is not None:
        assert benchmark.case is not None
        print(json.dumps(benchmark.case(arguments.case)))
        return 0
    if arguments.smoke:
        benchmark.shrink(arguments)
    device = torch.device(arguments.device).type
    arguments.out = own.out or (None if arguments.smoke else RESULTS)
    name = benchmark.name if device == "cpu" else f"{benchmark.name}_{device}"
    start = time.monotonic()

    def rest_of(result: Result) -> dict[str, Any]:
        """What a record holds beside rows and ratios."""
        return {
            "goal": {key: asdict(goal) for key, goal in result.goals.items()},
            "missed": _missed(result),
            "parity": result.parity,
            **result.more,
            "settings": {**result.settings, "smoke": arguments.smoke},
            "environment": environment(arguments.device),
            "seconds": round(time.monotonic() - start, 1),
        }

    def keep(result: Result) -> None:
        """Write what is known so far, so that a run that is killed loses nothing."""
        whole = {"benchmark": name, "rows": result.rows, "ratios": result.ratios}
        write_record(name, {**whole, "unfinished": True, **rest_of(result)}, arguments.out)

    arguments.keep = keep
    result = benchmark.run(arguments)
    if result is None:
        if own.base is not None:
            raise SystemExit(f"--base: {benchmark.name} has no table; compare one of its parts")
        return 0
    missed = _missed(result)
    for ratio in missed:
        print(f"goal missed: {ratio}: {result.ratios[ratio]:.4g}, expected {result.goals[ratio]}")
    more = rest_of(result)
    if own.base is not None:
        more["base"] = against(own.base, benchmark.name, rest, result.rows)
    report(name, result.rows, result.ratios, arguments.out, **more)
    return int(own.gate and bool(missed))


def _parsers(benchmark: Benchmark) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Options that a run for `--base` does not inherit, and all others."""
    outer = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    outer.add_argument("--base", metavar="COMMIT", help="also measure the package at this commit")
    outer.add_argument("--gate", action="store_true", help="exit with 1 if a goal is missed")
    outer.add_argument(
        "--out",
        type=Path,
        help="folder of the JSON record; default: benchmarks/results, with --smoke none",
    )
    inner = argparse.ArgumentParser(
        prog=f"python -m benchmarks {benchmark.name}",
        description=benchmark.about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[outer],
        allow_abbrev=False,
    )
    if "device" not in benchmark.options:
        inner.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    inner.add_argument("--smoke", action="store_true", help="a tiny size, to see that it runs")
    inner.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    benchmark.add_options(inner)
    return outer, inner


def _missed(result: Result) -> list[str]:
    """The names of the ratios that are outside of their goals."""
    values = {name: result.ratios.get(name) for name in result.goals}
    return [
        name
        for name, value in values.items()
        if value is not None and not result.goals[name].is_met(value)
    ]
