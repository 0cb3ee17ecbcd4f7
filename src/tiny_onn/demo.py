"""The demonstration: convert, distill, and compare with two controls trained just as long.

All three arms start from the same experts, see the same text in the same order with the same
optimizer, and are measured on the same held-out rows at the same mean number of active experts.
Only the choice of experts differs: by the recipe's router, always the same ones (the k of largest
mean output norm on calibration text), or by a frozen random gate.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tiny_onn.console import stage
from tiny_onn.data import check_vocabulary
from tiny_onn.evaluate import Evaluation
from tiny_onn.ops.crossover import choose_path
from tiny_onn.prepare import (
    Conversion,
    Prepared,
    calibration_rows,
    check_conversion,
    make_student,
    partition,
    with_router,
)
from tiny_onn.run_folder import write_json
from tiny_onn.settings import load_config
from tiny_onn.teacher import load_dense, pick_device, quiet_transformers, teacher_for
from tiny_onn.train import RunResult, run_distill

NUMBERS = ("KL", "agreement", "perplexity", "mean k", "FFN", "total")
CONTROLS = (("static choice", "static"), ("random routing", "random"))


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
    config = load_config(None, "demo", overrides)
    device = pick_device(config.train.device)
    with stage("Loading the embedded teacher"):
        dense, tokenizer = load_dense(config.teacher, device)
        check_vocabulary(tokenizer, dense.config.get_text_config().vocab_size)
        plain = config.teacher.placement == "shared" and config.teacher.quantization == "none"
        # Every arm is cut from the dense weights, so what quantises them gets a copy.
        teacher = (
            dense if plain else teacher_for(dense, replace(config.teacher, placement="separate"))
        )
    with stage("Reading the embedded text"):
        rows = calibration_rows(config, tokenizer, device)
        order = partition(config, dense, rows)
    arms = {"student": config} | {
        name: with_router(config, selection=selection, objective="none")
        for name, selection in CONTROLS
    }
    results: dict[str, RunResult] = {}
    checked: Conversion | None = None
    for number, (name, arm) in enumerate(arms.items(), start=1):
        with stage(f"[{number}/{len(arms)}] {name}: converting"):
            student = make_student(arm, dense, rows, order)
            # All arms start from the same experts: one check holds for all.
            checked = checked or check_conversion(config, student, dense, rows)
        prepared = Prepared(
            teacher=teacher,
            student=student,
            tokenizer=tokenizer,
            conversion=replace(checked, expert_path=choose_path(arm, device.type)),
        )
        results[name] = run_distill(
            arm,
            out=out / name.replace(" ", "-").lower(),
            prepared=prepared,
            title=f"[{number}/{len(arms)}] {name}",
        )
        if results[name].interrupted:
            raise KeyboardInterrupt
    seconds = time.perf_counter() - started
    summary: dict[str, object] = {
        "arms": {
            name: {"before": r.before.as_dict(), "after": r.after.as_dict(), "tokens": r.tokens}
            for name, r in results.items()
        },
        "seconds": seconds,
        "seed": config.train.seed,
    }
    write_json(out / "demo.json", summary)
    Console().print(comparison(results))
    tokens = next(iter(results.values())).tokens
    Console().print(
        f"Each arm learned from {tokens:,} tokens, seed {config.train.seed}; all in "
        f"{seconds:.0f} s. Run folder: {out}\n"
        f'Next: tiny-onn generate {out / "student"} --prompt "A list is"',
        highlight=False,
    )
    return summary


def comparison(results: dict[str, RunResult]) -> Table:
    """Teacher, student before and after, and the controls after, on the same held-out rows."""
    table = Table(title="Held-out text: distance to the teacher; forward MFLOPs per token")
    table.add_column("model")
    for column in NUMBERS:
        table.add_column(column, justify="right")
    first = next(iter(results.values()))
    after = first.after
    table.add_row(
        "teacher",
        "0",
        "100.0%",
        f"{after.teacher_perplexity:.2f}",
        "all",
        f"{after.dense_ffn_flops / 1e6:.1f}",
        f"{after.dense_total_flops / 1e6:.1f}",
    )
    table.add_row("student, untrained", *_cells(first.before))
    for name, result in results.items():
        table.add_row(name, *_cells(result.after))
    return table


def _cells(result: Evaluation) -> tuple[str, ...]:
    return (
        f"{result.forward_kl:.4f}",
        f"{result.top1_agreement:.1%}",
        f"{result.student_perplexity:.2f}",
        f"{result.mean_k:.2f}",
        f"{result.ffn_flops / 1e6:.1f}",
        f"{result.total_flops / 1e6:.1f}",
    )
