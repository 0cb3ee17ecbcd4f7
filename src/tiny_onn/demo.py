"""The demonstration: convert, distill, and compare with two controls trained just as long.

All three arms start from the same experts, see the same text in the same order with the same
optimizer, and are measured on the same held-out rows at the same mean number of active experts.
Only the choice of experts differs: by the recipe's router, always the same ones (the k of largest
mean output norm on calibration text), or by a frozen random gate.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_onn.assembly import assemble
from tiny_onn.config import RouterConfig, RunConfig
from tiny_onn.console import say, stage
from tiny_onn.data import check_vocabulary, held_out_rows
from tiny_onn.device import prepare_device
from tiny_onn.evaluate import Evaluation, shown_k
from tiny_onn.expert_path import choose_path
from tiny_onn.held_out import HeldOut
from tiny_onn.mlp_inputs import MlpInputs
from tiny_onn.modeling import TinyOnnForCausalLM
from tiny_onn.prepare import (
    Conversion,
    Prepared,
    calibration_rows,
    check_conversion,
    make_student,
    partition,
    training_rows,
    with_router,
)
from tiny_onn.run_folder import write_json
from tiny_onn.settings import load_config
from tiny_onn.step import distill_step
from tiny_onn.teacher import load_dense, quiet_transformers, teacher_for
from tiny_onn.train import RunResult, run_distill

NUMBERS = ("KL", "agreement", "perplexity", "mean k", "FFN", "total")
CONTROLS = (("static choice", "static"), ("random routing", "random"))
# Steps that each arm may take, and the time by which the demo should end.
STEPS_LADDER = (10, 6, 3, 1)
DEADLINE_S = 360.0
# Evaluations, thresholds and saving of all arms together take about as long as so many steps.
OTHER_STEPS = 15


def run_demo(out: Path, overrides: Sequence[str] = ()) -> dict[str, object]:
    """Run the preset `demo` and its controls, print the table, and write it to `out/demo.json`.

    Args:
        out: a new folder; each arm's run is in a folder of its own inside.
        overrides: settings over the preset, as for `--set`; they hold for all arms.

    Raises:
        UserError: bad settings, or no place to write.
    """
    quiet_transformers()
    started = time.perf_counter()
    config, device = prepare_device(load_config(None, "demo", overrides))
    with stage("Loading the embedded teacher"):
        dense, tokenizer = load_dense(config.teacher, device)
        check_vocabulary(tokenizer, dense.config.get_text_config().vocab_size)
        plain = config.teacher.placement == "shared" and config.teacher.quantization == "none"
        # Every arm is cut from the dense weights, so what quantises them gets a copy.
        teacher = (
            dense if plain else teacher_for(dense, replace(config.teacher, placement="separate"))
        )
    with stage("Reading the embedded text"):
        inputs, data = MlpInputs(dense, calibration_rows(config, tokenizer, device)), config.data
        rows = held_out_rows(data, tokenizer, data.row_tokens, data.eval_tokens)
        held_out = HeldOut(teacher, rows)
    with stage("Cutting the MLPs into experts"):
        order = partition(config, inputs)
    arms = {"student": config} | {
        name: with_router(config, selection=selection, objective="none")
        for name, selection in CONTROLS
    }
    results: dict[str, RunResult] = {}
    checked: Conversion | None = None
    for number, (name, arm) in enumerate(arms.items(), start=1):
        with stage(f"[{number}/{len(arms)}] {name}: converting"):
            student = make_student(arm, inputs, order)
        if checked is None:
            # All arms start from the same experts: one check and one measured step hold for all.
            with stage("Checking the conversion"):
                checked = check_conversion(config, student, inputs)
            if not any(text.startswith("train.tokens") for text in overrides):
                passed_s = time.perf_counter() - started
                tokens = tokens_in_time(config, student, teacher, tokenizer, passed_s)
                arms = {name: with_tokens(arm, tokens) for name, arm in arms.items()}
        prepared = Prepared(
            teacher=teacher,
            student=student,
            tokenizer=tokenizer,
            conversion=replace(checked, expert_path=choose_path(arm, device)),
            held_out=held_out,
        )
        results[name] = run_distill(
            arms[name],
            out=out / name.replace(" ", "-").lower(),
            prepared=prepared,
            title=f"[{number}/{len(arms)}] {name}",
        )
        if results[name].interrupted:
            raise KeyboardInterrupt
    seconds = time.perf_counter() - started
    summary: dict[str, object] = {
        "arms": {
            name: {"before": asdict(r.before), "after": asdict(after_of(r)), "tokens": r.tokens}
            for name, r in results.items()
        },
        "seconds": seconds,
        "seed": config.train.seed,
    }
    write_json(out / "demo.json", summary)
    Console().print(comparison(results, config.router))
    tokens = next(iter(results.values())).tokens
    Console().print(
        f"Each arm learned from {tokens:,} tokens, seed {config.train.seed}, in "
        f"{config.teacher.dtype}; all in {seconds:.0f} s. Run folder: {out}\n"
        f'Next: tiny-onn generate {out / "student"} --prompt "A list is"',
        highlight=False,
    )
    return summary


def with_tokens(config: RunConfig, tokens: int) -> RunConfig:
    """The same settings with another number of training tokens."""
    return replace(config, train=replace(config.train, tokens=tokens))


def tokens_in_time(
    config: RunConfig,
    student: TinyOnnForCausalLM,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passed_s: float,
) -> int:
    """The most training tokens an arm of `STEPS_LADDER` with which the demo ends by its deadline.

    Steps on the first training row are timed; the student is then what it was. The first step also
    compiles, so that a second one is timed if the first says that there is no time for all steps.
    """
    kept = [{k: v.clone() for k, v in bank.state_dict().items()} for bank in student.banks()]
    training = assemble(config, student, teacher)
    row, steps, step_s = next(training_rows(config, tokenizer)), 0, 0.0
    for _ in range(2):
        start = time.perf_counter()
        with stage("Timing a step"):
            inputs = (student, teacher, training.optimizer, [row], training.config)
            distill_step(*inputs)
        step_s = time.perf_counter() - start
        passed_s += step_s
        left = (DEADLINE_S - passed_s) / step_s - OTHER_STEPS
        fitting = [steps for steps in STEPS_LADDER if left >= (1 + len(CONTROLS)) * steps]
        steps = max(fitting, default=STEPS_LADDER[-1])
        if steps == STEPS_LADDER[0]:
            break
    for bank, state in zip(student.banks(), kept, strict=True):
        bank.load_state_dict(state)
    tokens = steps * config.data.row_tokens * config.train.rows_per_step
    if steps < STEPS_LADDER[0]:
        say(
            f"A step takes {step_s:.1f} s here: each arm learns from {tokens:,} tokens instead of"
            f" {config.train.tokens:,}, so that the demo ends in about {DEADLINE_S / 60:.0f}"
            f" minutes; --set train.tokens={config.train.tokens} takes them all"
        )
        return tokens
    return config.train.tokens


def after_of(result: RunResult) -> Evaluation:
    """The last evaluation of an arm, which is there because the arm was not interrupted."""
    assert result.after is not None
    return result.after


def comparison(results: dict[str, RunResult], router: RouterConfig) -> Table:
    """Teacher, student before and after, and the controls after, on the same held-out rows."""
    tokens = next(iter(results.values())).tokens
    table = Table(
        title=f"Held-out text after {tokens:,} training tokens an arm: distance to the teacher;"
        " forward MFLOPs per token"
    )
    table.add_column("model")
    for column in NUMBERS:
        table.add_column(column, justify="right")
    first = next(iter(results.values()))
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
    table.add_row("student, untrained", *_cells(first.before, router))
    for name, result in results.items():
        table.add_row(name, *_cells(after_of(result), router if result is first else None))
    return table


def _cells(result: Evaluation, router: RouterConfig | None) -> tuple[str, ...]:
    """A row's numbers; `router` is that of an arm with a budget."""
    return (
        f"{result.forward_kl:.4f}",
        f"{result.top1_agreement:.1%}",
        f"{result.student_perplexity:.2f}",
        f"{result.mean_k:.2f}" if router is None else shown_k(result.mean_k, router),
        f"{result.ffn_flops / 1e6:.1f}",
        f"{result.total_flops / 1e6:.1f}",
    )
