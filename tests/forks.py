"""Processes of tests, forked from one that has imported the libraries, which takes seconds."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from torch.multiprocessing.spawn import start_processes

from repository import ROOT, VARIABLES


def server() -> ForkServerContext:
    """The way to start forks; their server runs, and lasts as long as this process does."""
    forkserver.set_forkserver_preload(["tiny_onn.distill.loop", "tiny_onn.evaluation.evaluate"])
    with pytest.MonkeyPatch.context() as patch:
        # The server takes its environment, from which the libraries read, when it starts.
        for variable, value in VARIABLES.items():
            patch.setenv(variable, value)
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def start_ranks(work: Callable[..., None], arguments: tuple[object, ...], processes: int) -> None:
    """Call `work(rank, *arguments)` in some processes, which must all succeed."""
    server()
    start_processes(work, arguments, nprocs=processes, start_method="forkserver")


def run_module_in_fork(log: Path, name: str, *options: object) -> str:
    """What `python -m name options` prints, in a fork; it must succeed.

    Args:
        log: A folder that is made, for what the program prints.
        name: The module.
        options: Its arguments.
    """
    log.mkdir()
    process = server().Process(target=_as_main, args=(log, name, [*map(str, options)]))
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
