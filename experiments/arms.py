r"""Baselines as strong as their authors would make them, beside the recipe, at equal compute.

Every arm starts from the same teacher and text, runs for the same tokens in steps of one row of
4,096, and may try several learning rates. A rate is chosen on text that a run keeps out of
training, and what the table says is measured on documents that no run reads, once as deployed and
once brought to exactly k experts: each student is measured at three budgets around k, and log KL is
interpolated between their measured mean numbers of experts.

    python -m experiments.arms --text docs.jsonl.xz --tokens 1998848 --device cuda --jobs 4 \
        --seeds 0 1 2 --arms smk "smk, smallest gain" --out runs/arms
    python -m experiments.arms --out runs/arms --table

The text is JSON lines with `text` and `source`, also packed by xz. `--unseen-sources` names sources
to set apart, which are reported on too. `--rates 0.5 1 2` multiplies an arm's learning rate of the
experts, `--gate-rates` that of the gates. `--teacher` is a folder; the default is the embedded
model. Every run is a process of its own with a line in OUT/arms.jsonl; the same command goes on
where it was stopped, from a run's last checkpoint. With `--smoke`: two tiny runs.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import ROOT, environment
from experiments.blockwise import tiny_teacher
from experiments.options import parser
from experiments.split_text import Parts, split
from tiny_onn.config.read import load_config
from tiny_onn.config.schema import RunConfig
from tiny_onn.conversion.pipeline import (
    Prepared,
    make_student,
    partition,
    read_inputs,
    refit_if_asked,
)
from tiny_onn.conversion.verify import check_conversion
from tiny_onn.data.rows import text_rows, threshold_rows
from tiny_onn.device import pick_device, prepare_device
from tiny_onn.distill.loop import run_distill
from tiny_onn.evaluation.compare import evaluate
from tiny_onn.model.router import temporary_rules
from tiny_onn.routing.budgets import fit_eval_thresholds
from tiny_onn.runs.checkpoint import valid_checkpoints
from tiny_onn.teacher.held_out import HeldOut
from tiny_onn.teacher.load import teacher_for

RECORDS = "arms.jsonl"
BASE = (
    "data.row_tokens=4096",
    "data.eval_tokens=131072",
    "experts.init=learned",
    "experts.compensation=mean",
    "experts.refit=true",
    "experts.calibration_tokens=131072",
    "loss.states_coef=4",
    "loss.chunk_tokens=1024",
    "optim.expert_lr=4e-4",
    "optim.gate_lr=1e-3",
    "train.eval_every_tokens=0",
    "train.save_every_tokens=524288",
    "train.keep_checkpoints=1",
    "train.stats_every_steps=0",
    "train.log_every_steps=20",
    "train.checkpointing=none",
)
SMOKE = (
    "teacher.dtype=float32",
    "train.compile=false",
    "data.row_tokens=64",
    "data.eval_tokens=128",
    "experts.num_experts=8",
    "experts.calibration_tokens=256",
    "router.target_k=4",
    "train.log_every_steps=1",
)
NONE = ("router.objective=none",)
STATIC = ("router.selection=static", *NONE)
HALF = ("experts.init=importance", *STATIC)
# A gate that learns from the main loss takes a lower rate than one with a loss of its own.
TASK = ("router.objective=task", "optim.gate_lr=3e-4")
ARMS: dict[str, tuple[str, ...]] = {
    "smk": (),
    "smk, not refitted": ("experts.refit=false",),
    "smk, smallest gain": ("smk.direction=min",),
    "frozen ridge gate": NONE,
    "regression of norms": ("router.objective=regression",),
    "task, straight through": TASK,
    "task, threshold sigmoid": (*TASK, "router.straight_through=threshold"),
    "task, ramp": (*TASK, "experts.weighting=ramp"),
    "task, softmax weights": (*TASK, "experts.weighting=softmax"),
    "half-width": HALF,
    "half-width, not refitted": (*HALF, "experts.refit=false"),
    "static choice": STATIC,
    "model card's rule": (
        "smk.surprise=parameters",
        "smk.direction=min",
        "smk.candidates=active",
    ),
}
# Budgets around the target at which a student is measured, as shares of the target.
AROUND = (0.94, 1.06)


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    arm: str
    seed: int
    rate: float
    gate_rate: float

    def name(self) -> str:
        """The name of its folder."""
        words = "".join(c if c.isalnum() else "-" for c in self.arm)
        return f"{words}-x{self.rate:g}-g{self.gate_rate:g}-s{self.seed}"


def at_k(points: Sequence[tuple[float, float]], k: float) -> float:
    """The KL at exactly k: log KL on straight lines between points (mean k, KL).

    Beyond the points it follows the nearest two; one point alone is taken as it is.
    """
    points = sorted(points)
    if len(points) == 1:
        return points[0][1]
    pairs = list(itertools.pairwise(points))
    (low, first), (high, second) = next((p for p in pairs if k <= p[1][0]), pairs[-1])
    if high == low:
        return first
    share = (k - low) / (high - low)
    return math.exp((1 - share) * math.log(first) + share * math.log(second))


def settings_of(job: Job, arguments: argparse.Namespace, parts: Parts) -> list[str]:
    """The run's settings over the preset `demo`."""
    settings = [*BASE, *ARMS[job.arm]]
    if arguments.smoke:
        settings += SMOKE
    settings += [f"train.tokens={arguments.tokens}", *arguments.set]
    config = load_config(None, "demo", settings)
    return [
        *settings,
        f"optim.expert_lr={config.optim.expert_lr * job.rate!r}",
        f"optim.gate_lr={config.optim.gate_lr * job.gate_rate!r}",
        f"train.seed={job.seed}",
        f"train.device={arguments.device}",
        f"teacher.path={json.dumps(str(arguments.teacher))}",
        f"data.sources={json.dumps([str(parts.learn)])}",
    ]


