"""One of the processes that `resume_gpus.py` starts, which makes parts of runs in turn."""

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment
from tiny_onn.config.read import load_config
from tiny_onn.distill.cache_writer import write_cache
from tiny_onn.distill.loop import run_distill
from tiny_onn.parallel import World
from tiny_onn.teacher.load import quiet_transformers


def work(case: Mapping[str, Any]) -> None:
    """Do all jobs of a case as one of the processes that a launcher started.

    The first process writes lines to `case["said"]`: the machine, then each job once it is done.
    """
    quiet_transformers()
    if case["device"] == "cpu":
        torch.set_num_threads(1)
    with World.from_environment(case["device"]) as world:
        say(case, world, {"environment": environment(case["device"])})
        for job in case["jobs"]:
            started = time.monotonic()
            if job["kind"] == "cache":
                config = load_config(Path(case["toml"]), None, ())
                write_cache(config, out=Path(job["out"]), states_format=job["format"])
            else:
                run_part(case, job, world)
            say(case, world, {"done": job["name"], "seconds": time.monotonic() - started})


def run_part(case: Mapping[str, Any], job: Mapping[str, Any], world: World) -> None:
    """Begin a run or go on with it, to its end or to the step after which it is stopped."""
    result = run_distill(
        load_config(Path(case["toml"]), None, job["set"]),
        out=Path(job["out"]),
        resume=job["resume"],
        allow_change=["train.shard"],
        after_step=stops_after(job["stop"], world),
        world=world,
    )
    assert result.interrupted == (job["stop"] is not None), job


def stops_after(last: int | None, world: World) -> Callable[[int, float], None]:
    """What stops a run after a step: the signal of Ctrl-C, to the last process alone."""

    def after_step(step: int, _: float) -> None:
        if step == last and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGINT)

    return after_step


def say(case: Mapping[str, Any], world: World, values: Mapping[str, Any]) -> None:
    """Let the first process write a line for the one that started all."""
    if world.first:
        with Path(case["said"]).open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(values)}\n")
