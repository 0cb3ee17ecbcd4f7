"""Make the tables of docs/scaling.md: what the plan's model says, and what was measured beside it.

The model's table needs no record: it is `tiny-onn plan --gpus` for growing numbers of GPUs. Another
one holds the lines of `benchmarks/results/scaling_gpus.jsonl`, which the benchmark `scaling_gpus`
wrote, beside what the plan says today. The last one is of the record of
`reliability/resume_gpus.py`.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.common import RESULTS, ROOT
from benchmarks.scaling_gpus import predicted, scaling, seconds_of_one_row
from docs.tools import pages
from docs.tools.performance import gib, where
from experiments.arms_table import read_records
from reliability.harness import RESUMED, results_file, resumed_table
from tiny_onn.config.read import load_config
from tiny_onn.config.schema import Shard
from tiny_onn.planning.cluster import Cluster, collectives, moments_of_rank
from tiny_onn.planning.plan import Plan, plan

PAGE = ROOT / "docs" / "scaling.md"
RECORDS = RESULTS / "scaling_gpus.jsonl"
BEGIN, END = "<!-- scaling: {name} -->", "<!-- end -->"
MODELS = ("SmolLM2-135M", "Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-8B")
GPUS = (1, 8, 64, 256, 1024)
TOKENS = 10**12


def records() -> list[dict[str, Any]]:
    """Return the benchmark's records of GPUs, the last one of each model, number and card."""
    found = {
        (line["environment"]["gpu"], line["model"], line["gpus"]): line
        for line in read_records(RECORDS)
        if "gpu" in line.get("environment", {}) and not line["smoke"]
    }
    return list(found.values())


def swept(model: str) -> Iterator[Plan]:
    """Yield the plans of a model on growing numbers of H100s, one row of 32,768 tokens on each."""
    given = (f"train.tokens={TOKENS}", "teacher.dtype=bfloat16", "optim.name=adamw")
    config = load_config(None, "recommended", given)
    one = plan(config, model, "H100")
    for gpus in GPUS:
        cluster = Cluster(gpus=gpus)
        train = replace(config.train, rows_per_step=gpus)
        exchanged = collectives(config, one.sizes, one.parameters, cluster, one.device)
        global_config = replace(one.config, train=train)
        yield replace(one, config=global_config, cluster=cluster, collectives=exchanged)


def sharded(whole: Plan, shard: Shard) -> Plan:
    """Return the plan with optimizer state, or with everything that learns, divided over GPUs."""
    cluster = replace(whole.cluster, shard=shard)
    mine = cluster.of_one_gpu(whole.config)
    known = (mine, whole.sizes, whole.parameters, cluster)
    held = moments_of_rank(whole.moments, *known)
    return replace(
        whole, cluster=cluster, moments=held, collectives=collectives(*known, whole.device)
    )


def sweep() -> str:
    """Return the modelled table."""
    lines = [
        "| model | GPUs | tokens a step | tokens/s | share of linear | days for 1T tokens"
        " | GiB a GPU | share with `optimizer` | GiB with `optimizer` | share with `full`"
        " | GiB with `full` |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for whole in swept(model):
            tokens = whole.config.train.rows_per_step * whole.config.data.row_tokens
            days = (whole.seconds(whole.packed) or 0) / 86_400
            cells = [
                model,
                f"{whole.cluster.gpus:,}",
                f"{tokens / 1e6:,.2f} M",
                f"{whole.tokens_per_s(whole.packed):,.0f}",
                f"{whole.share_of_linear(whole.packed):.1%}",
                f"{days:,.1f}",
                f"{whole.peak_bytes / 2**30:.1f}",
            ]
            for shard in ("optimizer", "full"):
                cells += _with(whole, shard)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _with(whole: Plan, shard: Shard) -> list[str]:
    """Return the share of linear and the memory with a value of `train.shard`."""
    if shard == "full" and whole.sizes.experts % whole.cluster.gpus:
        return ["-", "-"]
    other = sharded(whole, shard)
    return [f"{other.share_of_linear(other.packed):.1%}", f"{other.peak_bytes / 2**30:.1f}"]


def measured() -> str:
    """Return the measured table with the plan's numbers beside, or a sentence if there is none."""
    found = records()
    if not found:
        return "No record is committed yet.\n"
    cards = {record["environment"]["gpu"]: record["environment"] for record in found}
    tables = [_of_card(found, card, environment) for card, environment in cards.items()]
    absent = sorted({1, 2, 4, 8} - {record["gpus"] for record in found})
    if absent:
        names = " and ".join(map(str, absent))
        tables.append(f"There is no record of {names} GPUs; the same command makes it.\n")
    return "\n".join(tables)


def _of_card(found: list[dict[str, Any]], card: str, environment: dict[str, Any]) -> str:
    """Return the table of one kind of card."""
    mine = [record for record in found if record["environment"]["gpu"] == card]
    rows = [
        planned_anew(record, row, mine)
        for record in mine
        for row in record["rows"]
        if "tokens_per_s" in row
    ]
    lines = [
        "| model | GPUs | rows a step | shard | tokens/s | plan | all-reduce | plan | memory"
        " | plan |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row["model"],
            str(row["gpus"]),
            str(row["rows_per_step"]),
            row["shard"],
            f"{row['tokens_per_s']:,.0f}",
            _or_dash(row.get("plan_tokens_per_s"), "{:,.0f}"),
            f"{row['all_reduce_ms']:.1f} ms",
            _or_dash(row.get("plan_all_reduce_ms"), "{:.1f} ms"),
            gib(row["peak_bytes"]),
            gib(row["plan_peak_bytes"]) if "plan_peak_bytes" in row else "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    ratios, goals = scaling(rows)
    lines += ["", "| the speed of several GPUs over that of one | ratio | goal |", "|---|---|---|"]
    lines += [
        f"| {name.removesuffix(', tokens/s')} | {ratio:.2f} | {goals.get(name, '')} |"
        for name, ratio in ratios.items()
    ]
    return "\n".join([f"Measured on {where(environment)}.", "", *lines]) + "\n"


def planned_anew(
    record: dict[str, Any], row: dict[str, Any], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return a measured row with the numbers of the present plan, if it knows the GPU.

    Args:
        record: the record of the row.
        row: what was measured.
        records: all records of the kind of card, one of which may hold one row on one GPU.
    """
    if record.get("device") is None:
        return row
    case = {"preset": "recommended", "tokens": 32_768, "set": []}
    case |= {name: record[name] for name in case if name in record}
    case |= {"model": row["model"], "gpus": row["gpus"], "full": row["shard"] == "full"}
    alone = [other for other in records if other["model"] == row["model"]]
    seconds = [one for other in alone if (one := seconds_of_one_row(other)) is not None]
    return row | predicted(record, case, row, seconds[0] if seconds else None)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def resumed() -> str:
    """Return the table of runs that went on with another number of GPUs."""
    if not (file := results_file(RESUMED)).exists():
        return "No record is committed yet.\n"
    record = json.loads(file.read_text("utf-8"))
    head = f"Runs of {record['run']} in {record['dtype']}, on {where(record['environment'])}."
    return "\n".join([head, "", *resumed_table(record)]) + "\n"


def contents() -> dict[str, str]:
    """Return the generated texts by the name of their place in the page."""
    return {"sweep": sweep(), "measured": measured(), "resumed": resumed()}


def filled(text: str) -> str:
    """Return the page with the generated texts in their places."""
    return pages.filled(text, contents(), BEGIN, END)
