"""The command line under torchrun: one run, one message, one stop."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from parallel_cases import free_port
from run_records import records
from tiny import change, write_run
from tiny_onn.cli.main import main
from tiny_onn.config.template import config_template
from tiny_onn.distill.cache_writer import write_cache
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


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["report", "runs/x"], "report: got 2 processes, expected one, because distill alone"),
        (["cache", "--preset", "model-card"], "cache: got 2 processes, expected one, because"),
        (["distill", "--preset", "demo"], "distill: got no --out with 2 processes; add --out"),
        (
            ["distill", "--preset", "demo", "--profile", "--out", "x"],
            "distill: got --profile with 2 processes; profile one process",
        ),
    ],
)
def test_what_several_processes_cannot_do_is_told_by_the_first(
    arguments, told, rank, monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("tiny_onn.cli.main.TELLING_S", 0.0)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert (told in error) == (rank == "0")
    assert bool(error) == (rank == "0")


def test_a_launcher_that_names_no_number_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main(["report", "runs/x"]) == 2
    assert "WORLD_SIZE: got two in the environment, expected the number" in capsys.readouterr().err


def test_processes_without_an_address_are_refused(monkeypatch, tmp_path, capsys):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(["distill", "--preset", "demo", "--out", str(tmp_path / "run")]) == 2
    told = "WORLD_SIZE: got 2 processes that do not find each other"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "told"),
    [("cuda:1", "got cuda:1 with 2 processes, expected auto, cuda or cpu"), ("cuda", "local rank")],
)
def test_every_process_wants_a_gpu_of_its_own(device, told, monkeypatch, tmp_path, capsys):
    count = torch.cuda.device_count()
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": str(count)}.items():
        monkeypatch.setenv(name, value)
    arguments = ["--set", f"train.device={device}", "--out", str(tmp_path / "run")]
    assert main(["distill", "--preset", "demo", *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("beyond", "tells"), [(0, True), (1, False)])
def test_the_first_process_without_a_gpu_tells_it(beyond, tells, monkeypatch, tmp_path, capsys):
    local_rank = torch.cuda.device_count() + beyond
    for name, value in {"WORLD_SIZE": "9", "RANK": "8", "LOCAL_RANK": str(local_rank)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tiny_onn.cli.main.TELLING_S", 0.0)
    arguments = ["--set", "train.device=cuda", "--out", str(tmp_path / "run")]
    assert main(["distill", "--preset", "demo", *arguments]) == 2
    assert ("got local rank" in capsys.readouterr().err) == tells


def test_a_mistake_of_all_processes_is_told_once(tmp_path):
    rows = ["--set", "train.rows_per_step=3"]
    process = launch("distill", "--preset", "demo", *rows, "--out", tmp_path / "run")
    (line,) = lines_of(process)
    assert "train.rows_per_step: got 3 with 2 processes, expected a multiple of 2" in line
    assert "write 4" in line
    assert process.returncode == 1
    assert not (tmp_path / "run").exists()


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
    _, error = process.communicate(timeout=SECONDS)
    assert error.count("2 layers x 8 experts") == 1
    assert error.count("the run is saved; resume it with `tiny-onn distill --resume --out") == 1
    assert json.loads((out / "environment-1.json").read_text())["processes"] == 2
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
    # All processes leave a finished run alone, and the first one says so.
    process = launch("distill", "--resume", "--out", out)
    (line,) = lines_of(process)
    assert "the run has finished after 5,120 tokens" in line
    assert process.returncode == 0
    assert not (out / "environment-3.json").exists()


@pytest.mark.slow
def test_a_restart_does_not_resume_a_run_that_an_earlier_launch_of_its_name_made(config, tmp_path):
    (tmp_path / "run.toml").write_text(config_template(config))
    command = ("distill", tmp_path / "run.toml", "--out", tmp_path / "run")
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-id=first"]
    process = launch(*command, options=meeting)
    process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    process = launch(*command, options=["--max-restarts=1", *meeting])
    lines = lines_of(process)
    assert process.returncode == 1
    assert len(lines) == 2
    assert all("got a folder that is not empty, expected a new one" in line for line in lines)
    assert before == {path: path.read_bytes() for path in before}


def test_processes_that_cannot_connect_tell_it_once_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-network")
    process = launch("distill", "--preset", "demo", "--out", tmp_path / "run")
    out, err = process.communicate(timeout=SECONDS)
    (line,) = [line for line in err.splitlines() if line.startswith("tiny-onn: ")]
    assert "WORLD_SIZE: got 2 processes that do not find each other" in line
    assert "no-such-network" in line
    # The launcher has a traceback of its own.
    assert "tiny_onn/parallel.py" not in out + err


@pytest.mark.slow
def test_a_damaged_shard_of_a_cache_is_told_by_its_process_and_ends_all_with_their_steps(
    config, tmp_path
):
    cache, out = tmp_path / "cache", tmp_path / "run"
    write_cache(config, out=cache, shard_bytes=1)
    (spoiled,) = cache.glob("shard-000003*")
    content = bytearray(spoiled.read_bytes())
    content[-100] ^= 1
    spoiled.write_bytes(content)
    create_run_folder(out, change(config, teacher={"cache": str(cache)}), argv=[])
    # The second step reads the shard of row 3, which is compared by the second process.
    process = launch("distill", "--resume", "--out", out)
    (line,) = [line for line in lines_of(process) if "error" in line]
    assert f"process 1: {spoiled}: this shard of a teacher's cache is damaged" in line
    assert [row["step"] for row in records(out) if row["kind"] == "step"] == [1]
    assert (out / "checkpoints" / "step-0000001").is_dir()
