"""Stop runs, go on with them on other numbers of GPUs, and compare them with unbroken runs.

    python -m reliability.resume_gpus [--device cuda] [--processes 1 2 4] [--limit 150]

A small Qwen3-shaped teacher with random weights teaches a student over text. For each value of
`train.shard` one run is stopped and goes on with 1, 2, 4 and again 1 processes, each time in new
processes; another one is stopped half-way and goes on with as many processes. Of one run a process
is killed, after which torchrun starts all of them again. A teacher's cache is written on a GPU and
read in place of the teacher. The runs must read the same text as a run of one process that nothing
stopped; their losses must agree with its losses within a bound; and a run that goes on with as many
processes must end with the same bits. As a control one more run goes on from a checkpoint of which
the last bit of one weight was changed, and must end with other bits. Prints a table, and writes it
as JSON, from which `python -m docs.tools` makes the table of docs/scaling.md. Without a GPU,
processes on the CPU do the same through gloo.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.launching import torchrun, variables, watched
from reliability.harness import CONTROL, RESUMED, results_file, resumed_table, set_environment
from reliability.resume_jobs import work
from reliability.run_results import result_of
from tiny import save_teacher, write_corpus
from tiny_onn.config.schema import Shard
from tiny_onn.runs.metrics import read_metrics

SHARDS = get_args(Shard)
STEPS, ROWS_PER_STEP = 8, 4
TEACHER = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "initializer_range": 0.08,
}
# The largest gap between losses of the same step, over the loss. Sums of four rows in another order
# differ by float32's rounding, which may turn a bfloat16 weight to its neighbour, 2^-8 away.
LOSS_BOUND = {"float32": 1e-4, "bfloat16": 1e-2}
# A cache rounds the teacher's states to 8 significant bits, or to 8 bits and a scale for 32 of
# them, which the divergence of a student that is near its teacher feels: 1.3e-2 on a CPU.
CACHE_BOUND = 5e-2
CACHES = ("bfloat16", "int8")
# The lines of the run with a killed process that are recorded.
LINES_SEEN = 80


@dataclass(kw_only=True)
class Trial:
    """A folder of runs, and what was said of them.

    Attributes:
        folder: where runs and caches are.
        device: cpu or cuda.
        dtype: the number format of the teacher and of activations.
        sizes: the numbers of processes, ascending from 1.
        shards: the values of `train.shard`.
        row_tokens: tokens of a row.
        until: the instant at which all must be done.
    """

    folder: Path
    device: str
    dtype: str
    sizes: Sequence[int]
    shards: Sequence[str]
    row_tokens: int
    until: float
    done: dict[str, float] = field(default_factory=dict)
    """The seconds of each job that is done."""
    errors: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    """What was printed while a process was killed and all were started again."""

    @cached_property
    def settings(self) -> list[str]:
        """What all runs set beside their preset, with the teacher and the text that they name."""
        teacher = save_teacher(self.folder / "teacher", "qwen3", **TEACHER)
        corpus = write_corpus(self.folder / "corpus", num_files=200)
        step_tokens = ROWS_PER_STEP * self.row_tokens
        values = {
            "teacher.path": f'"{teacher}"',
            "teacher.dtype": self.dtype,
            "experts.init": "slices",
            "experts.calibration_tokens": 2 * self.row_tokens,
            "loss.states_coef": 0.0,
            "data.sources": f'["{corpus}"]',
            "data.row_tokens": self.row_tokens,
            "data.eval_tokens": 2 * self.row_tokens,
            "data.held_out_fraction": 0.2,
            "optim.name": "adamw",
            "train.device": self.device,
            "train.compile": "false",
            "train.tokens": STEPS * step_tokens,
            "train.rows_per_step": ROWS_PER_STEP,
            "train.eval_every_tokens": 0,
            "train.save_every_tokens": step_tokens,
            "train.keep_checkpoints": STEPS + 1,
            "train.log_every_steps": 1,
        }
        return [f"{name}={value}" for name, value in values.items()]

    @property
    def chain(self) -> tuple[int, ...]:
        """The numbers of processes that go on with a run in turn."""
        return (*self.sizes, 1)

    @property
    def stops(self) -> list[int]:
        """The steps at which a number of processes leaves the run to the next one."""
        return [STEPS * (place + 1) // len(self.chain) for place in range(len(self.chain))]

    def part(
        self,
        out: str,
        shard: str,
        *,
        after: int = 0,
        stop: int = STEPS,
        cache: str = "",
        kill: int = 0,
    ) -> dict[str, Any]:
        """The job that makes the steps of a run after one step and up to another."""
        settings = [f"train.shard={shard}"]
        settings += [f'teacher.cache="{self.folder / cache}"'] if cache else []
        return {
            "kind": "run",
            "name": f"{out} to {stop}",
            "needs": f"{out} to {after}" if after else cache,
            "out": str(self.folder / out),
            "set": settings,
            "resume": after > 0,
            "stop": stop if stop < STEPS else None,
            "kill": kill,
        }

    def cache(self, states_format: str) -> dict[str, Any]:
        """The job that writes a teacher's cache."""
        name = f"cache-{states_format}"
        named = {"kind": "cache", "name": name, "needs": ""}
        return {**named, "out": str(self.folder / name), "format": states_format}

    def change(self, shard: str, half: int) -> dict[str, Any]:
        """The job that copies a run that was stopped half-way, with another checkpoint."""
        runs = {name: str(self.folder / f"{name}-{shard}") for name in ("halves", "changed")}
        return {
            "kind": "change",
            "name": f"changed-{shard} to {half}",
            "needs": f"halves-{shard} to {half}",
            "run": runs["halves"],
            "out": runs["changed"],
        }

    def run(self) -> None:
        """Make all runs and caches, in as many launches as there are numbers to go on with."""
        most, stops, half = self.sizes[-1], self.stops, STEPS // 2
        alone = [self.part("one", "none"), *map(self.cache, CACHES)]
        alone += [self.part(f"cached-{name}", "none", cache=f"cache-{name}") for name in CACHES]
        alone += [self.part(f"chain-{shard}", shard, stop=stops[0]) for shard in self.shards]
        many = [self.part(f"whole-{shard}", shard) for shard in self.shards]
        many += [self.part(f"halves-{shard}", shard, stop=half) for shard in self.shards]
        last = self.shards[-1]
        killed = [self.part("killed", last, kill=half)]
        # Teacher and text are written once, before several threads read of them.
        assert self.settings
        with ThreadPoolExecutor(3) as threads:
            # torchrun may wait half a minute for the processes that are left.
            restarted = threads.submit(self.launch, most, killed, restarts=1)
            list(threads.map(self.launch, (1, most), (alone, many)))
            for place, processes in enumerate(self.chain[1:]):
                after, stop = stops[place : place + 2]
                jobs = [
                    self.part(f"chain-{shard}", shard, after=after, stop=stop)
                    for shard in self.shards
                ]
                if processes == most:
                    jobs.append(self.change(last, half))
                    jobs.append(self.part(f"changed-{last}", last, after=half))
                    jobs += [self.part(f"halves-{s}", s, after=half) for s in self.shards]
                    jobs.append(self.part("cached-many", last, cache=f"cache-{CACHES[0]}"))
                self.launch(processes, jobs)
            restarted.result()

    def launch(
        self, processes: int, jobs: Sequence[Mapping[str, Any]], *, restarts: int = 0
    ) -> None:
        """Do jobs in so many new processes; note what was done, and what went wrong."""
        jobs = [job for job in jobs if self.has(job["needs"], jobs)]
        place = f"{processes}-{time.monotonic_ns()}"
        case, log, said = (self.folder / f"{name}-{place}" for name in ("case", "log", "said"))
        shared = {"device": self.device, "settings": self.settings, "said": str(said)}
        case.write_text(json.dumps({**shared, "jobs": jobs}))
        arguments = ("reliability.resume_gpus", "--case", str(case))
        command = [sys.executable, "-m", *arguments]
        if processes > 1:
            command = torchrun(processes, *arguments, restarts=restarts)
        seconds = self.until - time.monotonic()
        error = "no time was left"
        if seconds > 0:
            error = watched(command, variables(self.device, processes), log, seconds)
        for line in map(json.loads, said.read_text().splitlines() if said.exists() else ()):
            self.environment |= line.get("environment", {})
            if "done" in line:
                self.done[line["done"]] = line["seconds"]
        if restarts and log.exists():
            self.seen = [line[:300] for line in log.read_text(errors="replace").splitlines()]
        if error is not None:
            tail = log.read_text(errors="replace")[-3000:] if log.exists() else ""
            self.errors.append(f"{processes} processes: {error}: {tail}")

    def has(self, needed: str, jobs: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a job that another one needs is done, or comes before it."""
        return not needed or needed in self.done or needed in [job["name"] for job in jobs]

    def losses(self, out: str) -> list[float]:
        """The loss of each step of a run, and the divergence of its last evaluation."""
        rows: list[dict[str, Any]] = list(read_metrics(self.folder / out / "metrics.jsonl"))
        steps = [row["loss"] for row in rows if row["kind"] == "step"]
        return [*steps, rows[-1]["forward_kl"]]

    def positions(self, out: str) -> list[Any]:
        """The position in the text and the tokens read after each step."""
        states = sorted((self.folder / out / "checkpoints").glob("step-*/state.json"))
        found = [json.loads(path.read_text()) for path in states]
        return [(state["step"], state["tokens"], state["stream"]) for state in found]

    def gap(self, out: str, expected: str) -> float:
        """The largest relative gap between the losses of two runs."""
        pairs = zip(self.losses(out), self.losses(expected), strict=True)
        return max(abs(ours / theirs - 1) for ours, theirs in pairs)

    def rows(self) -> list[dict[str, Any]]:
        """What was compared, and whether it is as it must be."""
        most, ways = str(self.sizes[-1]), " -> ".join(map(str, self.chain))
        again, bound, rows = f"{most} -> {most}", LOSS_BOUND[self.dtype], []
        for shard in self.shards:
            chain, halves, whole = (f"{name}-{shard}" for name in ("chain", "halves", "whole"))
            bits = ("same bits as unbroken", again, shard)
            rows += [
                self.same(("same text as 1", ways, shard), self.positions, chain, "one"),
                self.near(("losses of 1", ways, shard), bound, chain, "one"),
                self.near(("losses of 1", most, shard), bound, whole, "one"),
                self.same(bits, lambda out: result_of(self.folder / out), halves, whole),
            ]
        label = ("same bits after a SIGKILL", f"{most} -> {most}", self.shards[-1])
        whole = f"whole-{self.shards[-1]}"
        rows.append(self.same(label, lambda out: result_of(self.folder / out), "killed", whole))
        rows.append(self.differ((CONTROL, *label[1:]), f"changed-{self.shards[-1]}", whole))
        cached = [(name, "1", "none", f"cached-{name}") for name in CACHES]
        cached.append((CACHES[0], most, self.shards[-1], "cached-many"))
        for name, processes, shard, out in cached:
            label = (f"losses without a cache, {name} cache", processes, shard)
            rows.append(self.near(label, CACHE_BOUND, out, "one"))
        return rows

    def same(self, label: Sequence[str], what: Any, ours: str, theirs: str) -> dict[str, Any]:
        """A row that says whether two runs are equal in something."""
        done = self.is_done(ours, theirs)
        row = {**labelled(label), "gap": None, "bound": None, "done": done}
        return {**row, "passed": done and what(ours) == what(theirs)}

    def differ(self, label: Sequence[str], ours: str, theirs: str) -> dict[str, Any]:
        """A row that says whether the comparison of bits finds other weights in two runs."""
        weights = "checkpoint's student"
        row = self.same(label, lambda out: result_of(self.folder / out)[weights], ours, theirs)
        return {**row, "passed": row["done"] and not row["passed"]}

    def near(self, label: Sequence[str], bound: float, ours: str, theirs: str) -> dict[str, Any]:
        """A row that says whether the losses of two runs are within a bound."""
        done = self.is_done(ours, theirs)
        gap = self.gap(ours, theirs) if done else None
        row = {**labelled(label), "gap": gap, "bound": bound, "done": done}
        return {**row, "passed": gap is not None and gap <= bound}

    def is_done(self, *outs: str) -> bool:
        """Whether runs went on to their last step."""
        return all(f"{out} to {STEPS}" in self.done for out in outs)


def labelled(label: Sequence[str]) -> dict[str, str]:
    """What a row compares, on how many processes, and with which `train.shard`."""
    return dict(zip(("check", "processes", "shard"), label, strict=True))


def main() -> int:
    """Run, print, write; 1 if something is not as it must be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shard", nargs="+", choices=SHARDS, default=SHARDS)
    parser.add_argument("--dtype", choices=tuple(LOSS_BOUND), help="default: bfloat16 on a GPU")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--write", action="store_true", help="write the JSON in git")
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    set_environment()
    if options.case:
        work(json.loads(options.case.read_text()))
        return 0
    there = torch.cuda.device_count() if options.device == "cuda" else max(options.processes)
    sizes = sorted({1, *(size for size in options.processes if size <= there)})
    if len(sizes) < 2 or any(ROWS_PER_STEP % size for size in sizes):
        raise SystemExit(
            f"--processes: got {options.processes} with {there} devices, expected 2, 4 or both"
        )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tiny-onn-resume-") as temporary:
        trial = Trial(
            folder=Path(temporary),
            device=options.device,
            dtype=options.dtype or ("bfloat16" if options.device == "cuda" else "float32"),
            sizes=sizes,
            shards=options.shard,
            row_tokens=options.tokens,
            until=started + options.limit,
        )
        trial.run()
        record = {
            "command": " ".join(["python -m reliability.resume_gpus", *sys.argv[1:]]),
            "environment": trial.environment,
            "device": options.device,
            "dtype": trial.dtype,
            "run": f"{STEPS} steps of {ROWS_PER_STEP} x {options.tokens} tokens",
            "seconds": round(time.monotonic() - started),
            "rows": trial.rows(),
            "job_seconds": trial.done,
            "errors": trial.errors,
            "seen_after_kill": trial.seen[-LINES_SEEN:],
        }
    print("\n".join([*trial.errors, "", *resumed_table(record), "", f"{record['seconds']} s"]))
    for path in filter(None, (options.out, results_file(RESUMED) if options.write else None)):
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["passed"] for row in record["rows"]) and not trial.errors else 1


if __name__ == "__main__":
    sys.exit(main())
