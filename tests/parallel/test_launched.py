"""The command line under torchrun: one run, one message, one stop."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from parallel_cases import free_port
from run_records import records
from tiny import change, write_run
from tiny_onn.distill.loop import run_distill
from tiny_onn.runs.folder import create_run_folder
from tiny_onn.runs.metrics import read_metrics

SECONDS = 240


def launch(*arguments, processes=2, options=()):
    """Start tiny-onn in some processes."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", *options]
    address = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    command = [sys.executable, *launcher, *address, "-m", "tiny_onn.cli", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )


def lines_of(process):
    """What the processes said, the launcher's own lines left out."""
    out, err = process.communicate(timeout=SECONDS)
    return [line for line in (out + err).splitlines() if line.startswith("tiny-onn: ")]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    return write_run(folder, train={"rows_per_step": 2, "tokens": 4 * 2 * 64})


def test_two_processes_make_the_run_of_one(config, tmp_path):
    # Two rows have one sum, so that nothing may differ.
    create_run_folder(tmp_path / "two", config, argv=[])
    process = launch("distill", "--resume", "--out", tmp_path / "two")
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    assert err.count("2 layers x 8 experts") == 1
    run_distill(config, out=tmp_path / "one")
    kept = {"step": ("loss", "mean_k", "forward_kl"), "end": ("forward_kl", "mean_k")}
    pairs = zip(records(tmp_path / "two"), records(tmp_path / "one"), strict=True)
    for ours, theirs in pairs:
        for name in kept.get(ours["kind"], ()):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["report", "runs/x"], "report: got 2 processes, expected one, because distill alone"),
        (["distill", "--preset", "demo"], "distill: got no --out with 2 processes"),
        (
            ["distill", "--preset", "demo", "--set", "train.rows_per_step=1", "--out", "OUT"],
            "train.rows_per_step: got 1 with 2 processes, expected a multiple of 2",
        ),
    ],
)
def test_a_mistake_is_told_once(arguments, told, tmp_path):
    arguments = [str(tmp_path / "run") if text == "OUT" else text for text in arguments]
    process = launch(*arguments)
    (line,) = lines_of(process)
    assert told in line
    assert process.returncode == 1


def test_a_signal_to_one_process_stops_all_and_saves(config, tmp_path):
    out = tmp_path / "run"
    long = change(config, train={"tokens": 10_000_000, "eval_every_tokens": 0})
    create_run_folder(out, long, argv=[])
    process = launch("distill", "--resume", "--out", out)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + SECONDS
    while not (metrics.exists() and any(row["kind"] == "step" for row in read_metrics(metrics))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    first = json.loads((out / "lock").read_text())["pid"]
    (other,) = [child for child in psutil.Process(process.pid).children() if child.pid != first]
    other.send_signal(signal.SIGTERM)
    assert lines_of(process)[:1] == [
        f"tiny-onn: the run is saved; resume it with `tiny-onn distill --resume --out {out}`"
    ]
    steps = [row["step"] for row in read_metrics(metrics) if row["kind"] == "step"]
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{steps[-1]:07d}"
    assert not (out / "lock").exists()


def test_a_killed_process_is_started_again_and_the_run_ends_as_undisturbed(config, tmp_path):
    train = {"tokens": 40 * 2 * 64, "eval_every_tokens": 0, "save_every_tokens": 2 * 64}
    longer = change(config, train=train)
    out, whole = tmp_path / "run", tmp_path / "whole"
    create_run_folder(out, longer, argv=[])
    process = launch("distill", "--resume", "--out", out, options=["--max-restarts=1"])
    deadline = time.monotonic() + SECONDS
    while not any((out / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first = json.loads((out / "lock").read_text())["pid"]
    (other,) = [child for child in psutil.Process(process.pid).children() if child.pid != first]
    other.send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    run_distill(longer, out=whole)
    assert records(out) == records(whole)
