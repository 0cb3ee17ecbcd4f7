"""Tokens per second and memory of the distillation step on 1, 2, 4 and 8 GPUs, beside the plan's.

    python -m benchmarks scaling_gpus [--gpus 1 2] [--model SmolLM2-135M Qwen3-0.6B] [--smoke]

One `torchrun` for every model and number of GPUs measures all of its rows: one row of `--tokens`
tokens a GPU (weak scaling), and the same global batch on every number of GPUs (strong scaling: as
many rows as the largest number has GPUs), with `train.shard` none and optimizer. Another `torchrun`
does so with full, the only one of a model that does not fit whole. The step is the one that
`distill` runs, on random weights and documents of 1K to 2K random tokens. NVLink multicast stays
off. Without a GPU, processes on the CPU do the same through gloo.

Parity: the first loss of the same global batch agrees over all numbers of GPUs and all ways. What a
`torchrun` measured is printed, and appended to `results/scaling_gpus.jsonl`, as soon as it ends;
one that fails or takes more than `--seconds` leaves the rows that it had and a line with its error.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import print_table
from benchmarks.launching import torchrun, variables, watched
from benchmarks.registry import Goal, Option, Result, benchmark
from benchmarks.scaling_gpus_worker import settings_of, ways, worker
from tiny_onn.planning.cluster import Cluster
from tiny_onn.planning.plan import Plan, plan
from tiny_onn.planning.sources import Device

NAME = "scaling_gpus"
# The speed of several GPUs over that of one, with the same global batch or the same one a GPU.
GOALS = {2: 1.9, 4: 3.8, 8: 7.6}
# First losses of the same batch may differ by the order of sums in bfloat16.
LOSS_GAP = 0.01


def launch(case: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Measure a model on a number of GPUs under `torchrun`.

    Args:
        case: What `worker` gets.
        seconds: After so long its processes are killed.

    Returns:
        What the first rank said: the machine, and the rows that it measured; and an error, if any.
    """
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder) / "lines.jsonl", Path(folder) / "log.txt"
        arguments = ("benchmarks", NAME, "--case", json.dumps({**case, "out": str(lines)}))
        command = torchrun(case["gpus"], *arguments)
        error = watched(command, variables(case["device"], case["gpus"]), log, seconds)
        said = lines.read_text("utf-8").splitlines() if lines.exists() else []
        tail = log.read_text("utf-8", errors="replace")[-3000:]
    record: dict[str, Any] = {"model": case["model"], "gpus": case["gpus"], "rows": []}
    for line in map(json.loads, said):
        record["rows"].append(line["row"]) if "row" in line else record.update(line)
    return record if error is None else record | {"error": f"{error}: {tail}"}


def with_plan(
    record: Mapping[str, Any], case: Mapping[str, Any], one_row_s: float | None
) -> list[dict[str, Any]]:
    """The rows of a record with what `plan --gpus` says of them.

    Args:
        record: What `launch` returned.
        case: What it was given.
        one_row_s: Seconds of a step of one row on one GPU, from which the efficiency of the plan
            is taken; None leaves the time out.
    """
    rows = []
    for row in record["rows"]:
        told = {"model": record["model"], "gpus": record["gpus"], **row}
        if record.get("device") and "error" not in row:
            told |= predicted(record, case, row, one_row_s)
        rows.append(told)
    return rows


def predicted(
    record: Mapping[str, Any],
    case: Mapping[str, Any],
    row: Mapping[str, Any],
    one_row_s: float | None,
) -> dict[str, Any]:
    """What the plan says of one row, by the speed of one GPU on one row."""
    device, config = Device(**record["device"]), settings_of(case)

    def planned(gpus: int, num_rows: int, efficiency: float) -> Plan:
        train = replace(config.train, rows_per_step=num_rows)
        return plan(
            replace(config, train=train),
            case["model"],
            device,
            efficiency=efficiency,
            document_tokens=record["document_tokens"],
            cluster=Cluster(gpus=gpus, shard=row["shard"]),
        )

    efficiency = 1.0
    if one_row_s is not None:
        ideal_s = planned(1, 1, 1.0).packed.total / (device.bf16_tflops * 1e12)
        efficiency = min(1.0, ideal_s / one_row_s)
    found = planned(record["gpus"], row["rows_per_step"], efficiency)
    rate = found.tokens_per_s(found.packed) if one_row_s is not None else None
    return {
        "plan_tokens_per_s": rate,
        "plan_all_reduce_ms": 1e3
        * sum(part.seconds for part in found.collectives if part.name.startswith("all-reduce")),
        "plan_peak_bytes": found.peak.total,
        "efficiency": efficiency if one_row_s is not None else None,
    }


