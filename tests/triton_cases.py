"""Where Triton's kernels run in tests: on a GPU as they are, elsewhere in Triton's interpreter.

The interpreter needs a process of its own, because triton reads TRITON_INTERPRET when it is
imported. Its bfloat16 is silently wrong.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from repository import ROOT
from tiny_onn.ops import decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = decode.triton_runs_on(DEVICE)
kernels = pytest.mark.skipif(not RUNS, reason="needs triton and a GPU, or its interpreter")
gpu = pytest.mark.skipif(not (RUNS and DEVICE == "cuda"), reason="needs a GPU and triton")
outside_the_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process"
)


def assert_passes_in_the_interpreter(test_file: str) -> None:
    """Run a file's tests in a process in which Triton interprets its kernels on the CPU.

    Up to 3.6 the interpreter makes loop bounds of arrays of one element, which NumPy refuses from
    2.4 on and warns of before.
    """
    pytest.importorskip("triton")
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton's interpreter needs NumPy below 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test_file]
    command += ["-W", "ignore:Conversion of an array with ndim:DeprecationWarning"]
    variables = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, env=variables, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout
