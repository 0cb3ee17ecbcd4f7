r"""How close a student gets to its teacher: recipes against controls, partitions stage by stage.

SmolLM2-135M-Instruct in 30 x 32 experts of 48 neurons, 16 active on average. Text: the embedded
corpus and the documentation of Django 5.2.19 (2.09M tokens together), so that no run reads a
training token twice; 5 % of the documents are held out.

    pip download --no-deps --no-binary :all: django==5.2.19 && tar -xzf django-5.2.19.tar.gz
    python -m experiments.quality --text django-5.2.19/docs --groups small partitions \
        --jobs 2 --threads 1
    python -m experiments.quality --text django-5.2.19/docs --groups long --device cuda --jobs 6
    python -m docs.tools        # the tables of docs/results.md from the records

Every run is a `tiny-onn distill` of its own process, several at once; its line goes to
`results/quality.jsonl` as soon as it is done, and a run that has its line is not made again. With
`--smoke`: one tiny run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import ROOT, environment
from docs.tools import pages
from experiments import arms_findings
from experiments.arms_table import read_records, spread
from experiments.blockwise import tiny_teacher
from experiments.options import RESULTS, parser

RECORDS, MIXED = RESULTS / "quality.jsonl", RESULTS / "arms.jsonl"
# The study of all arms, on a text without three of the sources, and the two before it.
CONTROLS = RESULTS / "arms_controls.jsonl"
IN_ORDER, SHORT_DECAY = RESULTS / "arms_in_order.jsonl", RESULTS / "arms_short_decay.jsonl"
# The study of arms on embedded text and a manual.
MANUAL = RESULTS / "arms_manual.jsonl"
PAGES = (ROOT / "docs" / "results.md", ROOT / "docs" / "studies.md")
BEGIN, END = "<!-- {name}: begin -->", "<!-- {name}: end -->"

BASE = (
    "data.row_tokens=4096",
    "data.eval_tokens=65536",
    "experts.init=learned",
    "experts.compensation=mean",
    "experts.calibration_tokens=131072",
    "loss.states_coef=4",
    "loss.states_scale=layer",
    "optim.name=adamw",
    "optim.expert_lr=4e-4",
    "optim.gate_lr=1e-3",
    "loss.chunk_tokens=1024",
    "train.eval_every_tokens=0",
    "train.stats_every_steps=0",
)
SMOKE = (
    "teacher.dtype=float32",
    "train.compile=false",
    "data.row_tokens=64",
    "data.eval_tokens=128",
    "experts.num_experts=8",
    "experts.calibration_tokens=128",
    "router.target_k=4",
    "train.blockwise_tokens=64",
    "train.tokens=128",
)
STATIC = ("router.selection=static", "router.objective=none")


@dataclass(frozen=True, slots=True)
class Arm:
    """A recipe: what it is called in a table, and its settings over `BASE`."""

    group: str
    name: str
    settings: tuple[str, ...]
    seeds: int

    def key(self, seed: int) -> tuple[str, str, int]:
        """What tells its record from others'."""
        return self.group, self.name, seed


LONG = ("train.tokens=1998848",)
# What two CPU cores do in two minutes a run.
SMALL = (
    "data.row_tokens=1024",
    "data.eval_tokens=8192",
    "experts.calibration_tokens=16384",
    "optim.expert_lr=5e-4",
    "optim.gate_lr=3e-4",
    "train.tokens=16384",
)
STAGED = (*SMALL, "experts.calibration_tokens=8192", "train.blockwise_tokens=8192")
RECIPES: dict[str, tuple[str, ...]] = {
    "recommended": (),
    "half-width dense": ("experts.init=importance", *STATIC),
    "frozen ridge gate": ("router.objective=none",),
    "static choice": STATIC,
    "random routing": ("router.selection=random", "router.objective=none"),
    "model card's rule": (
        "smk.surprise=parameters",
        "smk.direction=min",
        "smk.candidates=active",
    ),
    "without hidden states": ("loss.states_coef=0",),
}
PARTITIONS = ("slices", "cluster", "coactivation", "importance", "learned")
ARMS = (
    *(Arm("long", name, (*LONG, *extra), seeds=3) for name, extra in RECIPES.items()),
    *(Arm("small", name, (*SMALL, *extra), seeds=3) for name, extra in RECIPES.items()),
    *(Arm("partitions", init, (*STAGED, f"experts.init={init}"), 1) for init in PARTITIONS),
)


