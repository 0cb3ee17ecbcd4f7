"""Programs of several processes, started by `torchrun` on this machine and ended if they hang."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.common import ROOT

# torchrun waits 30 s for its processes before it kills them.
GRACE_S = 45


def torchrun(num_processes: int, module: str, *arguments: str, restarts: int = 0) -> list[str]:
    """The command that runs a module in some processes, and again if one of them dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    where = ["--nproc-per-node", str(num_processes), "--master-addr", "127.0.0.1"]
    where += ["--master-port", str(port), "--max-restarts", str(restarts)]
    return [*launcher, *where, "-m", module, *arguments]


def variables(device: str, num_gpus: int) -> dict[str, str]:
    """The environment of processes that use the first GPUs; NVLink multicast stays off."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")
    more = {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1"}
    if torch.device(device).type == "cuda":
        more["CUDA_VISIBLE_DEVICES"] = ",".join(visible[:num_gpus])
    return {**os.environ, **more}


def watched(
    command: Sequence[str], variables: Mapping[str, str], log: Path, seconds: float
) -> str | None:
    """Run a command until it ends or takes too long; what went wrong, if anything."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=file, stderr=file)
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            # The launcher ends the processes that it started, which are in sessions of their own.
            process.terminate()
            try:
                process.wait(timeout=GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return f"took more than {seconds:g} s"
    return f"exit status {status}" if status else None
