"""The launchers of docs/scaling.md, each with two processes on this machine."""

import subprocess
import sys

import pytest

from parallel_cases import free_port
from tiny import write_run
from tiny_onn.runs.folder import create_run_folder
from tiny_onn.runs.metrics import METRICS_NAME, read_metrics

SECONDS = 240


def start(launcher, out):
    """Start a run whose folder is there."""
    command = [sys.executable, "-m", *launcher, "tiny_onn.cli", "distill", "--resume"]
    return subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("name", ["two machines", "accelerate"])
def test_a_launcher_runs_distill_to_its_end(name, tmp_path):
    config = write_run(tmp_path, train={"rows_per_step": 2, "tokens": 2 * 2 * 64})
    out, port = tmp_path / "run", free_port()
    create_run_folder(out, config, argv=[])
    if name == "accelerate":
        plain = "--num_machines 1 --mixed_precision no --dynamo_backend no --cpu".split()
        launcher = ["accelerate.commands.launch", "--num_processes", "2", *plain]
        processes = [start([*launcher, f"--main_process_port={port}", "--module"], out)]
    else:
        launcher = "torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d".split()
        meeting = [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=first", "-m"]
        processes = [start([*launcher, *meeting], out) for _ in range(2)]
    said = [process.communicate(timeout=SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    assert "".join(said).count("distill: saving the student") == 1
    last = list(read_metrics(out / METRICS_NAME))[-1]
    assert (last["kind"], last["step"]) == ("end", 2)


@pytest.mark.parametrize(
    ("way", "named"),
    [
        ("--use_fsdp", "FSDP"),
        (
            "--use_fsdp --fsdp_version 2 --use_parallelism_config --parallelism_config_cp_size 2",
            "PARALLELISM_CONFIG",
        ),
    ],
)
def test_accelerates_own_ways_to_cut_a_model_or_a_row_are_refused(way, named, tmp_path):
    plain = "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    port = f"--main_process_port={free_port()}"
    launcher = ["accelerate.commands.launch", *plain, *way.split(), port, "--module"]
    said = start(launcher, tmp_path / "run").communicate(timeout=SECONDS)[0]
    (line,) = [line for line in said.splitlines() if line.startswith("tiny-onn: error: ")]
    assert f"ACCELERATE_USE_{named}: got true from accelerate, expected none of its ways to" in line
