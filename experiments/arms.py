r"""The recipe beside its baselines, each at its own rate, at equal compute.

Every arm starts from the same teacher and text, runs for the same tokens in steps of one row of
4,096, and may try several learning rates. A rate is chosen on text that a run keeps out of
training, and what the table says is measured on documents that no run reads, once as deployed and
once brought to exactly k experts: each student is measured at three budgets around k, and log KL is
interpolated between their measured mean numbers of experts.

    python -m experiments.arms --text docs.jsonl.xz --tokens 1998848 --device cuda --jobs 4 \
        --seeds 0 1 2 --arms smk "smk, smallest gain" --out runs/arms
    python -m experiments.arms --out runs/arms --table

The text is JSON lines with `text` and `source`, also packed by xz, or a folder with a .jsonl file
for each source, as `documentation.py` writes it. `--unseen-sources` names sources to set apart,
which are reported on too. `--rates 0.5 1 2` multiplies an arm's learning rate of the experts,
`--gate-rates` that of the gates. `--plan` names a JSON list of runs, to be made in its order: each
entry may have `arms`, `tokens`, `seeds`, `rates` and `gate_rates`; the options give the rest.

Every run is a process of its own with a line in OUT/arms.jsonl. Several at once (`--jobs`) keep a
GPU busy while others start, convert, compile and measure. After `--seconds` no run is started, and
after `--stop-after` those under way save and end; the same command goes on from there. Other
settings (`--set`) need another OUT. With `--processes N` torchrun trains each run on N GPUs; give
them rows by `--set train.rows_per_step=N`. `--smoke` makes tiny runs.
"""

import argparse
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.arms_settings import ARMS, BASE, MORE_TEXT, SAMPLED, SMOKE, TOKENS
from experiments.arms_table import (
    INTERRUPTED,
    LOSS_METRIC,
    RECORDS,
    Job,
    differing,
    job_of,
    read_records,
    show,
    table,
)
from experiments.options import mistakes_told, parser, positive, whole
from experiments.split_text import Parts, split, tiny_text
from tiny_onn.cli.arguments import require_place
from tiny_onn.config.read import load_config
from tiny_onn.errors import UserError, reason_of

# A run that SIGTERM stops ends by itself once it has saved. The signal ends it where it has nothing
# to save: while it starts or measures, and between the savings of the dense rival.
STOPPED = (INTERRUPTED, -signal.SIGTERM)
# Signals that end this program, after the runs under way have saved.
ENDING = (signal.SIGTERM, signal.SIGHUP)
PLANNED = ("arms", "tokens", "seeds", "rates", "gate_rates")
# What a tiny run has in place of the defaults.
SMALL = {"tokens": 1024, "report_tokens": 128}
SHORTEST_ROW = 3


def settings_of(job: Job, arguments: argparse.Namespace, parts: Parts) -> list[str]:
    """The run's settings over the preset `demo`."""
    settings = [*BASE, *ARMS[job.arm]]
    if arguments.smoke:
        settings += SMOKE
    settings += [f"train.tokens={job.asked_tokens}", *arguments.set]
    config = load_config(None, "demo", settings)
    return [
        *settings,
        f"optim.expert_lr={config.optim.expert_lr * job.rate!r}",
        f"optim.gate_lr={config.optim.gate_lr * job.gate_rate!r}",
        f"train.seed={job.seed}",
        f"train.device={arguments.device}",
        f"teacher.path={json.dumps(str(arguments.teacher))}",
        f"data.sources={json.dumps([*map(str, learned_from(job, arguments, parts))])}",
    ]


def learned_from(job: Job, arguments: argparse.Namespace, parts: Parts) -> list[Path]:
    """The folders that the run reads."""
    option, folder = "", None
    if job.arm in SAMPLED:
        option, folder = "--sampled", arguments.sampled
    elif job.arm in MORE_TEXT:
        option, folder = "--more-text", arguments.more_text
    if option and folder is None:
        raise UserError(f"{option}: got nothing, which the arm {job.arm!r} needs; see --help")
    own = [] if job.arm in SAMPLED else [parts.learn]
    return [*own, folder.absolute()] if folder else own


