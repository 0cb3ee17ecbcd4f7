"""Does a budget hold on text that nobody trained on, and on sources that nobody saw?

A student is converted (and with `--tokens` trained), its thresholds are settled in several ways,
and its mean k is counted on fragments of 512 tokens from many documents: held-out ones of the text
(`mixed`) and ones of other sources (`unseen`).

    python -m experiments.documentation --debs debs --out documentation
    python -m experiments.budgets --text documentation --unseen fortunes git-doc gimp-help-en \
        vim-doc [--tokens 262144] [--device cuda]

`--unseen` names files of the folder `--text` by their stems, which are then no source of the run.
The ways are `training text` (rows behind the calibration rows, as before November 2026), `own
documents` (`data.settling_fraction`) and `sequence` (the same, and the thresholds follow each
sequence: `routing_controller`). The record is `results/budgets.json`; it ends in one JSON line.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment
from experiments.options import parser, results_folder
from tiny_onn.config.read import load_config, override
from tiny_onn.config.schema import DataConfig, RunConfig
from tiny_onn.conversion.pipeline import Prepared, prepare
from tiny_onn.data.packing import PackedRow
from tiny_onn.data.settling import spread, threshold_rows
from tiny_onn.data.stream import TokenStream
from tiny_onn.device import prepare_device
from tiny_onn.distill.loop import run_distill
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import last_hidden_states
from tiny_onn.model.experts import recorded_routings
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.routing.budgets import fill_threshold_tables, set_budget
from tiny_onn.routing.document_k import DocumentK
from tiny_onn.routing.statistics import RoutingStats

NAME = "budgets.json"
BUDGETS = (8.0, 16.0, 24.0)
FRAGMENT = 512
WAYS = {"training text": 0.0, "own documents": 0.05}
SMOKE = ("experts.num_experts=32", "train.compile=false", "experts.calibration_tokens=512")


def sample(data: DataConfig, prepared: Prepared, tokens: int) -> list[PackedRow]:
    """Fragments of the held-out documents, spread over their sources."""
    device = prepared.student.device
    stream = TokenStream(
        data, prepared.tokenizer, split="held_out", seed=0, row_tokens=min(FRAGMENT, tokens)
    )
    return [row.to(device) for row in spread(stream, -(-tokens // FRAGMENT))]


@torch.no_grad()
def measured(student: TinyOnnForCausalLM, rows: Sequence[PackedRow]) -> dict[str, float | None]:
    """Mean k over the rows, with its standard error over documents."""
    banks = student.banks()
    stats, documents = RoutingStats.zeros(banks), DocumentK()
    for row in rows:
        with recorded_routings(banks) as routings:
            last_hidden_states(student, row.input_ids, **packed_kwargs(row))
        stats.add(routings, row)
        documents.add(routings, row)
    return {"mean_k": stats.summary()["mean_k"], "standard_error": documents.standard_error()}


def rows_of(config: RunConfig, prepared: Prepared, texts: dict[str, list[PackedRow]]) -> Any:
    """Yield what every way of settling gives at every budget on every text."""
    student = prepared.student.eval()
    for way, fraction in WAYS.items():
        settled = override(config, [f"data.settling_fraction={fraction}"])
        fill_threshold_tables(student, threshold_rows(settled, prepared.tokenizer, student.device))
        controllers = ("none", "sequence") if fraction else ("none",)
        for controller in controllers:
            student.routing_controller = controller
            for budget in BUDGETS:
                set_budget(student, budget)
                for text, rows in texts.items():
                    found = measured(student, rows)
                    name = way if controller == "none" else controller
                    yield {"way": name, "budget": budget, "text": text, **found}
        student.routing_controller = "none"


def main() -> int:
    """Convert, train if asked for, settle and count."""
    options = parser(__doc__)
    options.add_argument("--teacher", default="embedded")
    options.add_argument("--text", type=Path, help="folder of .jsonl files, one for each source")
    options.add_argument("--unseen", nargs="+", default=[], help="stems of the files left out")
    options.add_argument("--tokens", type=int, default=0, help="training tokens; 0: none")
    options.add_argument("--eval-tokens", type=int, default=65_536)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--set", action="append", default=[], help="SECTION.KEY=VALUE")
    arguments = options.parse_args()
    files = sorted(arguments.text.glob("*.jsonl")) if arguments.text else []
    sources = [str(file) for file in files if file.stem not in arguments.unseen] or ["embedded"]
    others = [str(file) for file in files if file.stem in arguments.unseen]
    overrides = [
        f"teacher.path={json.dumps(arguments.teacher)}",
        f"data.sources={json.dumps(sources)}",
        f"train.device={arguments.device}",
        f"train.seed={arguments.seed}",
        f"train.tokens={max(1, arguments.tokens)}",
        *(SMOKE if arguments.smoke else ()),
        *arguments.set,
    ]
    config = prepare_device(load_config(None, "demo", overrides))[0]
    prepared = prepare(config)
    if arguments.tokens:
        with tempfile.TemporaryDirectory() as folder:
            run_distill(config, out=Path(folder) / "run", prepared=prepared)
    tokens = 512 if arguments.smoke else arguments.eval_tokens
    texts = {"mixed": sample(config.data, prepared, tokens)}
    if others:
        # Documents of sources that nobody saw are all held out.
        unseen = replace(config.data, sources=tuple(others), held_out_fraction=0.999)
        texts["unseen"] = sample(unseen, prepared, tokens)
    rows = []
    for row in rows_of(config, prepared, texts):
        rows.append(row)
        error, budget = row["standard_error"], row["budget"]
        shown = "unknown" if error is None else f"{error / budget:.1%}"
        print(
            f"{row['way']:14s} {row['text']:7s} budget {budget:4g}: mean k {row['mean_k']:.2f}"
            f" ({row['mean_k'] / budget - 1:+.1%}), standard error {shown}",
            flush=True,
        )
    settings = {
        "teacher": Path(arguments.teacher).name,
        "sources": [Path(source).stem for source in sources],
        "unseen": arguments.unseen,
        "tokens": arguments.tokens,
        "eval_tokens": tokens,
        "calibration_tokens": config.experts.calibration_tokens,
        "seed": arguments.seed,
    }
    record = {"settings": settings, "rows": rows, "environment": environment(arguments.device)}
    if (folder := results_folder(arguments)) is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
