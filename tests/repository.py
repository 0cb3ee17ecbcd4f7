"""Where the repository is, wherever a test stands in it, and how its programs are run."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

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


def run_module_in_fork(log: Path, name: str, *options: object) -> str:
    """The same in a fork of a process that imported the libraries once, for all such calls.

    Args:
        log: A folder that is made, for what the program prints.
        name: The module.
        options: Its arguments.
    """
    log.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_onn.distill.loop", "tiny_onn.evaluation.evaluate"])
    with pytest.MonkeyPatch.context() as patch:
        # The server takes its environment, from which the libraries read, when it starts.
        for variable, value in VARIABLES.items():
            patch.setenv(variable, value)
        process = context.Process(target=_as_main, args=(log, name, [*map(str, options)]))
        process.start()
    process.join()
    printed, told = ((log / file).read_text("utf-8") for file in ("stdout", "stderr"))
    assert process.exitcode == 0, printed[-5000:] + told[-5000:]
    return printed


def _as_main(log: Path, name: str, options: Sequence[str]) -> None:
    """Run a module as a program does, from the repository, with files to print to."""
    for number, file in ((1, "stdout"), (2, "stderr")):
        with (log / file).open("w", encoding="utf-8") as target:
            os.dup2(target.fileno(), number)
    os.chdir(ROOT)
    os.environ.update(VARIABLES)
    sys.argv = [name, *options]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
