"""The demonstration: convert, distill, and compare with two controls that train equally long.

All arms start from the same experts, see the same text in the same order with the same optimizer,
and are measured on the same held-out rows at the same mean number of active experts. The selection
differs: by the trained router, always the same experts (the k with the largest mean output norm on
calibration text), or by a frozen random gate. The controls learn at a higher rate, which is better
for them.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_onn.config.read import load_config, with_expert_lr, with_router
from tiny_onn.config.schema import RouterConfig, RunConfig
from tiny_onn.console import say, status
from tiny_onn.conversion import pipeline
from tiny_onn.conversion.pipeline import Prepared, make_student, partition, read_inputs
from tiny_onn.conversion.verify import Conversion, check_conversion
from tiny_onn.data.passages import held_out_passages
from tiny_onn.device import prepare_device
from tiny_onn.distill.loop import AfterStep, run_distill
from tiny_onn.distill.run_log import RunResult
from tiny_onn.distill.stages import step_tokens
from tiny_onn.distill.start_checks import check_sizes
from tiny_onn.evaluation.evaluate import Bench, budget_report, shown_k
from tiny_onn.evaluation.frontier import measure_frontier, write_frontier
from tiny_onn.evaluation.run_view import keep_view, measure_view
from tiny_onn.model.expert_path import choose_path
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.runs.files import write_json
from tiny_onn.runs.records import Evaluation
from tiny_onn.runs.students import LoadedStudent
from tiny_onn.studies.report import run_report
from tiny_onn.teacher.held_out import HeldOut
from tiny_onn.teacher.load import teacher_for

NUMBERS = ("KL", "agreement", "perplexity", "k / target", "FFN", "total")
STUDENT = "student"
# The controls, each with its rate of the experts over the student's: the best that was tried
# (docs/recipes.md).
CONTROLS = (("static choice", "static", 2.75), ("random routing", "random", 5.5))
# The budgets of the student's frontier, as shares of the number of experts.
FRONTIER_SHARES = (0.75, 0.5, 0.25)
# The demo should end in so many seconds; where it would not, an arm takes a share of its steps.
DEADLINE_S = 360.0
SHARES = (2 / 3, 1 / 2, 1 / 3, 1 / 6)
# Work besides training, as the number of tokens that are trained on in that time: evaluations,
# gates and saving after the first steps, and what is repeated when the arms start again.
OTHER_TOKENS, RESTART_TOKENS = 7168, 3072
# The student's frontier takes five or six passes over the held-out rows.
FRONTIER_TOKENS = 4096


class TooSlow(Exception):  # noqa: N818 - it ends an arm, and is no error
    """The demo would not end by its deadline.

    Attributes:
        tokens: the number of training tokens per arm with which the demo ends in time.
        step_s: the seconds that a step takes.
    """

    def __init__(self, tokens: int, step_s: float) -> None:
        super().__init__(f"a step takes {step_s:.1f} s")
        self.tokens, self.step_s = tokens, step_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """The models, text and experts that all arms start from."""

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    inputs: MlpInputs
    order: Sequence[Int[Tensor, " neurons"]] | None
    """The order of the neurons in the experts, by layer."""
    held_out: HeldOut
    device: torch.device


def run_demo(out: Path, overrides: Sequence[str] = ()) -> dict[str, object]:
    """Run the preset `demo` and its controls, print the table, and write `demo.json` and a report.

    If the first steps show that the demo would not end by `DEADLINE_S`, the arms start again with
    fewer steps, unless `overrides` name `train.tokens`.

    Args:
        out: a new folder, in which each arm's run has a folder of its own.
        overrides: settings that override the preset, as `--set` takes them.

    Raises:
        UserError: the settings are wrong, or the folder cannot be written.
    """
    started = time.perf_counter()
    config, device = prepare_device(load_config(None, "demo", overrides))
    shared = share(config, device)

    def watch(step: int, seconds: float) -> None:
        # The first step also compiles, so that the second one is the first typical step.
        if step == 2:
            check_deadline(config, time.perf_counter() - started, seconds)

    fixed = any(text.strip().startswith("train.tokens") for text in overrides)
    results: dict[str, RunResult] = {}
    fewer = 0
    try:
        results = run_arms(config, shared, out, None if fixed else watch)
    except TooSlow as slow:
        fewer = slow.tokens
        say(
            f"A step takes {slow.step_s:.1f} s here. The demo starts again with {fewer:,} training"
            f" tokens per arm instead of {config.train.tokens:,}, and the experts' learning rate in"
            f" proportion, so that it ends in about {DEADLINE_S / 60:.0f} minutes; --set"
            f" train.tokens={config.train.tokens} keeps the full length"
        )
    # The exception keeps the first arm's student and optimizer in memory, so the restart happens
    # after its handler.
    if fewer:
        shutil.rmtree(out / STUDENT)
        results = run_arms(shortened(config, fewer), shared, out, None)
    late = time.perf_counter() - started + FRONTIER_TOKENS * token_seconds(results[STUDENT])
    if late > DEADLINE_S:
        say(
            "The student is not measured at other budgets, so that the demo ends in time; `tiny-onn"
            f" eval {out / STUDENT} --frontier --out {out / STUDENT}` does that"
        )
        exact: list[dict[str, Any]] = []
    else:
        exact = student_frontier(out / STUDENT, results[STUDENT], config)["exact"]
    seconds = time.perf_counter() - started
    summary: dict[str, object] = {
        "arms": {
            name: {
                "before": asdict(r.before) if r.before else None,
                "after": asdict(after_of(r)),
                "tokens": r.tokens,
            }
            for name, r in results.items()
        },
        "budget": budget_report(after_of(results[STUDENT]).mean_k, config.router),
        "at_k": exact,
        "dtype": config.teacher.dtype,
        "seconds": seconds,
        "seed": config.train.seed,
    }
    write_json(out / "demo.json", summary)
    Console().print(comparison(results, config.router, exact))
    page = _report(out, results[STUDENT], config)
    rates = " and ".join(f"{rate:g}" for _, _, rate in CONTROLS)
    Console().print(
        f"Each arm learned from {results[STUDENT].tokens:,} tokens, seed {config.train.seed}, in"
        f" {config.teacher.dtype}; controls at {rates} times the student's rate; all in"
        f" {seconds:.0f} s. Run folder: {out}\nReport, for a browser: {page}\n"
        f'Next: tiny-onn generate {out / STUDENT} --prompt "A list is"',
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
    )
    return summary


def token_seconds(result: RunResult) -> float:
    """Return the mean time that an arm trains on a token."""
    return result.seconds / max(1, result.tokens)


def student_frontier(folder: Path, result: RunResult, config: RunConfig) -> dict[str, Any]:
    """Measure the student in memory at several budgets, for its report and at exactly its target.

    Args:
        folder: the student's run folder, which gets the files of `tiny-onn eval --frontier`.
        result: the student's run.
        config: the student's settings.

    Returns:
        The frontier, see `measure_frontier`.
    """
    prepared = result.prepared
    bench = Bench(
        loaded=LoadedStudent(
            student=prepared.student,
            tokenizer=prepared.tokenizer,
            config=config,
            step=-(-result.tokens // step_tokens(config)),
            of_run=True,
            named_teacher=None,
        ),
        dense=prepared.teacher,
        passages=held_out_passages(
            config.data, prepared.tokenizer, stride=None, max_tokens=config.data.eval_tokens
        ),
        source="held-out text of " + ", ".join(config.data.sources),
        text=prepared.held_out,
    )
    budgets = [float(round(share * config.experts.num_experts)) for share in FRONTIER_SHARES]
    exact = [config.router.target_k]
    frontier = {"model": str(folder), **measure_frontier(bench, budgets, exact)}
    write_frontier(frontier, folder)
    return frontier


def _report(out: Path, student: RunResult, config: RunConfig) -> Path:
    """Write the page about all arms, with single tokens measured on the student in memory."""
    prepared = student.prepared
    with status("Measuring single tokens"):
        view = measure_view(
            prepared.student,
            prepared.teacher,
            prepared.tokenizer,
            prepared.held_out.rows,
            config.loss,
        )
        keep_view(out / STUDENT, view)
    return run_report([out])


def share(config: RunConfig, device: torch.device) -> Shared:
    """Load the teacher, read the text, and cut the MLPs into experts."""
    check_sizes(config)
    inputs, tokenizer, rows = read_inputs(config, device)
    plain = config.teacher.placement == "shared" and config.teacher.quantization == "none"
    # Every arm is cut from the dense weights, so a quantised teacher gets a copy of them.
    separate = replace(config.teacher, placement="separate")
    teacher = inputs.dense if plain else teacher_for(inputs.dense, separate)
    with status("Cutting the MLPs into experts"):
        order = partition(config, inputs)
    return Shared(
        teacher=teacher,
        tokenizer=tokenizer,
        inputs=inputs,
        order=order,
        held_out=HeldOut(teacher, rows),
        device=device,
    )


def run_arms(
    config: RunConfig, shared: Shared, out: Path, watch: AfterStep | None
) -> dict[str, RunResult]:
    """Convert and train the student and its controls, each in a folder of its own.

    Args:
        config: the student's settings.
        shared: the models, text and experts that all arms start from.
        out: the folder in which the arms' folders are created.
        watch: called after each of the student's steps with its number and seconds; None: nothing.

    Raises:
        KeyboardInterrupt: an arm was stopped.
    """
    arms = {STUDENT: config}
    for name, selection, rate in CONTROLS:
        control = with_expert_lr(config, rate * config.optim.expert_lr)
        arms[name] = with_router(control, selection=selection, objective="none")
    results: dict[str, RunResult] = {}
    checked: Conversion | None = None
    for number, (name, arm) in enumerate(arms.items(), start=1):
        title = f"[{number}/{len(arms)}] {name}"
        with status(f"{title}: converting"):
            student = make_student(arm, shared.inputs, shared.order)
        if checked is None:
            with status("Checking the conversion"):
                # All arms start from the same experts, so that one check holds for all.
                checked = check_conversion(config, student, shared.inputs)
        pipeline.refit_if_asked(arm, student, shared.inputs)
        prepared = Prepared(
            teacher=shared.teacher,
            student=student,
            tokenizer=shared.tokenizer,
            conversion=replace(
                checked,
                expert_path=choose_path(arm, shared.device, student.banks()[0].activation_name),
            ),
            held_out=shared.held_out,
        )
        is_student = name == STUDENT
        results[name] = run_distill(
            arm,
            out=out / name.replace(" ", "-"),
            prepared=prepared,
            title=title,
            # The table does not show the controls before training.
            evaluate_first=is_student,
            after_step=watch if is_student and watch else lambda _step, _seconds: None,
        )
        if results[name].interrupted:
            raise KeyboardInterrupt
    return results


def check_deadline(config: RunConfig, passed_s: float, step_s: float) -> None:
    """Stop the demo if its second step shows that it will not end by its deadline.

    Args:
        config: the student's settings.
        passed_s: the seconds since the demo began.
        step_s: the seconds of the second step.

    Raises:
        TooSlow: the demo will be late, and fewer steps would make it faster.
    """
    size, arms = step_tokens(config), 1 + len(CONTROLS)
    steps = -(-config.train.tokens // size)
    left = (DEADLINE_S - passed_s) * size / step_s - OTHER_TOKENS  # tokens
    if (arms * steps - 2) * size <= left:
        return
    lengths = [size * max(1, round(share * steps)) for share in SHARES]
    fitting = (length for length in lengths if arms * length <= left - RESTART_TOKENS)
    fewer = max(fitting, default=lengths[-1])
    if fewer < steps * size:
        raise TooSlow(fewer, step_s)


def shortened(config: RunConfig, tokens: int) -> RunConfig:
    """Return the settings with fewer training tokens, and the experts' rate in proportion.

    Three steps of 1,024 tokens at the rate of six left the student worse than it began.
    """
    expert_lr = config.optim.expert_lr * tokens / config.train.tokens
    return with_expert_lr(replace(config, train=replace(config.train, tokens=tokens)), expert_lr)


def after_of(result: RunResult) -> Evaluation:
    """Return the last evaluation of an arm, which exists because the arm was not interrupted."""
    assert result.after is not None
    return result.after


def comparison(
    results: dict[str, RunResult],
    router: RouterConfig,
    exact: Sequence[Mapping[str, Any]] = (),
) -> Table:
    """Return the table of teacher, student before and after training, and controls after it.

    Args:
        results: the runs by arm, the student's first.
        router: the student's settings.
        exact: the student's numbers at exactly some mean k, see `exact.at_exactly`.
    """
    first = next(iter(results.values()))
    table = Table(
        title=f"Held-out text after {first.tokens:,} training tokens per arm: distance to the"
        " teacher; forward MFLOPs per token"
    )
    table.add_column("model")
    for column in NUMBERS:
        table.add_column(column, justify="right")
    after = after_of(first)
    table.add_row(
        "teacher",
        "0",
        "100.0%",
        f"{after.teacher_perplexity:.2f}",
        "all",
        f"{after.dense_ffn_flops / 1e6:.1f}",
        f"{after.dense_total_flops / 1e6:.1f}",
    )
    if first.before is not None:
        table.add_row("student, untrained", *_cells(first.before, router))
    for name, result in results.items():
        table.add_row(name, *_cells(after_of(result), router if result is first else None))
        for numbers in exact if result is first else ():
            table.add_row(
                f"{name}, at exactly k = {numbers['mean_k']:g}",
                f"{numbers['forward_kl']:.4f}",
                f"{numbers['top1_agreement']:.1%}",
                f"{numbers['student_perplexity']:.2f}",
                f"{numbers['mean_k']:.2f}",
                f"{numbers['ffn_flops'] / 1e6:.1f}",
                f"{numbers['total_flops'] / 1e6:.1f}",
            )
    return table


def _cells(result: Evaluation, router: RouterConfig | None) -> tuple[str, ...]:
    """Return the numbers of a row; `router` is given for an arm with a budget."""
    return (
        f"{result.forward_kl:.4f}",
        f"{result.top1_agreement:.1%}",
        f"{result.student_perplexity:.2f}",
        f"{result.mean_k:.2f}" if router is None else shown_k(result.mean_k, router),
        f"{result.ffn_flops / 1e6:.1f}",
        f"{result.total_flops / 1e6:.1f}",
    )
