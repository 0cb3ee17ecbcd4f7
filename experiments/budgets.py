"""Does a budget hold on text that nobody trained on, and on sources that nobody saw?

A student is converted (and with `--tokens` trained), its thresholds are settled in several ways,
and its mean k is counted on rows that are spread over held-out text (`mixed`) and over other
sources (`unseen`).

    python -m experiments.documentation --debs debs --out documentation
    python -m experiments.budgets --text documentation --unseen fortunes git-doc gimp-help-en \
        vim-doc [--budgets 8 16 24] [--tokens 262144] [--device cuda]

`--text` is what `experiments.arms` reads, and `--unseen` names sources that are then none of the
run. `--settling-tokens` is how much text settles thresholds. The ways are `training text` (rows
behind the calibration rows), `own documents` (`data.settling_fraction`) and `sequence` (the same,
and the thresholds follow each sequence: `routing_controller`, which takes its thresholds from the
student's table of budgets, and their scale). The record also has mean k by place in a document.
The record is `results/budgets.json`, which grows with each measurement; the last line printed is
its rows in JSON.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, environment
from docs.tools import pages
from experiments.blockwise import tiny_teacher
from experiments.options import RESULTS, mistakes_told, parser, results_folder
from experiments.split_text import split, tiny_text
from tiny_onn.config.read import load_config, override
from tiny_onn.config.schema import RunConfig
from tiny_onn.conversion.pipeline import Prepared, prepare
from tiny_onn.data.packing import PackedRow
from tiny_onn.data.rows import evenly, text_rows
from tiny_onn.data.settling import threshold_rows
from tiny_onn.device import prepare_device
from tiny_onn.distill.loop import run_distill
from tiny_onn.errors import UserError
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import last_hidden_states
from tiny_onn.model.experts import recorded_routings
from tiny_onn.model.router import temporary_rules
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.routing.budgets import finish_tables, fit_eval_thresholds, set_budget
from tiny_onn.routing.document_k import DocumentK
from tiny_onn.routing.statistics import RoutingStats
from tiny_onn.runs.files import write_atomically

NAME = "budgets.json"
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- {name}: begin -->", "<!-- {name}: end -->"
WAYS = {"training text": 0.0, "own documents": 0.05, "sequence": 0.05}
PLACES = (0, 16, 64, 256, 1024, 2048)
SMOKE = (
    "teacher.dtype=float32",
    "train.compile=false",
    "data.row_tokens=64",
    "experts.num_experts=32",
    "experts.calibration_tokens=256",
)


@torch.no_grad()
def measured(student: TinyOnnForCausalLM, rows: Sequence[PackedRow]) -> dict[str, Any]:
    """Mean k over the rows, its standard error over documents, and mean k by place.

    A token's place is the number of tokens of its document before it.
    """
    banks = student.banks()
    stats, documents = RoutingStats.zeros(banks), DocumentK()
    bounds, sums_2P = torch.tensor(PLACES[1:]), torch.zeros(2, len(PLACES), dtype=torch.float64)
    for row in rows:
        with recorded_routings(banks) as routings:
            last_hidden_states(student, row.input_ids, **packed_kwargs(row))
        stats.add(routings, row)
        documents.add(routings, row)
        k_T = torch.stack([r.active.sum(-1) for r in routings]).double().mean(0).cpu()
        mask_T = row.router_mask[0].double().cpu()
        place_T = torch.bucketize(row.position_ids[0].cpu(), bounds, right=True)
        sums_2P.index_add_(1, place_T, torch.stack([k_T * mask_T, mask_T]))
    places = [
        {"from": place, "mean_k": float(k / n), "share": float(n / sums_2P[1].sum())}
        for place, k, n in zip(PLACES, *sums_2P, strict=True)
        if n
    ]
    mean_k, error = stats.summary()["mean_k"], documents.standard_error()
    return {"mean_k": mean_k, "standard_error": error, "places": places}


def rows_of(
    config: RunConfig,
    prepared: Prepared,
    texts: dict[str, list[PackedRow]],
    ways: Sequence[str],
    budgets: Sequence[float],
) -> Iterator[dict[str, Any]]:
    """Yield what every way of settling gives at every budget on every text."""
    student = prepared.student.eval()
    routers = [bank.router for bank in student.banks()]
    for way in ways:
        settled = override(config, [f"data.settling_fraction={WAYS[way]}"])
        settling = threshold_rows(settled, prepared.tokenizer, student.device)
        if way == "sequence":
            fit_eval_thresholds(student, settling)
            finish_tables(student, settling)
            student.routing_controller = "sequence"
        scale = {"scale": student.config.sequence_scale} if way == "sequence" else {}
        for budget in budgets:
            rules = [replace(router.rule, target_k=budget) for router in routers]
            with temporary_rules(routers, rules):
                if way == "sequence":
                    set_budget(student, budget)
                else:
                    fit_eval_thresholds(student, settling)
                for text, rows in texts.items():
                    found = measured(student, rows)
                    yield {"way": way, "budget": budget, "text": text, **found, **scale}
        student.routing_controller = "none"


def check_budgets(budgets: Sequence[float], config: RunConfig) -> None:
    """Refuse a budget that the student's routers cannot have, before the work on the others.

    Raises:
        UserError: A budget is outside S + 1 ... E, where S of E experts are shared.
    """
    least, most = config.experts.num_shared + 1, config.experts.num_experts
    if bad := [f"{budget:g}" for budget in budgets if not least <= budget <= most]:
        raise UserError(
            f"--budgets: got {', '.join(bad)}, expected {least} to {most} (experts.num_shared + 1"
            " to experts.num_experts); choose budgets in between"
        )


def made(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Convert, train if asked for, settle and count; yield the measurements and print them.

    Raises:
        UserError: A budget, the text or a setting is unfit.
    """
    parts = split(arguments.text, folder, arguments.unseen, unseen_option="--unseen")
    overrides = [
        f"teacher.path={json.dumps(str(arguments.teacher))}",
        f"data.sources={json.dumps([str(parts.learn)])}",
        f"train.device={arguments.device}",
        f"train.seed={arguments.seed}",
        f"train.tokens={max(1, arguments.tokens)}",
        *(SMOKE if arguments.smoke else ()),
        *arguments.set,
    ]
    config = prepare_device(load_config(None, "demo", overrides))[0]
    check_budgets(arguments.budgets, config)
    prepared = prepare(config)
    if arguments.tokens:
        run_distill(config, out=folder / "run", prepared=prepared)
    device, data = prepared.student.device, config.data
    number = max(1, arguments.eval_tokens // data.row_tokens)
    paths = {"mixed": parts.report, "unseen": parts.unseen}
    texts = {
        name: [
            r.to(device) for r in evenly(text_rows(path, prepared.tokenizer, data, 2**40), number)
        ]
        for name, path in paths.items()
        if path is not None
    }
    settled = replace(config, data=replace(data, settling_tokens=arguments.settling_tokens))
    for row in rows_of(settled, prepared, texts, arguments.ways, arguments.budgets):
        error, budget = row["standard_error"], row["budget"]
        shown = "unknown" if error is None else f"{error / budget:.1%}"
        print(
            f"{row['way']:14s} {row['text']:7s} budget {budget:4g}: mean k {row['mean_k']:.2f}"
            f" ({row['mean_k'] / budget - 1:+.1%}), standard error {shown}",
            flush=True,
        )
        yield row


def render(record: dict[str, Any] | None) -> str:
    """The tables of mean k by way of settling, and by place in a document."""
    if record is None:
        return pages.no_record("python -m experiments.budgets")
    asked, place = record["settings"], record["environment"]
    lines = [
        f"A student of {asked['teacher']} after {asked['tokens']:,} training tokens, with"
        f" thresholds of {asked['settling_tokens']:,} tokens, on {asked['eval_tokens']:,} of each"
        f" text ({place.get('gpu') or place['machine']}, {place['time'][:10]}).",
        "",
        "| thresholds | text | target k | mean k | off target | standard error |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        k, mean, error = row["budget"], row["mean_k"], row["standard_error"]
        shown = "" if error is None else f"{error / k:.1%}".replace("%", " %")
        off = f"{mean / k - 1:+.1%}".replace("%", " %")
        lines.append(f"| {row['way']} | {row['text']} | {k:g} | {mean:.2f} | {off} | {shown} |")
    for row in record["rows"]:
        if row["way"] == "own documents":
            places = ", ".join(f"{p['mean_k']:.2f} from {p['from']:,}" for p in row["places"])
            lines += ["", f"Mean k by tokens before in the document, {row['text']}: {places}."]
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    """The page with the rendered record between its markers."""
    path = RESULTS / NAME
    record = json.loads(path.read_text("utf-8")) if path.is_file() else None
    return pages.filled(text, {"budgets": render(record)}, BEGIN, END)


def fill_in(arguments: argparse.Namespace, folder: Path) -> None:
    """Give a run without text a little of it, and a tiny run little to do."""
    if arguments.text is None:
        arguments.text = tiny_text(folder)
    if arguments.smoke:
        arguments.teacher = tiny_teacher(folder / "teacher")
        arguments.eval_tokens = arguments.settling_tokens = 1024


def main() -> int:
    """Convert, train if asked for, settle and count."""
    options = parser(__doc__)
    options.add_argument("--teacher", default="embedded")
    options.add_argument("--text", type=Path, help="JSON lines, also .xz, or a folder of them")
    options.add_argument("--unseen", nargs="+", default=[], help="sources that are set apart")
    options.add_argument("--tokens", type=int, default=0, help="training tokens; 0: none")
    options.add_argument("--settling-tokens", type=int, default=131_072)
    options.add_argument("--eval-tokens", type=int, default=131_072, help="of each text")
    options.add_argument("--budgets", type=float, nargs="+", default=[8.0, 16.0, 24.0])
    options.add_argument("--ways", nargs="+", default=[*WAYS], choices=[*WAYS])
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--set", action="append", default=[], help="SECTION.KEY=VALUE")
    arguments = options.parse_args()
    if (out := results_folder(arguments)) is not None:
        out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        fill_in(arguments, Path(temporary))
        settings = {
            **{name: getattr(arguments, name) for name in ("unseen", "tokens", "seed", "set")},
            "teacher": Path(arguments.teacher).name,
            "text": Path(arguments.text).name,
            "eval_tokens": arguments.eval_tokens,
            "settling_tokens": arguments.settling_tokens,
        }
        for row in made(arguments, Path(temporary)):
            rows.append(row)
            place = environment(arguments.device)
            record = {"settings": settings, "rows": rows, "environment": place}
            if out is not None:
                write_atomically(out / NAME, json.dumps(record, indent=1) + "\n")
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    with mistakes_told():
        sys.exit(main())