def record_of(arm: Arm, seed: int, settings: Sequence[str], folder: Path) -> dict[str, Any]:
    """A finished run's line."""
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    middle = [record for record in map(json.loads, lines) if record["kind"] == "eval"]
    blockwise = summary["blockwise"] or {}
    errors = {name: blockwise.get(f"error_{name}") for name in ("before", "after")}
    keep = ("forward_kl", "top1_agreement", "student_perplexity", "teacher_perplexity", "mean_k")
    keep += ("ffn_flops", "dense_ffn_flops", "num_tokens")

    def numbers(evaluation: dict[str, Any]) -> dict[str, float]:
        return {name: evaluation[name] for name in keep}

    return {
        "group": arm.group,
        "arm": arm.name,
        "seed": seed,
        "settings": list(settings),
        "tokens": summary["tokens"],
        "training_seconds": summary["training_seconds"],
        "before": numbers(summary["before"]),
        "after_blockwise": numbers(middle[0]) if summary["blockwise"] else None,
        "after": numbers(summary["after"]),
        "block_error": {name: fmean(values) if values else None for name, values in errors.items()},
    }


def jobs_left(arguments: argparse.Namespace, out: Path) -> list[tuple[Arm, int]]:
    """The runs that have no line yet, seed by seed."""
    done = {(r["group"], r["arm"], r["seed"]) for r in read_records(out)}
    jobs = [
        (arm, seed)
        for seed in range(3)
        for arm in ARMS
        if arm.group in arguments.groups and seed < arm.seeds
        if arguments.arms is None or arm.name in arguments.arms
    ]
    left = [(arm, seed) for arm, seed in jobs if arm.key(seed) not in done]
    return left[: max(0, 1 - len(done))] if arguments.smoke else left


def command(
    arm: Arm, seed: int, arguments: argparse.Namespace, folder: Path
) -> tuple[list[str], list[str]]:
    """The run's command line, and the settings that its line keeps: those without a path."""
    settings = [*BASE, *arm.settings, f"train.seed={seed}", *arguments.set]
    settings += SMOKE if arguments.smoke else []
    sources = ["embedded", *([str(arguments.text)] if arguments.text else [])]
    line = [sys.executable, "-m", "tiny_onn.cli", "distill", "--preset", "demo"]
    line += ["--out", str(folder), "--set", f"data.sources={json.dumps(sources)}"]
    line += ["--set", f"train.device={arguments.device}"]
    return [*line, *(part for text in settings for part in ("--set", text))], settings


def measure(arguments: argparse.Namespace, out: Path) -> int:
    """Make the runs, at most `--jobs` at once; the number that failed."""
    waiting, live, failed = jobs_left(arguments, out), {}, 0
    out.parent.mkdir(parents=True, exist_ok=True)
    started, where = time.monotonic(), environment(arguments.device)
    env = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    with tempfile.TemporaryDirectory() as temporary:
        while waiting or live:
            in_time = time.monotonic() - started < arguments.seconds
            while waiting and in_time and len(live) < arguments.jobs:
                arm, seed = waiting.pop(0)
                folder = Path(temporary) / f"{arm.group}-{arm.name}-{seed}".replace(" ", "-")
                line, settings = command(arm, seed, arguments, folder)
                log = folder.with_suffix(".log").open("w", encoding="utf-8")
                live[arm, seed] = (
                    subprocess.Popen(line, stdout=log, stderr=log, env=env, cwd=ROOT),
                    settings,
                    folder,
                )
            for (arm, seed), (process, settings, folder) in list(live.items()):
                if process.poll() is None:
                    continue
                del live[arm, seed]
                if process.returncode:
                    failed += 1
                    print(f"{arm.name}, seed {seed}: failed", file=sys.stderr)
                    print(folder.with_suffix(".log").read_text("utf-8")[-2000:], file=sys.stderr)
                    continue
                record = {**record_of(arm, seed, settings, folder), "environment": where}
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                show(record, time.monotonic() - started)
            if not in_time and not live:
                break
            time.sleep(0.5)
    if waiting:
        print(f"not started in time: {len(waiting)} runs; the same command goes on with them")
    return failed


def show(record: dict[str, Any], seconds: float) -> None:
    """One line on the terminal."""
    before, after = record["before"], record["after"]
    print(
        f"{seconds:6.0f} s  {record['group']}: {record['arm']}, seed {record['seed']}:"
        f" KL {before['forward_kl']:.4f} -> {after['forward_kl']:.4f},"
        f" perplexity {after['student_perplexity']:.2f}"
        f" (teacher's {after['teacher_perplexity']:.2f}),"
        f" k {after['mean_k']:.2f}, {record['tokens']:,} tokens",
        flush=True,
    )