def read_plan(path: Path) -> list[dict[str, Any]]:
    """The entries of a plan.

    Raises:
        UserError: The file cannot be read, or an entry asks for runs that cannot be made.
    """
    try:
        plan = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--plan: {path}: got {reason_of(error)}; see --help") from error
    if not isinstance(plan, list):
        raise UserError(f"--plan: {path}: got {plan!r:.60}, expected a list of entries; see --help")
    for number, entry in enumerate(plan, start=1):
        where = f"--plan: {path} entry {number}"
        if not isinstance(entry, dict) or entry.keys() - {*PLANNED}:
            raise UserError(
                f"{where}: got {entry!r:.60}, expected {', '.join(PLANNED)}; correct it"
            )
        for name, value in entry.items():
            if unfit := [*unfit_values(name, value)]:
                raise UserError(
                    f"{where}: {name}: got {unfit[0]!r:.60}, expected {FIT[name][0]}; correct it"
                )
    return plan


FIT: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "arms": (
        "a list of arms of experiments/arms_settings.py",
        lambda value: isinstance(value, str) and value in ARMS,
    ),
    "tokens": ("an integer of at least 1", lambda value: type(value) is int and value > 0),
    "seeds": ("a list of integers of at least 0", lambda value: type(value) is int and value >= 0),
    "rates": (
        "a list of numbers above 0",
        lambda value: type(value) in (int, float) and 0 < value < math.inf,
    ),
}
FIT["gate_rates"] = FIT["rates"]


def unfit_values(name: str, value: Any) -> Iterator[Any]:
    """What of an entry's value is not as `FIT` says; the value itself if it is no list."""
    values = [value] if name == "tokens" else value
    if not isinstance(values, list) or not values:
        yield value
        return
    yield from (part for part in values if not FIT[name][1](part))


def planned(plan: Sequence[dict[str, Any]], defaults: dict[str, Any]) -> list[Job]:
    """The runs of a plan in its order, each once; what an entry lacks comes from the defaults."""
    jobs: dict[Job, None] = {}
    for entry in plan:
        asked = defaults | entry
        each = itertools.product(*(asked[name] for name in PLANNED[2:]), asked["arms"])
        jobs |= {Job(arm, asked["tokens"], *others): None for *others, arm in each}
    return [*jobs]


def jobs_left(arguments: argparse.Namespace, parts: Parts) -> list[Job]:
    """The runs that have no line yet, in the plan's order or seed by seed.

    Raises:
        UserError: A run was made with other settings, or cannot be made by several processes.
    """
    plan = [{}] if arguments.plan is None else read_plan(arguments.plan)
    done = {job_of(record): record for record in read_records(arguments.out / RECORDS)}
    jobs = planned(plan, {name: getattr(arguments, name) for name in PLANNED})
    for job in jobs:
        if record := done.get(job):
            refuse_other_settings(job, record, arguments, parts)
    left = [job for job in jobs if job not in done]
    if arguments.processes > 1 and any(job.arm.endswith(LOSS_METRIC) for job in left):
        raise UserError(
            f"--processes: got {arguments.processes}, expected 1 for arms that end in"
            f" {LOSS_METRIC!r}; leave these arms out, or the option"
        )
    return left


def refuse_other_settings(
    job: Job, record: dict[str, Any], arguments: argparse.Namespace, parts: Parts
) -> None:
    """Refuse to take a run for one that was asked for with other settings."""
    others = [*differing(record, settings_of(job, arguments, parts))]
    for name in ("report_tokens", "report_row_tokens"):
        had, asked = record.get(name), getattr(arguments, name)
        if had is not None and asked and had != asked:
            others.append((f"--{name.replace('_', '-')}", had, asked))
    if others:
        name, had, asked = others[0]
        raise UserError(
            f"{name}: got {asked}, expected {had}, with which {arguments.out} has {job.name()};"
            " name another --out, or set it so"
        )


