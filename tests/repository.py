"""Where the repository is, wherever a test stands in it, and how its programs are run."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())

# Shapes are checked elsewhere; here many processes start.
VARIABLES = {"OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"}


def run_module(name: str, *options: object) -> str:
    """What `python -m name options` prints; it must succeed."""
    command = [sys.executable, "-m", name, *map(str, options)]
    variables = os.environ | VARIABLES
    done = subprocess.run(
        command, capture_output=True, text=True, env=variables, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout
