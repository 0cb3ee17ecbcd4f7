"""Throw generated input at everything that reads a user's files, and count how it ends.

    python -m reliability.fuzz_inputs --cases 10000

Every case ends in success or in one line (a `UserError`), within `LIMIT_S` seconds and `LIMIT_MIB`
MiB of memory more than before it; a traceback, a hang, a crash of the process or code that came
with a model and ran is a failure, printed with its case. Cases run in forked processes, many each,
under RLIMIT_AS. Prints a table and writes it as JSON. Same seed, same cases.
"""

# ruff: noqa: E402 - the environment is set before the libraries read it

import argparse
import contextlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

# Before the imports: threads of their own would survive no fork, and count as memory.
from reliability.harness import set_environment

set_environment()
os.environ |= {
    "RAYON_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    # The others reserve a gigabyte of addresses, which RLIMIT_AS counts.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}

import hypothesis
import pyarrow
import torch

from reliability.fuzz_targets import TARGETS, make_bases
from reliability.harness import FUZZ, add_outputs, in_child, publish, surroundings, wait_for
from tiny_onn.data.readers import WORKING_BYTES
from tiny_onn.errors import UserError, reason_line
from tiny_onn.teacher.load import quiet_transformers

LIMIT_S = 30
LIMIT_MIB = WORKING_BYTES // 2**20
MAX_LINE = 2_000
CASES_PER_PROCESS = 250


class TooLong(BaseException):
    """Not an Exception, so that nothing which is tried can catch it."""


def vm_bytes(name: str) -> int:
    """A memory figure of this process from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def reset_peak() -> None:
    """Let VmHWM start again from what is held now, where the system permits it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def attempt(name: str, case: Any, folder: Path) -> dict[str, Any]:
    """Read one case: how it ended, what was said, seconds and MiB at the peak."""
    # A case whose preparation fails is the harness' mistake, and may be tried again.
    folder.mkdir(exist_ok=True)
    outcome, said = "accepted", ""
    read = TARGETS[name].prepare(case, folder)
    pyarrow.default_memory_pool().release_unused()
    reset_peak()
    held, started = vm_bytes("VmRSS"), time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        read()
    except UserError as error:
        outcome, said = "refused", reason_line(error)
        if not said or len(said) > MAX_LINE:
            outcome, said = "failed", f"a line of {len(said)} characters: {said[:200]}"
    except TooLong:
        outcome, said = "failed", f"took more than {LIMIT_S} s"
    except BaseException as error:  # noqa: BLE001 - what it must never come to
        last = "".join(traceback.format_exception(error)[-4:])
        outcome, said = "failed", f"{type(error).__name__}: {str(error)[:300]}\n{last[-1500:]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds, mib = time.perf_counter() - started, (vm_bytes("VmHWM") - held) / 2**20
    if outcome != "failed" and mib > LIMIT_MIB:
        outcome, said = "failed", f"took {mib:.0f} MiB"
    try:
        shutil.rmtree(folder)
    except RecursionError:
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    return {"outcome": outcome, "said": said, "s": seconds, "mib": mib}


def work(name: str, number: int, count: int, folder: Path, *, seed: int, large: bool) -> int:
    """In a forked process: the seeds if `number` is 0, else `count` generated cases."""

    def too_long(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, too_long)
    # Twice the bound: what is mapped but never touched counts here and not there.
    allowed = vm_bytes("VmSize") + (2 * LIMIT_MIB + 256) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    case_folder = folder / f"{os.getpid()}"
    results = folder / "results" / f"{name.replace(' ', '_')}-{number}.jsonl"
    with results.open("w") as file:

        def one(case: Any) -> None:
            file.write(json.dumps({"case": repr(case)[:3000]}) + "\n")
            file.flush()
            file.write(json.dumps(attempt(name, case, case_folder)) + "\n")
            file.flush()

        target = TARGETS[name]
        if number == 0:
            for case in target.seeds + (target.large if large else ()):
                one(case)
        else:
            settings = hypothesis.settings(
                max_examples=count,
                database=None,
                deadline=None,
                phases=[hypothesis.Phase.generate],
                suppress_health_check=tuple(hypothesis.HealthCheck),  # pyright: ignore[reportArgumentType]
            )
            hypothesis.seed(seed * 1000 + number)(settings(hypothesis.given(target.cases)(one)))()
    return 0


def run_target(
    name: str, count: int, seed: int, folder: Path, *, large: bool
) -> list[dict[str, Any]]:
    """All results of one target, a failed one for a process that died or stood still."""
    found: list[dict[str, Any]] = []
    number = 0
    while number == 0 or len(found) < count:
        wanted = min(CASES_PER_PROCESS, count - len(found))
        log = folder / "output.txt"
        log.unlink(missing_ok=True)
        child = in_child(
            lambda n=number, w=wanted: work(name, n, w, folder, seed=seed, large=large), log
        )
        results = folder / "results" / f"{name.replace(' ', '_')}-{number}.jsonl"
        status = None
        # Time stands for progress: a process that has written nothing for so long hangs in C code.
        while status is None and not (
            results.exists() and time.time() - results.stat().st_mtime > 3 * LIMIT_S
        ):
            status = wait_for(child, 1.0)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        # A case without its end is the one that the process died in.
        ended = [
            after | before
            for before, after in itertools.pairwise(lines)
            if "case" in before and "outcome" in after
        ]
        found += ended
        if status != 0:
            case = lines[-1].get("case", "") if lines else ""
            said = f"process ended with {status}: {log.read_text()[-1500:]}"
            found.append({"outcome": "failed", "said": said, "s": 0.0, "mib": 0.0, "case": case})
        elif number and not ended:
            break
        number += 1
    return found


def summary(name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table."""
    counts = {
        kind: sum(r["outcome"] == kind for r in results)
        for kind in ("refused", "accepted", "failed")
    }
    return {
        "target": name,
        "cases": len(results),
        **counts,
        "worst_s": round(max(r["s"] for r in results), 2),
        "worst_mib": round(max(r["mib"] for r in results)),
    }


def main() -> int:
    """Run, print, write; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--cases", type=int, default=300, help="over all targets; seeds come on top"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", default="", help="only names that hold this")
    parser.add_argument("--large", action="store_true", help="also files of 100 MB")
    add_outputs(parser)
    options = parser.parse_args()
    names = [name for name in TARGETS if options.targets in name]
    torch.set_num_threads(1)
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    quiet_transformers()
    started = time.perf_counter()
    rows, failures = [], []
    with tempfile.TemporaryDirectory(prefix="tiny-onn-fuzz-") as temporary:
        folder = Path(temporary)
        (folder / "results").mkdir()
        make_bases(folder / "base")
        for name in names:
            count = -(-options.cases // len(names))
            large = options.large or options.cases >= 10_000
            results = run_target(name, count, options.seed, folder, large=large)
            rows.append(summary(name, results))
            failures += [{"target": name} | r for r in results if r["outcome"] == "failed"]
            print(json.dumps(rows[-1]), flush=True)
        shutil.rmtree(folder / "base")
    shown = failures if len(failures) < 40 else failures[:: len(failures) // 40 + 1]
    for failure in shown:
        print(f"\n{failure['target']}: {failure['said']}\n  case: {failure['case']}")
    record = {
        **surroundings(sys.argv),
        "seed": options.seed,
        "limit_s": LIMIT_S,
        "limit_mib": LIMIT_MIB,
        "seconds": round(time.perf_counter() - started),
        "cases": sum(row["cases"] for row in rows),
        "failed": len(failures),
        "rows": rows,
    }
    publish(FUZZ, record, options)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