def start(job: Job, slot: int, arguments: argparse.Namespace, parts: Parts) -> Any:
    """The process of a run, in one of the `--jobs` places."""
    env = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    # Each process would start as many workers of the compiler as the machine has cores.
    workers = max(1, (os.cpu_count() or 1) // arguments.jobs)
    env.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(workers))
    if number := len(arguments.gpus):
        first = slot * arguments.processes
        mine = (arguments.gpus[(first + i) % number] for i in range(arguments.processes))
        env["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    asked = {
        "job": asdict(job),
        "settings": settings_of(job, arguments, parts),
        "parts": asdict(parts),
        "out": arguments.out,
        "report": {
            "tokens": arguments.report_tokens,
            "row_tokens": arguments.report_row_tokens,
        },
    }
    line = [sys.executable, "-m", "experiments.arms_runs", json.dumps(asked, default=str)]
    if arguments.processes > 1:
        launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node")
        line[2:2] = [*launcher, str(arguments.processes), "-m"]
    with log_of(job, arguments).open("a", encoding="utf-8") as log:
        # In a group of its own it gets no Ctrl-C of the terminal besides the SIGTERM from here.
        return subprocess.Popen(line, stdout=log, stderr=log, env=env, process_group=0)


def log_of(job: Job, arguments: argparse.Namespace) -> Path:
    """The file of what a run prints."""
    return arguments.out / "runs" / f"{job.name()}.log"


def stop(live: Mapping[Job, tuple[int, Any]], asked: set[Job]) -> None:
    """Ask the runs under way to save and end, once each: a second signal lets them save nothing."""
    for job in live.keys() - asked:
        asked.add(job)
        live[job][1].send_signal(signal.SIGTERM)


def end(number: int, _: object) -> None:
    """End the program on a signal as it ends on an error."""
    raise SystemExit(128 + number)


