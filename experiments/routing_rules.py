"""Every selection with every objective: does it train, and what does it cost beside top_k?

Each valid pair starts from the embedded teacher's own weights, trains on the same embedded text,
and is compared with the teacher on the same held-out text, before and after; a refused pair says
why. One process, one pair after another; pairs that the record already holds are skipped, so that
an interrupted run goes on.

    python -m experiments.routing_rules [--steps 20] [--row-tokens 1024] [--device cpu] [--smoke]
    python -m docs.tools        # the table in docs/routing.md, from the record

Twenty steps say that a pair learns and stays alive, not which one is best. A layer is dead if in
the last step at most one of its experts was used. Step time: the median over the steps after the
second, by the same of top_k with objective `task`. Ends in one JSON line.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedModel

from benchmarks.common import ROOT, environment, report
from benchmarks.steps import random_dense, random_rows
from docs.tools import pages
from experiments.options import RESULTS, parser, results_folder
from tiny_onn.config.read import load_config
from tiny_onn.config.schema import Objective, RunConfig, Selection
from tiny_onn.conversion.pipeline import make_student, partition
from tiny_onn.data.packing import PackedRow
from tiny_onn.data.rows import calibration_rows, held_out_rows, training_rows
from tiny_onn.data.settling import threshold_rows
from tiny_onn.device import pick_device
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.schedule import lr_factor, set_learning_rates
from tiny_onn.distill.step import distill_step
from tiny_onn.errors import UserError
from tiny_onn.evaluation.compare import evaluate
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.routing.budgets import fit_eval_thresholds
from tiny_onn.teacher.held_out import HeldOut
from tiny_onn.teacher.load import load_dense, quiet_transformers, teacher_for

NAME = "routing_rules"
PAGE = ROOT / "docs" / "routing.md"
BEGIN, END = "<!-- {name}: begin -->", "<!-- {name}: end -->"
PAIRS = tuple(itertools.product(get_args(Selection), get_args(Objective)))
# What DynMoE wants: its own gate, and outputs divided by k.
TOP_ANY = ("experts.gate_init=random", "experts.weighting=mean")
BASELINE = ("top_k", "task")


def settings(selection: str, objective: str, arguments: argparse.Namespace) -> RunConfig:
    """A pair's settings: the demo's recipe with this selection and objective.

    Raises:
        UserError: the pair makes no sense.
    """
    overrides = [
        f"router.selection={selection}",
        f"router.objective={objective}",
        f"data.row_tokens={arguments.row_tokens}",
        f"train.tokens={arguments.steps * arguments.row_tokens}",
        f"train.device={arguments.device}",
        *(TOP_ANY if selection == "top_any" else ()),
    ]
    if arguments.smoke:
        overrides += ["train.compile=false", "teacher.dtype=float32"]
    return load_config(None, "demo", overrides)


def measure_pair(config: RunConfig, world: "World") -> dict[str, Any]:
    """Train one pair; what it became."""
    student = make_student(config, world.inputs, world.order)
    teacher = teacher_for(world.dense, config.teacher)
    optimizer = build_optimizer(student, config.optim, seed=config.train.seed)
    scope = config.router.budget_scope
    fit_eval_thresholds(student, world.threshold_rows, scope)
    before = evaluate(student, HeldOut(teacher, world.held_out), config.loss)
    seconds, result = [], None
    for step, row in enumerate(world.training):
        set_learning_rates(optimizer, lr_factor((step + 0.5) / len(world.training), config.optim))
        start = time.perf_counter()
        result = distill_step(student, teacher, optimizer, [row], config, step=step)
        finite = math.isfinite(result.loss.item())
        seconds.append(time.perf_counter() - start)
        if not finite:
            raise SystemExit(f"{config.router}: the loss of step {step} is not finite")
    assert result is not None
    fit_eval_thresholds(student, world.threshold_rows, scope)
    after = evaluate(student, HeldOut(teacher, world.held_out), config.loss)
    used_L = (result.stats.load_LE > 0).sum(-1)
    return {
        "kl_before": before.forward_kl,
        "kl_after": after.forward_kl,
        "mean_k": after.mean_k,
        "dead_experts": after.dead_experts,
        "dead_layers": int((used_L <= 1).sum()),
        "step_s": statistics.median(seconds[2:] or seconds),
    }


class World:
    """What all pairs share: the teacher, the partition, and the text.

    Args:
        config: any pair's settings.
        steps: rows to train on.
        smoke: a tiny random model and random text.
    """

    def __init__(self, config: RunConfig, steps: int, *, smoke: bool) -> None:
        device = pick_device(config.train.device)
        self.dense: PreTrainedModel
        self.calibration: list[PackedRow]
        if smoke:
            self.dense = random_dense("tiny", config, str(device))
            vocab, tokens = self.dense.config.get_text_config().vocab_size, config.data.row_tokens
            lengths = (tokens // 2, tokens)
            drawn = random_rows(vocab, tokens, documents=lengths, num_rows=steps + 2)
            self.training, self.held_out = drawn[:steps], drawn[-1:]
            self.calibration, self.threshold_rows = drawn[:1], drawn[1:2]
        else:
            self.dense, tokenizer = load_dense(config.teacher, device)
            self.calibration = calibration_rows(config, tokenizer, device)
            self.threshold_rows = threshold_rows(config, tokenizer, device)
            stream = training_rows(config, tokenizer)
            self.training = [next(stream) for _ in range(steps)]
            data = config.data
            self.held_out = held_out_rows(data, tokenizer, data.row_tokens, data.eval_tokens)
        self.inputs = MlpInputs(self.dense, self.calibration)
        self.order = partition(config, self.inputs)


def read_rows(folder: Path | None, wanted: Mapping[str, object]) -> list[dict[str, Any]]:
    """The rows of a record that was made with the same settings; none without one."""
    path = None if folder is None else folder / f"{NAME}.json"
    if path is None or not path.is_file():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    return record["rows"] if record["settings"] == wanted else []


def render(record: Mapping[str, Any] | None) -> str:
    """The table of the docs, with a line on how it was made; without a record, how to make one."""
    command = "python -m experiments.routing_rules"
    if record is None:
        return f"Not measured yet: `{command}`."
    rows, made, machine = record["rows"], record["settings"], record["environment"]
    base = next(row["step_s"] for row in rows if (row["selection"], row["objective"]) == BASELINE)
    lines = [
        f"`{command}`: {made['steps']} steps of {made['row_tokens']:,} tokens from the embedded"
        f" teacher's weights, {made['eval_tokens']:,} held-out tokens, seed 0,"
        f" {machine.get('gpu', machine['machine'])}, torch {machine['versions']['torch']}. KL to"
        " the teacher in nats per token; time of a step by that of `top_k` with `task`.",
        "",
        "| selection | objective | KL before | KL after | mean k | dead experts | dead layers |"
        " time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"`{row['selection']}`", f"`{row['objective']}`"]
        if "refused" in row:
            lines.append(f"| {' | '.join(cells)} | refused: {row['refused']} | | | | | |")
            continue
        cells += [f"{row['kl_before']:.3f}", f"{row['kl_after']:.3f}", f"{row['mean_k']:.2f}"]
        cells += [str(row["dead_experts"]), str(row["dead_layers"]), f"{row['step_s'] / base:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    """The page with the rendered record between its markers."""
    return pages.filled(text, {"routing rules": f"{render(read_record())}\n"}, BEGIN, END)


def read_record(folder: Path = RESULTS) -> dict[str, Any] | None:
    """The committed record, if there is one."""
    path = folder / f"{NAME}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def refusal(error: UserError) -> str:
    """The reason in a refusal: what stands between what is expected and the remedy."""
    return str(error).partition(": ")[2].rpartition("; ")[0].partition('": ')[2] or str(error)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the pairs that are missing; the record, written after each of them."""
    quiet_transformers()
    folder = results_folder(arguments)
    made = {
        "steps": arguments.steps,
        "row_tokens": arguments.row_tokens,
        "device": arguments.device,
        "eval_tokens": load_config(None, "demo", []).data.eval_tokens,
        "smoke": arguments.smoke,
    }
    rows = read_rows(folder, made)
    world, record = None, {}
    for selection, objective in PAIRS:
        if (selection, objective) in {(row["selection"], row["objective"]) for row in rows}:
            continue
        row: dict[str, Any] = {"selection": selection, "objective": objective}
        try:
            config = settings(selection, objective, arguments)
        except UserError as error:
            rows.append({**row, "refused": refusal(error)})
            continue
        world = world or World(config, arguments.steps, smoke=arguments.smoke)
        rows.append({**row, **measure_pair(config, world)})
        record = finish(rows, made, folder, arguments.device)
    return record or finish(rows, made, folder, arguments.device)


def finish(
    rows: Sequence[Mapping[str, Any]], made: Mapping[str, Any], folder: Path | None, device: str
) -> dict[str, Any]:
    """Print and write the record of the rows so far."""
    times = {(r["selection"], r["objective"]): r["step_s"] for r in rows if "step_s" in r}
    ratios: dict[str, float | None] = {
        f"{pair[0]} {pair[1]} / top_k task, step time": seconds / times[BASELINE]
        for pair, seconds in times.items()
        if BASELINE in times
    }
    return report(
        NAME,
        rows,
        ratios,
        folder,
        parity="every loss finite",
        settings=dict(made),
        environment=environment(device),
    )


def main() -> None:
    """Measure what is missing and write the record."""
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--row-tokens", type=int, default=1024)
    arguments = options.parse_args()
    if arguments.smoke:
        arguments.steps, arguments.row_tokens = 2, 64
    run(arguments)


if __name__ == "__main__":
    main()