def ordered(config: RunConfig, folder: Path, find: Callable[[], Any]) -> list[torch.Tensor] | None:
    """The partition, read from the folder if a run of the same teacher, text and seed left it."""
    experts = config.experts
    key = f"{experts.init}-{experts.num_experts}-{experts.calibration_tokens}-{config.train.seed}"
    path = folder / f"order-{key}.safetensors"
    if path.is_file():
        stored = load_file(path)
        return [stored[str(index)] for index in range(len(stored))]
    order = find()
    if order is not None:
        temporary = path.with_suffix(f".{os.getpid()}")
        save_file({str(i): o.cpu().contiguous() for i, o in enumerate(order)}, temporary)
        temporary.rename(path)
    return order


def prepared_for(config: RunConfig, folder: Path) -> Prepared:
    """What `prepare` makes, with a partition that runs of one seed share."""
    inputs, tokenizer, held_out = read_inputs(config, pick_device(config.train.device))
    order = ordered(config, folder, lambda: partition(config, inputs))
    student = make_student(config, inputs, order)
    conversion = check_conversion(config, student, inputs)
    refit_if_asked(config, student, inputs)
    teacher = teacher_for(inputs.dense, config.teacher)
    return Prepared(
        teacher=teacher,
        student=student,
        tokenizer=tokenizer,
        conversion=conversion,
        held_out=HeldOut(teacher, held_out),
    )


def measured(config: RunConfig, prepared: Prepared, path: Path, max_tokens: int) -> dict[str, Any]:
    """The student on text that nobody learned from or chose on, as deployed and at exactly k."""
    student, tokenizer = prepared.student, prepared.tokenizer
    rows = text_rows(path, tokenizer, config.data, max_tokens)
    held_out = HeldOut(prepared.teacher, rows)
    deployed = evaluate(student, held_out, config.loss)
    points = [(deployed.mean_k, deployed.forward_kl, deployed.student_nll)]
    routers, k = [bank.router for bank in student.banks()], config.router.target_k
    before = [router.settled.clone() for router in routers]
    if routers[0].rule.has_budget:
        settling = threshold_rows(config, tokenizer, student.device)
        for share in AROUND:
            rules = [replace(router.rule, target_k=k * share) for router in routers]
            with temporary_rules(routers, rules):
                fit_eval_thresholds(student, settling, config.router.budget_scope)
                other = evaluate(student, held_out, config.loss)
            points.append((other.mean_k, other.forward_kl, other.student_nll))
            for router, threshold in zip(routers, before, strict=True):
                router.settled.copy_(threshold)
    nll = at_k([(k_, nll) for k_, _, nll in points], k)
    return {
        **numbers(deployed.as_dict()),
        "kl_at_k": at_k([(k_, kl) for k_, kl, _ in points], k),
        "perplexity_at_k": math.exp(nll),
        "points": [list(point[:2]) for point in points],
    }