def final_table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Recipes and controls after the whole run."""
    yield "| student | seeds | tokens | KL | agreement | perplexity | mean k | FFN FLOPs |"
    yield "|---|---|---|---|---|---|---|---|"
    teacher = {r["after"]["teacher_perplexity"] for r in records}
    yield from (f"| teacher | | | 0 | 100 % | {value:.2f} | 32 | 100 % |" for value in teacher)
    for name in RECIPES:
        arm = [record for record in records if record["arm"] == name]
        if not arm:
            continue
        after = [record["after"] for record in arm]
        share = fmean(a["ffn_flops"] / a["dense_ffn_flops"] for a in after)
        agreement = [100 * a["top1_agreement"] for a in after]
        cells = (
            name,
            str(len(arm)),
            f"{arm[0]['tokens']:,}",
            spread([a["forward_kl"] for a in after], 4),
            f"{spread(agreement, 1)} %",
            spread([a["student_perplexity"] for a in after], 2),
            spread([a["mean_k"] for a in after], 2),
            f"{share:.1%}".replace("%", " %"),
        )
        yield f"| {' | '.join(cells)} |"


def partition_table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """KL of each partition, stage by stage."""
    yield (
        "| partition | initial gate | after blockwise | after global | perplexity |"
        " block error before, after |"
    )
    yield "|---|---|---|---|---|---|"
    for record in sorted(records, key=lambda r: PARTITIONS.index(r["arm"])):
        error = record["block_error"]
        cells = (
            record["arm"],
            *(f"{record[s]['forward_kl']:.3f}" for s in ("before", "after_blockwise", "after")),
            f"{record['after']['student_perplexity']:.2f}",
            f"{error['before']:.3f}, {error['after']:.3f}",
        )
        yield f"| {' | '.join(cells)} |"


def untrained_table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """KL of each partition under routers that nobody trained, from `partitions.py`."""
    routers = ("oracle", "ridge", "static")
    yield f"| partition | {' | '.join(routers)} |"
    yield f"|{'---|' * (len(routers) + 1)}"
    kl = {(row["partition"], row["router"]): f"{row['kl']:.3f}" for row in rows}
    for name in dict.fromkeys(row["partition"] for row in rows):
        yield f"| {' | '.join([name, *(kl.get((name, router), '') for router in routers)])} |"


def sections() -> dict[str, str]:
    """The generated text by the name of its place."""
    records = read_records(RECORDS, needed=True)
    path = RESULTS / "partitions.json"
    rows = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
    groups = {
        name: [r for r in records if r["group"] == name] for name in ("long", "small", "partitions")
    }
    studies = (CONTROLS, MIXED, IN_ORDER, SHORT_DECAY, MANUAL)
    tables = {
        "long": final_table(groups["long"]),
        "small": final_table(groups["small"]),
        "partitions": partition_table(groups["partitions"]),
        "untrained": untrained_table(rows),
        **arms_findings.sections(*(read_records(path, needed=True) for path in studies)),
    }
    return {name: "\n".join(lines) + "\n" for name, lines in tables.items()}


def controls_at_half() -> list[dict[str, Any]]:
    """The records of all arms at half of the experts."""
    return [r for r in read_records(CONTROLS, needed=True) if r["target_k"] == arms_findings.TARGET]


def filled(text: str) -> str:
    """The page with the generated text in its places."""
    return pages.filled(text, sections(), BEGIN, END)


def main() -> int:
    """Make the runs that have no record yet; the exit status."""
    options = parser(__doc__)
    options.add_argument("--text", type=Path, help="folder of text beside the embedded one")
    options.add_argument("--groups", nargs="+", default=["small", "partitions", "long"])
    options.add_argument("--arms", nargs="+", help="only these; default: all")
    options.add_argument("--jobs", type=int, default=1, help="runs at once")
    options.add_argument("--threads", type=int, default=2, help="of each run")
    options.add_argument("--seconds", type=float, default=1e9, help="then no run is started")
    options.add_argument("--set", action="append", default=[], help="SECTION.KEY=VALUE")
    arguments = options.parse_args()
    folder = arguments.out or RESULTS
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as name:
            arguments.set.append(f"teacher.path={tiny_teacher(Path(name) / 'teacher')}")
            return measure(arguments, (arguments.out or Path(name)) / RECORDS.name)
    return measure(arguments, folder / RECORDS.name)


if __name__ == "__main__":
    sys.exit(main())
