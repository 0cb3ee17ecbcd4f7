"""One run of `arms.py`: a student, or the dense rival of thin matrices, and what is measured.

`arms.py` starts it as a process and hands over the run as JSON.
"""

import fcntl
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from benchmarks.common import environment
from experiments import loss_metric, low_rank
from experiments.arms_table import (
    FOLLOWED,
    INTERRUPTED,
    LOSS_METRIC,
    RECORDS,
    Job,
    at_k,
    job_of,
    read_records,
)
from experiments.budgets import measured as counted_k
from experiments.options import mistakes_told
from experiments.split_text import Parts
from tiny_onn.config.read import load_config
from tiny_onn.config.schema import RunConfig
from tiny_onn.conversion.pipeline import Prepared, partition, prepare, read_inputs
from tiny_onn.conversion.sharing import order_of_first
from tiny_onn.data.packing import PackedRow, joined
from tiny_onn.data.rows import eval_row_tokens, text_rows
from tiny_onn.data.settling import threshold_rows
from tiny_onn.device import pick_device, prepare_device
from tiny_onn.distill.loop import run_distill
from tiny_onn.distill.stages import step_tokens
from tiny_onn.evaluation.compare import Evaluation, compare, evaluate
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.router import temporary_rules
from tiny_onn.model.student import TinyOnnForCausalLM, eval_mode
from tiny_onn.parallel import World
from tiny_onn.routing.budgets import fit_eval_thresholds
from tiny_onn.runs.checkpoint import valid_checkpoints
from tiny_onn.runs.lock import run_lock
from tiny_onn.teacher.held_out import HeldOut

# Budgets around the target at which a student is measured, as shares of the target.
AROUND = (0.94, 1.06)
# Documents differ in the experts that they take, so that k is counted on more text than KL.
K_TEXT = 7
# Arms whose student has the mean of its weights over the last steps, this share of them.
AVERAGED, AVERAGED_SHARE = ("smk, averaged weights",), 0.1
# So many rows are measured at once, which keeps a GPU busy. Documents stay apart.
ROWS_AT_ONCE = 8


def ordered(folder: Path, config: RunConfig, inputs: MlpInputs) -> list[torch.Tensor] | None:
    """The partition, read from the folder if a run of the same teacher, text and seed left it."""
    experts = config.experts
    sizes = (experts.num_experts, experts.num_shared, experts.calibration_tokens)
    parts = (experts.init, *sizes, config.train.seed)
    weights = next(w for name, w in inputs.dense.named_parameters() if ".mlp." in name)
    teacher = sha256(weights.detach().float().cpu().numpy().tobytes()).hexdigest()[:8]
    text = sha256(json.dumps(config.data.sources).encode()).hexdigest()[:8]
    # A learned partition is cut for a number of active experts.
    cut = (
        f"{config.router.target_k:g}",
        config.data.shuffle_tokens,
        config.data.row_tokens,
        text,
        teacher,
    )
    key = "-".join(map(str, (*parts, *cut)))
    path = folder / f"order-{key}.safetensors"
    with path.with_suffix(".lock").open("w") as lock:
        # Runs that start together wait for the first, so that all begin with the same student.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():
            stored = load_file(path)
            return [stored[str(index)] for index in range(len(stored))]
        order = partition(config, inputs)
        if order is not None:
            temporary = path.with_suffix(f".{os.getpid()}")
            save_file({str(i): o.cpu().contiguous() for i, o in enumerate(order)}, temporary)
            temporary.rename(path)
    return order