def numbers(evaluation: dict[str, Any]) -> dict[str, float]:
    """What a record keeps of an evaluation."""
    keep = ("forward_kl", "top1_agreement", "student_perplexity", "teacher_perplexity", "mean_k")
    return {name: evaluation[name] for name in (*keep, "ffn_flops", "dense_ffn_flops")}


def run(job: Job, arguments: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    """Make one run, go on with it if it was stopped; its record."""
    settings = settings_of(job, arguments, parts)
    config = prepare_device(load_config(None, "demo", settings))[0]
    folder = arguments.out / "runs" / job.name()
    begun = bool(valid_checkpoints(folder / "checkpoints"))
    if not begun:
        shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    prepared = prepared_for(config, parts.learn.parent)
    converted = time.monotonic() - started
    result = run_distill(config, out=folder, resume=begun, prepared=prepared, title=job.name())
    if result.interrupted or result.after is None:
        raise KeyboardInterrupt
    report = measured(config, prepared, parts.report, arguments.report_tokens)
    unseen = parts.unseen and measured(config, prepared, parts.unseen, arguments.report_tokens)
    for name in ("checkpoints", "student"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return {
        **asdict(job),
        "target_k": config.router.target_k,
        "tokens": result.tokens,
        "seconds": {"conversion": converted, "training": result.seconds},
        "choose": {
            "before": result.before and numbers(result.before.as_dict()),
            "after": numbers(result.after.as_dict()),
        },
        "report": report,
        "unseen": unseen,
        "settings": settings,
        "environment": environment(str(pick_device(config.train.device))),
    }


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of the record, none if there is none."""
    return [*map(json.loads, path.read_text("utf-8").splitlines())] if path.is_file() else []


def job_of(record: dict[str, Any]) -> Job:
    """The job that left a record."""
    return Job(record["arm"], record["seed"], record["rate"], record["gate_rate"])


def jobs_left(arguments: argparse.Namespace) -> list[Job]:
    """The runs that have no line yet, seed by seed."""
    done = {job_of(record) for record in read_records(arguments.out / RECORDS)}
    asked = itertools.product(
        arguments.seeds, arguments.arms, arguments.rates, arguments.gate_rates
    )
    jobs = [Job(arm, seed, rate, gate_rate) for seed, arm, rate, gate_rate in asked]
    return [job for job in jobs if job not in done]


def run_all(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Make the runs, at most `--jobs` at once, each in a process; the number that failed."""
    waiting, live, failed = jobs_left(arguments), {}, 0
    started = time.monotonic()
    env = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    (arguments.out / "runs").mkdir(parents=True, exist_ok=True)
    while waiting or live:
        in_time = time.monotonic() - started < arguments.seconds
        while waiting and in_time and len(live) < arguments.jobs:
            job = waiting.pop(0)
            log = (arguments.out / "runs" / f"{job.name()}.log").open("a", encoding="utf-8")
            line = [sys.executable, "-m", "experiments.arms", *argv, "--one"]
            line.append(json.dumps(asdict(job)))
            live[job] = subprocess.Popen(line, stdout=log, stderr=log, env=env, cwd=ROOT)
        for job, process in list(live.items()):
            if process.poll() is None:
                continue
            del live[job]
            if process.returncode:
                failed += 1
                log = arguments.out / "runs" / f"{job.name()}.log"
                print(f"{job.name()}: failed\n{log.read_text('utf-8')[-2000:]}", file=sys.stderr)
                continue
            (record,) = (r for r in read_records(arguments.out / RECORDS) if job_of(r) == job)
            show(record, time.monotonic() - started)
        if not in_time and not live:
            print(f"not started in time: {len(waiting)} runs; the same command goes on with them")
            break
        time.sleep(0.5)
    return failed


def show(record: dict[str, Any], seconds: float) -> None:
    """One line on the terminal."""
    report, before = record["report"], record["choose"]["before"]
    print(
        f"{seconds:6.0f} s  {job_of(record).name()}: KL"
        f" {'' if before is None else format(before['forward_kl'], '.4f')} ->"
        f" {report['forward_kl']:.4f} at k {report['mean_k']:.2f}, {report['kl_at_k']:.4f} at"
        f" {record['target_k']:g}; {record['tokens']:,} tokens in"
        f" {record['seconds']['training']:.0f} s",
        flush=True,
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Each arm at the rates that did best on the text to choose on, by tokens."""
    yield (
        "| tokens | arm | rates | seeds | KL, deployed | mean k | KL at k | perplexity at k |"
        " teacher's | KL at k, unseen sources |"
    )
    yield "|---" * 10 + "|"
    arms = {(r["tokens"], r["arm"]) for r in records}
    for tokens, arm in sorted(arms, key=lambda pair: (pair[0], [*ARMS].index(pair[1]))):
        ours = [r for r in records if (r["tokens"], r["arm"]) == (tokens, arm)]
        by_rate = {
            rates: [r for r in ours if (r["rate"], r["gate_rate"]) == rates]
            for rates in sorted({(r["rate"], r["gate_rate"]) for r in ours})
        }
        best = min(by_rate, key=lambda rates: chosen_by(by_rate[rates]))
        runs = by_rate[best]
        reports, unseen = ([r[part] for r in runs] for part in ("report", "unseen"))
        cells = (
            f"{tokens:,}",
            arm,
            f"{best[0]:g}, {best[1]:g} of {len(by_rate)}",
            str(len(runs)),
            spread([r["forward_kl"] for r in reports], 4),
            spread([r["mean_k"] for r in reports], 2),
            spread([r["kl_at_k"] for r in reports], 4),
            spread([r["perplexity_at_k"] for r in reports], 2),
            f"{reports[0]['teacher_perplexity']:.2f}",
            spread([u["kl_at_k"] for u in unseen], 4) if all(unseen) else "",
        )
        yield f"| {' | '.join(cells)} |"


def chosen_by(records: Sequence[dict[str, Any]]) -> float:
    """What a rate is chosen by: the mean KL on the text that runs keep out of training."""
    return fmean(record["choose"]["after"]["forward_kl"] for record in records)


def main(argv: Sequence[str]) -> int:
    """Make the runs that have no record yet, and print the table; the exit status."""
    options = parser(__doc__)
    options.add_argument("--text", type=Path, help="JSON lines with text and source, also .xz")
    options.add_argument("--unseen-sources", nargs="*", default=[], help="sources to set apart")
    options.add_argument("--teacher", default="embedded", help="a folder; default: the embedded")
    options.add_argument("--tokens", type=int, default=1_998_848, help="of each run")
    options.add_argument("--report-tokens", type=int, default=131_072)
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--arms", nargs="+", default=[*ARMS], choices=[*ARMS])
    options.add_argument("--rates", type=float, nargs="+", default=[1.0])
    options.add_argument("--gate-rates", type=float, nargs="+", default=[1.0])
    options.add_argument("--jobs", type=int, default=1, help="runs at once")
    options.add_argument("--threads", type=int, default=2, help="of each run")
    options.add_argument("--seconds", type=float, default=1e9, help="then no run is started")
    options.add_argument("--set", action="append", default=[], help="SECTION.KEY=VALUE")
    options.add_argument("--table", action="store_true", help="only print the table")
    options.add_argument("--one", help=argparse.SUPPRESS)
    arguments = options.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.smoke:
            argv = smoke_options(arguments, argv, Path(temporary))
            arguments = options.parse_args(argv)
        if arguments.out is None or (arguments.text is None and not arguments.table):
            options.error("--out and --text are needed, except with --smoke")
        arguments.out = arguments.out.absolute()
        if arguments.one:
            parts = split(arguments.text, arguments.out, arguments.unseen_sources)
            record = run(Job(**json.loads(arguments.one)), arguments, parts)
            with (arguments.out / RECORDS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            return 0
        failed = 0
        if not arguments.table:
            arguments.out.mkdir(parents=True, exist_ok=True)
            split(arguments.text, arguments.out, arguments.unseen_sources)
            failed = run_all(arguments, argv)
        print("\n".join(table(read_records(arguments.out / RECORDS))))
    return failed


def smoke_options(
    arguments: argparse.Namespace, argv: Sequence[str], folder: Path
) -> list[str]:
    """The command line with what a tiny run needs, as far as it is not given."""
    argv = list(argv)
    if arguments.text is None:
        text = folder / "text.jsonl"
        lines = [f"{n}. The {n % 7} foxes jump over {n % 5} lazy dogs. " * 8 for n in range(400)]
        text.write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
        argv += ["--text", str(text)]
    if arguments.teacher == "embedded":
        argv += ["--teacher", str(tiny_teacher(folder / "teacher"))]
    if arguments.out is None:
        argv += ["--out", str(folder / "out")]
    return [*argv, "--report-tokens", "128"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