@contextmanager
def none_left(live: Mapping[Job, tuple[int, Any]], asked: set[Job]) -> Iterator[None]:
    """Let runs under way save and end where Ctrl-C, a signal or an error ends the context."""
    # A program that nohup starts goes on when its terminal is closed.
    numbers = [n for n in ENDING if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        stop(live, asked)
        for _, process in live.values():
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def run_all(arguments: argparse.Namespace, parts: Parts) -> int:
    """Make the runs, at most `--jobs` at once, each in a process; the number that failed.

    Runs under way save and end before Ctrl-C or a signal of `ENDING` ends this program.
    """
    waiting, failed, asked = jobs_left(arguments, parts), 0, set[Job]()
    live: dict[Job, tuple[int, Any]] = {}
    started = time.monotonic()
    (arguments.out / "runs").mkdir(parents=True, exist_ok=True)
    with none_left(live, asked):
        while waiting or live:
            seconds = time.monotonic() - started
            in_time = seconds < min(arguments.seconds, arguments.stop_after)
            while waiting and in_time and len(live) < arguments.jobs:
                job = waiting.pop(0)
                slot = min(set(range(arguments.jobs)) - {slot for slot, _ in live.values()})
                live[job] = slot, start(job, slot, arguments, parts)
            if seconds >= arguments.stop_after:
                stop(live, asked)
            for job, (_, process) in list(live.items()):
                if process.poll() is None:
                    continue
                del live[job]
                records = {job_of(r): r for r in read_records(arguments.out / RECORDS)}
                if job in records:
                    show(records[job], time.monotonic() - started)
                elif job in asked and process.returncode in STOPPED:
                    print(f"{job.name()}: stopped; the same command goes on with it", flush=True)
                else:
                    failed += 1
                    text = log_of(job, arguments).read_text("utf-8")
                    print(f"{job.name()}: failed\n{text[-2000:]}", file=sys.stderr, flush=True)
            if not in_time and not live:
                if waiting:
                    print(f"not started in time: {len(waiting)}; the same command makes them")
                break
            time.sleep(0.5)
    return failed


def main(argv: Sequence[str]) -> int:
    """Make the runs that have no record yet, and print the table; the exit status."""
    options = parser(__doc__)
    options.add_argument(
        "--text", type=Path, help="JSON lines with text and source, also .xz, or a folder"
    )
    options.add_argument("--unseen-sources", nargs="*", default=[], help="sources to set apart")
    options.add_argument("--teacher", default="embedded", help="a folder; default: the embedded")
    options.add_argument("--sampled", type=Path, help="folder that teacher_text.py wrote")
    options.add_argument("--more-text", type=Path, help="folder of text of other projects")
    options.add_argument("--tokens", type=whole(1), default=TOKENS, help="of each run")
    options.add_argument("--report-tokens", type=whole(1), default=131_072)
    options.add_argument(
        "--report-row-tokens", type=whole(0), default=0, help="0: as in evaluations"
    )
    options.add_argument("--seeds", type=whole(0), nargs="+", default=[0])
    options.add_argument("--arms", nargs="+", default=[*ARMS], choices=[*ARMS], metavar="ARM")
    options.add_argument("--rates", type=positive, nargs="+", default=[1.0])
    options.add_argument("--gate-rates", type=positive, nargs="+", default=[1.0])
    options.add_argument("--plan", type=Path, help="JSON list of runs, made in this order")
    options.add_argument("--jobs", type=whole(1), default=1, help="runs at once")
    options.add_argument("--processes", type=whole(1), default=1, help="that train a run")
    options.add_argument("--threads", type=whole(1), default=2, help="of each run")
    options.add_argument("--gpus", nargs="*", default=[], help="the GPUs to spread runs over")
    options.add_argument("--seconds", type=float, default=1e9, help="then no run is started")
    options.add_argument("--stop-after", type=float, default=1e9, help="then runs are stopped")
    options.add_argument("--set", action="append", default=[], help="SECTION.KEY=VALUE")
    options.add_argument("--table", action="store_true", help="only print the table")
    if "--smoke" in argv:
        options.set_defaults(**SMALL)
    arguments = options.parse_args(argv)
    if 0 < arguments.report_row_tokens < SHORTEST_ROW:
        options.error(f"--report-row-tokens: expected 0 or at least {SHORTEST_ROW}")
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.smoke:
            fill_in(arguments, Path(temporary))
        if arguments.out is None or (arguments.text is None and not arguments.table):
            options.error("--out and --text are needed, except with --smoke")
        arguments.out, failed = arguments.out.absolute(), 0
        text = Path(arguments.text or "")
        if not arguments.table:
            require_place(arguments.out, "--out")
            arguments.out.mkdir(parents=True, exist_ok=True)
            parts = split(text, arguments.out, arguments.unseen_sources)
            failed = run_all(arguments, parts)
        records = read_records(arguments.out / RECORDS, needed=arguments.table)
        print("\n".join(table(records)))
    return min(failed, 1)


def fill_in(arguments: argparse.Namespace, folder: Path) -> None:
    """Give a tiny run what it needs, as far as it is not given."""
    if arguments.text is None:
        arguments.text = tiny_text(folder)
    if arguments.teacher == "embedded":
        # Whoever only starts runs shall not wait for torch.
        from experiments.blockwise import tiny_teacher  # noqa: PLC0415

        arguments.teacher = tiny_teacher(folder / "teacher")
    if arguments.out is None:
        arguments.out = folder / "out"


if __name__ == "__main__":
    with mistakes_told():
        sys.exit(main(sys.argv[1:]))