def scaling(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Goal]]:
    """The speed on several GPUs over that on one, and the goals of what nothing is sharded for."""
    timed = [row for row in rows if "tokens_per_s" in row]
    one = {(row["model"], row["rows_per_step"]): row for row in timed if row["gpus"] == 1}
    ratios, goals = {}, {}
    for row in timed:
        gpus, num_rows = row["gpus"], row["rows_per_step"]
        for batch, rows_of_one in (("same batch", num_rows), ("a row a GPU", num_rows // gpus)):
            peer = one.get((row["model"], rows_of_one))
            if gpus == 1 or peer is None or (batch == "a row a GPU" and num_rows != gpus):
                continue
            name = f"{row['model']}, {batch}, shard {row['shard']}: {gpus} GPUs / 1, tokens/s"
            ratios[name] = row["tokens_per_s"] / peer["tokens_per_s"]
            if row["shard"] == "none" and gpus in GOALS:
                goals[name] = Goal(at_least=GOALS[gpus])
    return ratios, goals


def losses_apart(losses: Mapping[tuple[int, bool], float]) -> bool:
    """Whether first losses of the same batch, by number of GPUs and kind, differ too much."""
    first = next(iter(losses.values()))
    return not all(abs(loss - first) <= LOSS_GAP * first for loss in losses.values())


def numbers_of_gpus(asked: Sequence[int], device: str) -> list[int]:
    """The numbers of GPUs that were asked for and are there; on a CPU all of them.

    Raises:
        SystemExit: None of them is there.
    """
    there = torch.cuda.device_count() if torch.device(device).type == "cuda" else max(asked)
    numbers = [number for number in sorted(set(asked)) if 1 <= number <= there]
    if not numbers:
        raise SystemExit(f"--gpus: got {asked}, expected numbers of the {there} GPUs that are here")
    return numbers


@benchmark(
    "The distillation step on several GPUs: tokens per second and memory, beside the plan's.",
    case=worker,
    device=Option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda"),
    model=Option(["SmolLM2-135M", "Qwen3-0.6B", "Qwen3-8B"], "bundled shapes", smoke=["tiny"]),
    shard=Option(
        ["whole", "full"],
        "whole: train.shard none and optimizer; full: shares alone",
        smoke=["whole"],
    ),
    gpus=Option([1, 2, 4, 8], "numbers of GPUs; those that are absent are left out", smoke=[1, 2]),
    preset=Option("recommended", "the recipe"),
    tokens=Option(32_768, "the tokens of a row", smoke=64),
    repeats=Option(12, "timed steps of each row", smoke=2),
    seconds=Option(130.0, "limit of each torchrun"),
    set=Option([""], "further settings, as section.key=value"),
)
def run(arguments: argparse.Namespace) -> Result:
    """Measure every model on every number of GPUs; print and write each as soon as it is known."""
    numbers = numbers_of_gpus(arguments.gpus, arguments.device)
    shared = {key: getattr(arguments, key) for key in ("device", "preset", "tokens", "repeats")}
    # The largest number of GPUs has a row for each.
    shared |= {"set": arguments.set, "rows": max(numbers)}
    rows: list[dict[str, Any]] = []
    for model in arguments.model:
        one_row_s, losses = None, {}
        for gpus, shard in itertools.product(numbers, arguments.shard):
            case = {"model": model, "gpus": gpus, "full": shard == "full", **shared}
            if not ways(case):
                continue
            record = launch(case, arguments.seconds)
            one_row_s = one_row_s or seconds_of_one_row(record)
            if (loss := _first_loss(record, case["rows"])) is not None:
                losses[gpus, case["full"]] = loss
            if losses and losses_apart(losses):
                losses.pop((gpus, case["full"]))
                record |= {"rows": [], "error": "first losses differ; no time is reported"}
            found = with_plan(record, case, one_row_s)
            if "error" in record:
                found.append({"model": model, "gpus": gpus, "error": record["error"]})
            rows += found
            asked = {name: shared[name] for name in ("preset", "tokens", "set")}
            _write(arguments.out, {**record, **asked, "rows": found, "smoke": arguments.smoke})
    ratios, goals = scaling(rows)
    return Result(
        rows=rows,
        ratios=ratios,
        goals={} if arguments.smoke else goals,
        parity=f"first losses of the same batch within {LOSS_GAP:.0%} over GPUs and ways",
        settings={"model": arguments.model, "gpus": numbers, "shard": arguments.shard, **shared},
    )


def seconds_of_one_row(record: Mapping[str, Any]) -> float | None:
    """The time of a step of one row on one GPU, if the record has it."""
    times = [
        row["step_ms"] / 1e3
        for row in record["rows"]
        if record["gpus"] == 1 and row["rows_per_step"] == 1 and "step_ms" in row
    ]
    return times[0] if times else None


def _first_loss(record: Mapping[str, Any], num_rows: int) -> float | None:
    """The loss of the untrained student on the batch of so many rows, if the record has it."""
    first = record["rows"][0] if record["rows"] else {}
    return first.get("first_loss") if first.get("rows_per_step") == num_rows else None


def _write(folder: Path | None, record: Mapping[str, Any]) -> None:
    """Print the rows of a record, and append it to the file of all records."""
    print_table(record["rows"])
    print(flush=True)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{NAME}.jsonl").open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(record)}\n")
