"""The script that resumes runs on other numbers of GPUs, here with processes on the CPU."""

import json
import shutil
import signal

import pytest
import torch

from reliability.harness import CONTROL
from reliability.resume_gpus import STEPS, Trial
from reliability.resume_jobs import copy_changed, stops_after
from reliability.run_results import saved_tensors
from repository import run_module
from run_records import at_step, send
from tiny import write_run
from tiny_onn.distill.loop import run_distill
from tiny_onn.parallel import World
from tiny_onn.runs.checkpoint import valid_checkpoints
from tiny_onn.runs.manifest import is_intact


def trial(folder, **changes):
    options = {
        "device": "cpu",
        "dtype": "float32",
        "sizes": [1, 2, 4],
        "shards": ["none", "full"],
        "row_tokens": 64,
        "until": 0.0,
    }
    return Trial(folder=folder, **options | changes)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_go_on_with_another_number_of_processes_and_a_cache_is_read(tmp_path):
    options = ("--device", "cpu", "--processes", 2, "--shard", "full", "--tokens", 64)
    run_module("reliability.resume_gpus", *options, "--limit", 500, "--out", tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["errors"] == []
    assert len(record["rows"]) == 9
    assert all(row["done"] and row["passed"] for row in record["rows"])
    told = [line for line in record["seen_after_kill"] if line.startswith("tiny-onn: error: ")]
    assert len(told) <= 1
    assert not any("Traceback" in line for line in record["seen_after_kill"])


def test_each_number_of_processes_goes_on_where_the_one_before_it_stopped(tmp_path, monkeypatch):
    launched = []
    of = trial(tmp_path)

    def launch(processes, jobs, restarts=0):
        if restarts:
            return
        launched.append((processes, [job["name"] for job in jobs if of.has(job["needs"], jobs)]))
        of.done.update(dict.fromkeys(launched[-1][1], 1.0))

    monkeypatch.setattr(of, "launch", launch)
    of.run()
    assert (tmp_path / "teacher").is_dir() and (tmp_path / "corpus").is_dir()
    first, *later = sorted(launched[:2]) + launched[2:]
    assert [first[0], *(processes for processes, _ in later)] == [1, 4, 2, 4, 1]
    chain = [name for _, names in launched for name in names if name.startswith("chain-full")]
    assert chain == [f"chain-full to {step}" for step in (2, 4, 6, STEPS)]
    assert "cached-many to 8" in later[2][1]
    # A run is copied before it goes on.
    again = [name for name in later[2][1] if name.startswith(("changed", "halves-full"))]
    assert again == ["changed-full to 4", "changed-full to 8", "halves-full to 8"]
    # What was not made, such as after an error, is not gone on with.
    assert not of.has("halves-none to 3", [])


def test_runs_that_are_not_done_pass_no_comparison(tmp_path):
    rows = trial(tmp_path).rows()
    assert len(rows) == 2 * 4 + 2 + 3
    assert not any(row["done"] or row["passed"] for row in rows)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Three runs on one process: a whole one, a stopped one, and a changed copy of that."""
    folder = tmp_path_factory.mktemp("runs")
    config = write_run(folder, train={"tokens": 256, "save_every_tokens": 64, "compile": False})
    whole, halves, changed = (
        folder / name for name in ("whole-none", "halves-none", "changed-none")
    )
    run_distill(config, out=whole)
    run_distill(config, out=halves, after_step=at_step(2, lambda: send(signal.SIGINT)))
    copy_changed(halves, changed)
    return config, folder


def test_the_control_changes_one_weight_to_its_neighbour(stopped):
    _, folder = stopped
    before, after = (
        valid_checkpoints(folder / name / "checkpoints")[0]
        for name in ("halves-none", "changed-none")
    )
    assert is_intact(after)
    for part in ("student", "optimizer"):
        ours, theirs = saved_tensors(after, part), saved_tensors(before, part)
        pairs = [(ours[name], theirs[name]) for name in ours | theirs]
        changed = [(a[a != b], b[a != b]) for a, b in pairs if not torch.equal(a, b)]
        assert len(changed) == (part == "student")
        for a, b in changed:
            assert a.numel() == 1
            assert torch.equal(a, b.nextafter(a))


def test_the_comparison_of_bits_notices_a_changed_bit_and_no_copy(stopped):
    config, folder = stopped
    of = trial(folder, shards=["none"])
    of.done = {f"{name}-none to {STEPS}": 1.0 for name in ("whole", "halves", "changed", "copy")}
    shutil.copytree(folder / "halves-none", folder / "copy-none")
    for name in ("halves", "changed", "copy"):
        run_distill(config, out=folder / f"{name}-none", resume=True)

    def control(name):
        return of.differ((CONTROL, "1", "none"), f"{name}-none", "whole-none")

    assert control("changed")["passed"]
    assert not control("halves")["passed"]
    assert not control("copy")["passed"]
    assert control("copy")["done"]


def test_without_time_nothing_is_started(tmp_path, monkeypatch):
    of = trial(tmp_path)
    monkeypatch.setattr(Trial, "settings", [])
    of.launch(2, [of.part("one", "none")])
    assert of.errors == ["2 processes: no time was left: "]
    assert of.done == {}


def test_the_last_process_alone_stops_a_run_and_after_the_step_that_is_asked(monkeypatch):
    sent = []
    monkeypatch.setattr("os.kill", lambda _, number: sent.append(number))
    for rank in (0, 1):
        for step in (1, 2, 3):
            stops_after(2, World(rank=rank, size=2))(step, 0.0)
        stops_after(None, World(rank=rank, size=2))(2, 0.0)
    assert sent == [signal.SIGINT]
