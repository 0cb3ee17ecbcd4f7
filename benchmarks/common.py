"""What the benchmarks share: timing, peak memory, the record of the machine, and the report.

Functions are timed interleaved (A B B A A B ...), so that a machine that slows down slows all of
them. Peak memory is what a call adds to what is held before it. Every benchmark ends in one JSON
line, written to `results/NAME.json` too, and reports no time where its parity check fails. The
studies in `experiments/` use the same functions.
"""

import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tiny_onn.device import device_name

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = (
    "torch", "transformers", "triton", "bitsandbytes", "liger-kernel", "sonic-moe",
    "quack-kernels", "nvidia-cutlass-dsl", "trl", "tiny-onn",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Quantiles of a function's times, milliseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    repeats: int

    def columns(self) -> dict[str, float]:
        """The quantiles as columns of a table."""
        return {"p20_ms": self.p20_ms, "p50_ms": self.p50_ms, "p80_ms": self.p80_ms}


class Deadline:
    """A budget of wall time that starts now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> bool:
        """Whether there is some left."""
        return time.monotonic() < self._end


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine and the versions that a number belongs to."""
    device = torch.device(device)
    record: dict[str, Any] = {
        "machine": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return record


def measure(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time every function `repeats` times after `warmup` calls, interleaved."""
    device = torch.device(device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warmup + repeats):
        names = list(functions)
        for name in names if number % 2 == 0 else reversed(names):
            _wait(device)
            start = time.perf_counter()
            functions[name]()
            _wait(device)
            if number >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: _quantiles(values) for name, values in times.items()}


def captured(function: Callable[[], object], device: str) -> Callable[[], object]:
    """The function's GPU work as one graph; on a CPU the function itself.

    Raises:
        RuntimeError: it cannot be captured.
    """
    if torch.device(device).type != "cuda":
        return function
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return Replay(graph, function)


def runnable(
    functions: Mapping[str, Callable[[], object]], device: str, *, graphs: bool = False
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The functions that ran once, each as a graph if asked for, and why the others did not."""
    ready, reasons = {}, {}
    for name, function in functions.items():
        try:
            function()
            ready[name] = captured(function, device) if graphs else function
        except RuntimeError as error:
            reasons[name] = told(error)
    return ready, reasons


def told(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@dataclass(frozen=True, slots=True)
class Replay:
    """A captured function: called, it replays the graph."""

    graph: torch.cuda.CUDAGraph
    function: Callable[[], object]
    """Kept, because the graph reads its tensors' memory and holds none of it."""

    def __call__(self) -> None:
        """Replay it."""
        self.graph.replay()


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Memory that one call needs at its peak beyond what is held before it.

    On a GPU: allocated by torch. On a CPU: resident, Linux only; call it in a process started by
    `in_subprocess`, whose allocator gives freed tensors back at once.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # 5 resets the peak to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    function()
    return resident_bytes("VmHWM") - before


def resident_bytes(key: str) -> int:
    """`VmRSS` (resident now) or `VmHWM` (its peak) of this process. Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def command_of(name: str, *options: str) -> list[str]:
    """The command of a benchmark; to be run in `ROOT`."""
    return [sys.executable, "-m", "benchmarks", name, *options]


def in_subprocess(name: str, case: Mapping[str, Any]) -> dict[str, Any]:
    """Run a benchmark's `case` in a process of its own.

    Raises:
        SystemExit: It failed; with its error output.
    """
    # glibc keeps freed blocks below a threshold that grows with use; a fixed one gives tensors back
    # to the system when they are freed, so that resident memory is what is alive.
    variables = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = command_of(name, "--case", json.dumps(dict(case)))
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        raise SystemExit(f"{name} {command[-1]} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def check(name: str, gap: float, limit: float) -> dict[str, float]:
    """The parity check that stands before every time.

    Raises:
        SystemExit: the gap is above the limit: nothing is timed.
    """
    if not gap <= limit:
        raise SystemExit(f"{name}: parity gap {gap:.3g} above {limit:.3g}; no time is reported")
    return {"gap": gap, "limit": limit}


def report(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, float | None],
    out: Path | None,
    **record: Any,
) -> dict[str, Any]:
    """Print a table and one JSON line; write the line to `out/NAME.json` if a folder is given.

    Args:
        name: the benchmark.
        rows: its lines; the first one's keys are the table's columns.
        ratios: named ratios to peers of the same run, with what is divided by what in the name.
        out: folder of the record.
        record: what else the record holds: settings, parity, environment.
    """
    print_table(rows)
    for label, value in ratios.items():
        print(f"{label}: {_cell(value)}")
    whole = {"benchmark": name, "rows": list(rows), "ratios": dict(ratios), **record}
    print(write_record(name, whole, out), flush=True)
    return whole


def write_record(name: str, whole: Mapping[str, Any], out: Path | None) -> str:
    """Write a record to `out/NAME.json` in the place of an earlier one; its line.

    The file is replaced at once, so that a run that is killed leaves the last whole record.
    """
    line = json.dumps(dict(whole), default=_plain)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        part = out / f"{name}.json.part"
        part.write_text(f"{line}\n", encoding="utf-8")
        part.replace(out / f"{name}.json")
    return line


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows under the names of their columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    # By hand, so that a GPU machine needs no more than torch and transformers.
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the context torch's global generators start from `seed`; restored after it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def relative_gap(got: torch.Tensor, expected: torch.Tensor) -> float:
    """`|got - expected| / |expected|`, in float64 on the CPU."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    return ((got - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def _quantiles(values: list[float]) -> Timing:
    p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Timing(p20_ms=p20.item(), p50_ms=p50.item(), p80_ms=p80.item(), repeats=len(values))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _plain(value: object) -> object:
    return asdict(value) if isinstance(value, Timing) else str(value)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0] if path.is_file() else None
