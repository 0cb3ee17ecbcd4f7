"""docs/scaling.md: its tables are made from plan and records, and its launchers start real runs."""

import json
import shlex
from dataclasses import asdict

import pytest

from benchmarks.scaling_gpus import predicted
from docs.tools import scaling
from reliability.harness import CONTROL
from tiny_onn.cli import main as cli
from tiny_onn.planning.cluster import Cluster
from tiny_onn.planning.plan import plan
from tiny_onn.planning.sources import find_device

PAGE = scaling.PAGE.read_text("utf-8")


def test_the_tables_are_those_of_plan_and_records():
    assert scaling.filled(PAGE) == PAGE, "run python -m docs.tools"
    for name in scaling.contents():
        assert scaling.BEGIN.format(name=name) in PAGE


def test_the_sweep_holds_what_plan_says():
    _, eight, *_ = scaling.swept("SmolLM2-135M")
    for shard in ("none", "optimizer", "full"):
        found = scaling.sharded(eight, shard)
        cluster = Cluster(gpus=8, shard=shard)
        expected = plan(found.config, "SmolLM2-135M", "H100", cluster=cluster)
        assert found.as_dict() == expected.as_dict()


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate launch"])
def test_what_a_launcher_starts_is_a_command_of_distill(launcher, monkeypatch):
    lines = [line for line in PAGE.splitlines() if line.startswith(launcher)]
    assert lines
    started = []

    def start(verb):
        started.append(verb)

    monkeypatch.setattr(cli.Distill, "__call__", start)
    for line in lines:
        words = shlex.split(line)
        command = words[words.index("tiny_onn.cli") + 1 :]
        assert cli.main(command) == 0
        rows = next(word for word in command if word.startswith("train.rows_per_step="))
        processes = _option(words, "--nproc-per-node", "--num_processes")
        assert int(rows.partition("=")[2]) == processes * _option(words, "--nnodes")
    assert len(started) == len(lines)


def _option(words, *names):
    """The number after one of these options, 1 if none of them is there."""
    return next((int(words[words.index(name) + 1]) for name in names if name in words), 1)


def record(gpus, rows, **more):
    environment = {
        "gpu": "NVIDIA H100",
        "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
        "time": "2026-11-26T00:00:00Z",
    }
    return {
        "model": "m",
        "gpus": gpus,
        "smoke": False,
        "environment": environment,
        "rows": rows,
    } | more


def row(gpus, speed, **more):
    measured = {"tokens_per_s": speed, "all_reduce_ms": 1.25, "peak_bytes": 2**30}
    return {"model": "m", "gpus": gpus, "rows_per_step": 2, "shard": "none", **measured, **more}


def test_the_measured_table_holds_the_last_record_of_each_and_leaves_absent_rows_out(
    tmp_path, monkeypatch
):
    planned = {"plan_tokens_per_s": 3e5, "plan_all_reduce_ms": 1.5, "plan_peak_bytes": 2**31}
    lines = [
        record(1, [row(1, 1.0)]),
        record(1, [row(1, 1e5, plan_tokens_per_s=None)]),
        record(2, [row(2, 195e3, **planned), {"model": "m", "gpus": 2, "error": "x"}]),
        record(4, [], smoke=True),
        {"model": "m", "gpus": 8, "rows": [], "smoke": False, "error": "took more than 200 s"},
    ]
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    monkeypatch.setattr(scaling, "RECORDS", file)
    text = scaling.measured()
    assert "| m | 1 | 2 | none | 100,000 | - | 1.2 ms | - | 1.00 GiB | - |" in text
    assert (
        "| m | 2 | 2 | none | 195,000 | 300,000 | 1.2 ms | 1.5 ms | 1.00 GiB | 2.00 GiB |" in text
    )
    assert "| m, same batch, shard none: 2 GPUs / 1 | 1.95 | at least 1.9 |" in text
    assert "error" not in text
    assert text.endswith("There is no record of 4 and 8 GPUs; the same command makes it.\n")


def test_without_a_record_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "RECORDS", tmp_path / "none.jsonl")
    assert scaling.measured() == "No record is committed yet.\n"


def test_the_measured_table_shows_the_present_plan_of_a_known_gpu():
    device = asdict(find_device("H100", "bfloat16"))
    known = {"device": device, "document_tokens": 1600, "model": "SmolLM2-135M"}
    one = row(1, 3e5, model="SmolLM2-135M", rows_per_step=1, step_ms=109.2)
    two = row(2, 5e5, model="SmolLM2-135M", plan_peak_bytes=1)
    records = [record(1, [one], **known), record(2, [two], **known)]
    found = scaling.planned_anew(records[1], two, records)
    settings = {"preset": "recommended", "tokens": 32_768, "set": []}
    case = {**settings, "model": "SmolLM2-135M", "gpus": 2, "full": False}
    assert found == two | predicted(records[1], case, two, 0.1092)
    assert found["plan_peak_bytes"] > 2**30
    assert 0 < found["plan_tokens_per_s"] < 2 * 3e5


def test_the_table_of_resumed_runs_tells_gaps_failures_and_what_was_not_run(tmp_path, monkeypatch):
    row = {"processes": "1 -> 2 -> 1", "shard": "full", "gap": None, "bound": None}
    rows = [
        {**row, "check": "same text", "done": True, "passed": True},
        {**row, "check": "same bits", "done": True, "passed": False},
        {**row, "check": "losses", "gap": 2e-7, "bound": 1e-4, "done": True, "passed": True},
        {**row, "check": "losses", "gap": 2e-2, "bound": 1e-2, "done": True, "passed": False},
        {**row, "check": "losses", "done": False, "bound": 1e-4, "passed": False},
    ]
    written = record(2, rows, run="8 steps of 4 x 64 tokens", dtype="float32")
    file = tmp_path / "resumed.json"
    monkeypatch.setattr(scaling, "results_file", lambda _: file)
    assert scaling.resumed() == "No record is committed yet.\n"
    file.write_text(json.dumps(written))
    head, *table = scaling.resumed().splitlines()
    assert head.startswith("Runs of 8 steps of 4 x 64 tokens in float32, on NVIDIA H100, torch")
    results = [line.split(" | ")[-1].removesuffix(" |") for line in table[3:]]
    assert results == [
        "yes",
        "NO",
        "gap 2.0e-07, bound 1e-04",
        "gap 2.0e-02, bound 1e-02, FAILED",
        "was not run",
        "was not measured",
    ]
    rows.append({**row, "check": CONTROL, "done": True, "passed": False})
    file.write_text(json.dumps(written))
    assert scaling.resumed().splitlines()[-1].endswith("| NO |")