def measured(
    config: RunConfig,
    prepared: Prepared,
    texts: dict[str, list[PackedRow]],
    max_tokens: int,
    settling: Sequence[PackedRow],
    *,
    follow: bool,
) -> dict[str, dict[str, Any]]:
    """The student on texts that nobody learned from or chose on, as deployed and at exactly k.

    `settling` is the text on which thresholds are settled. `follow` asks for the student with
    thresholds that follow each sequence, too.
    """
    student, k = prepared.student, config.router.target_k
    held_out = {
        name: HeldOut(
            prepared.teacher, at_once(rows[: max(1, max_tokens // config.data.row_tokens)])
        )
        for name, rows in texts.items()
    }
    deployed = {name: evaluate(student, rows, config.loss) for name, rows in held_out.items()}
    points = {name: [point(value)] for name, value in deployed.items()}
    found: dict[str, dict[str, Any]] = {
        name: {"counted": None, "followed": None, **numbers(value.as_dict())}
        for name, value in deployed.items()
    }
    routers = [bank.router for bank in student.banks()]
    before = [router.settled.clone() for router in routers]
    if routers[0].rule.has_budget:
        placed = {n: [row.to(student.device) for row in at_once(r)] for n, r in texts.items()}
        with eval_mode(student):
            for name, rows in placed.items():
                found[name]["counted"] = counted_k(student, rows)
        if follow:
            student.routing_controller = "sequence"
            for name, rows in placed.items():
                with eval_mode(student):
                    counted = counted_k(student, rows)
                quality = evaluate(student, held_out[name], config.loss)
                found[name]["followed"] = {"counted": counted, **numbers(quality.as_dict())}
            student.routing_controller = "none"
        for share in AROUND:
            rules = [replace(router.rule, target_k=k * share) for router in routers]
            with temporary_rules(routers, rules):
                fit_eval_thresholds(student, settling, config.router.budget_scope)
                for name, rows in held_out.items():
                    points[name].append(point(evaluate(student, rows, config.loss)))
            for router, threshold in zip(routers, before, strict=True):
                router.settled.copy_(threshold)
    for name, values in points.items():
        found[name] |= {
            "kl_at_k": at_k([(k_, kl) for k_, kl, _ in values], k),
            "perplexity_at_k": math.exp(at_k([(k_, nll) for k_, _, nll in values], k)),
            "points": [list(value[:2]) for value in values],
        }
    return found


def point(evaluation: Evaluation) -> tuple[float, float, float]:
    """Mean k, KL and the student's negative log-likelihood."""
    return evaluation.mean_k, evaluation.forward_kl, evaluation.student_nll


class Report(NamedTuple):
    """What results are reported on."""

    tokens: int
    """The number of tokens of each text on which KL is measured."""
    row_tokens: int
    """The number of tokens of a row; 0: that of evaluations."""

    def settings(self, config: RunConfig) -> RunConfig:
        """The run's settings with the rows that are reported on."""
        data = replace(config.data, row_tokens=self.row_tokens or eval_row_tokens(config.data))
        return replace(config, data=data)


def reported_rows(
    config: RunConfig, parts: Parts, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> dict[str, list[PackedRow]]:
    """The rows of each text that is reported on, by its name in a record."""
    paths = {"report": parts.report, "unseen": parts.unseen}
    return {
        name: text_rows(path, tokenizer, config.data, max_tokens)
        for name, path in paths.items()
        if path
    }


class WeightMeans:
    """The means of a student's trained weights over the last steps of a run."""

    def __init__(self, student: TinyOnnForCausalLM, config: RunConfig) -> None:
        steps = math.ceil(config.train.tokens / step_tokens(config))
        self.first = steps - max(1, round(AVERAGED_SHARE * steps)) + 1
        self.weights = [*student.trainable().values()]
        self.sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in self.weights]
        self.count = 0

    def add(self, step: int, _: float) -> None:
        """Count the weights after a step, if it is one of the last."""
        if step >= self.first:
            for sum_, weight in zip(self.sums, self.weights, strict=True):
                sum_.add_(weight.detach())
            self.count += 1

    @torch.no_grad()
    def put(self) -> None:
        """Give the student the means in place of its weights."""
        for weight, total in zip(self.weights, self.sums, strict=True):
            weight.copy_(total / self.count)


def at_once(rows: Sequence[PackedRow]) -> list[PackedRow]:
    """The rows, `ROWS_AT_ONCE` of them joined to one."""
    starts = range(0, len(rows), ROWS_AT_ONCE)
    return [joined(rows[start : start + ROWS_AT_ONCE]) for start in starts]


def numbers(evaluation: dict[str, Any]) -> dict[str, float]:
    """What a record keeps of an evaluation."""
    keep = ("forward_kl", "top1_agreement", "student_perplexity", "teacher_perplexity", "mean_k")
    return {name: evaluation[name] for name in (*keep, "ffn_flops", "dense_ffn_flops")}


def run_low_rank(
    job: Job, settings: Sequence[str], parts: Parts, out: Path, report: Report
) -> dict[str, Any]:
    """Make a run of the dense rival of thin matrices; its record."""
    config = prepare_device(load_config(None, "demo", settings))[0]
    started = time.monotonic()
    inputs, tokenizer, held_out = read_inputs(config, pick_device(config.train.device))
    dense = inputs.dense
    share = config.router.target_k / config.experts.num_experts
    student = low_rank.low_rank_student(dense, inputs.rows, share)
    converted = time.monotonic() - started
    choose = HeldOut(dense, held_out)
    before = compare(student, choose, config.loss)
    folder = out / "runs" / job.name()
    started = time.monotonic()
    tokens = low_rank.train(student, dense, tokenizer, config, folder)
    seconds = time.monotonic() - started

    def found(rows: HeldOut) -> dict[str, Any]:
        quality = compare(student, rows, config.loss)
        return {
            "forward_kl": quality.forward_kl,
            "top1_agreement": quality.top1_agreement,
            "student_perplexity": quality.perplexity,
            "teacher_perplexity": quality.reference_perplexity,
            "mean_k": config.router.target_k,
            "kl_at_k": quality.forward_kl,
            "perplexity_at_k": quality.perplexity,
        }

    reported = report.settings(config)
    rows = reported_rows(reported, parts, tokenizer, report.tokens)
    texts = {name: found(HeldOut(dense, at_once(part))) for name, part in rows.items()}
    after = compare(student, choose, config.loss)
    shutil.rmtree(folder, ignore_errors=True)
    return {
        **asdict(job),
        "report_tokens": report.tokens,
        "report_row_tokens": reported.data.row_tokens,
        "target_k": config.router.target_k,
        "tokens": tokens,
        "seconds": {"conversion": converted, "training": seconds},
        "choose": {
            "before": {"forward_kl": before.forward_kl},
            "after": {"forward_kl": after.forward_kl},
        },
        "report": texts["report"],
        "unseen": texts.get("unseen"),
        "settings": [*settings],
        "environment": environment(str(dense.device)),
    }


def run(
    job: Job, settings: Sequence[str], parts: Parts, out: Path, report: Report
) -> dict[str, Any] | None:
    """Make a run, or go on with a stopped one; its record, which the first process returns."""
    config = prepare_device(load_config(None, "demo", settings))[0]
    folder, reported = out / "runs" / job.name(), report.settings(config)
    # A checkpoint does not hold the sums of a mean, so that such a run begins anew.
    begun = job.arm not in AVERAGED and bool(valid_checkpoints(folder / "checkpoints"))
    with World.from_environment(config.train.device) as world:
        if world.first and not begun:
            shutil.rmtree(folder, ignore_errors=True)
        started = time.monotonic()
        if job.arm.endswith(LOSS_METRIC):
            prepared = prepare(config, make=loss_metric.make_student)
        else:
            prepared = prepare(config, order_of_first(world) or partial(ordered, parts.folder))
        converted = time.monotonic() - started
        means = WeightMeans(prepared.student, config) if job.arm in AVERAGED else None
        options: Any = {"after_step": means.add} if means else {}
        options |= {"prepared": prepared, "title": job.name(), "world": world}
        result = run_distill(config, out=folder, resume=begun, **options)
    if result.interrupted or result.after is None:
        raise KeyboardInterrupt
    if not world.first:
        return None
    started = time.monotonic()
    settling = at_once(threshold_rows(config, prepared.tokenizer, prepared.student.device))
    after = result.after
    if means:
        means.put()
        fit_eval_thresholds(prepared.student, settling, config.router.budget_scope)
        after = evaluate(prepared.student, prepared.held_out, config.loss)
    texts = reported_rows(reported, parts, prepared.tokenizer, K_TEXT * report.tokens)
    asked: Any = {"settling": settling, "follow": job.arm in FOLLOWED}
    found = measured(reported, prepared, texts, report.tokens, **asked)
    measuring = time.monotonic() - started
    for name in ("checkpoints", "student"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return {
        **asdict(job),
        "report_tokens": report.tokens,
        "report_row_tokens": reported.data.row_tokens,
        "target_k": config.router.target_k,
        "tokens": result.tokens,
        "seconds": {
            "conversion": converted,
            "training": result.seconds,
            "measuring": measuring,
        },
        "choose": {
            "before": result.before and numbers(result.before.as_dict()),
            "after": numbers(after.as_dict()),
        },
        "report": found["report"],
        "unseen": found.get("unseen"),
        "settled_on": {"tokens": sum(r.labels.numel() for r in settling)},
        "settings": [*settings],
        "environment": environment(str(pick_device(config.train.device))),
    }


def main(request: str) -> int:
    """Make the run that `arms.py` asks for, and append its line to the records; the exit status."""
    asked = json.loads(request)
    job, out = Job(**asked["job"]), Path(asked["out"])
    parts = Parts(**{name: path and Path(path) for name, path in asked["parts"].items()})
    make = run_low_rank if job.arm == "low-rank" else run
    # The first process of a run holds the lock for the others. It is not the lock of the run's own
    # folder, which a run that begins anew removes.
    first = os.environ.get("RANK", "0") == "0"
    with run_lock(out / "locks" / job.name()) if first else nullcontext():
        if job in map(job_of, read_records(out / RECORDS)):
            # A process of a study that was killed has made it since this one was started.
            return 0
        try:
            record = make(job, asked["settings"], parts, out, Report(**asked["report"]))
        except KeyboardInterrupt:
            return INTERRUPTED
        if record is not None:
            # One write, so that a kill leaves no part of a line.
            with (out / RECORDS).open("ab", buffering=0) as file:
                file.write(f"{json.dumps(record)}\n".encode())
    return 0


if __name__ == "__main__":
    with mistakes_told():
        sys.exit(main(sys.argv[1]))
