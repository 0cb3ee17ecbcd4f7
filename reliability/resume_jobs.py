"""One of the processes that `resume_gpus.py` starts, which makes parts of runs in turn."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.common import environment
from tiny_onn.config.read import load_config
from tiny_onn.distill.cache_writer import write_cache
from tiny_onn.distill.loop import run_distill
from tiny_onn.errors import UserError, reason_line
from tiny_onn.parallel import World
from tiny_onn.runs.checkpoint import valid_checkpoints
from tiny_onn.runs.files import file_entry, write_json
from tiny_onn.runs.folder import was_begun_by
from tiny_onn.runs.manifest import MANIFEST
from tiny_onn.teacher.load import quiet_transformers

PRESET = "recommended"


def work(case: Mapping[str, Any]) -> None:
    """Do all jobs of a case as one of the processes that a launcher started.

    The first process writes lines to `case["said"]`: the machine, then each job once it is done.
    """
    quiet_transformers()
    if case["device"] == "cpu":
        torch.set_num_threads(1)
    with told_in_a_line(), World.from_environment(case["device"]) as world:
        say(case, world, {"environment": environment(case["device"])})
        for job in case["jobs"]:
            started = time.monotonic()
            if job["kind"] == "cache":
                config = load_config(None, PRESET, case["settings"])
                write_cache(config, out=Path(job["out"]), states_format=job["format"])
            elif job["kind"] == "change":
                if world.first:
                    copy_changed(Path(job["run"]), Path(job["out"]))
                world.barrier()
            else:
                run_part(case, job, world)
            say(case, world, {"done": job["name"], "seconds": time.monotonic() - started})


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """End the process with the line that the command prints, if what went wrong has one."""
    try:
        yield
    except UserError as error:
        print(f"tiny-onn: error: {reason_line(error)}", file=sys.stderr, flush=True)
        sys.exit(2)


def run_part(case: Mapping[str, Any], job: Mapping[str, Any], world: World) -> None:
    """Begin a run or go on with it, to its end or to the step after which it is stopped."""
    out = Path(job["out"])
    begun = world.any_true(world.first and was_begun_by(world.launch, out))
    after_step = stops_after(job["stop"], world)
    if job["kill"] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        after_step = stops_after(job["kill"], world, signal.SIGKILL)
    result = run_distill(
        load_config(None, PRESET, [*case["settings"], *job["set"]]),
        out=out,
        resume=job["resume"] or begun,
        allow_change=["train.shard"],
        after_step=after_step,
        world=world,
    )
    assert result.interrupted == (job["stop"] is not None), job


def copy_changed(run: Path, out: Path) -> None:
    """Copy a stopped run, and change a weight of its newest checkpoint to a float beside it.

    It is the largest weight of the largest tensor, since rounding would hide such a change of a
    weight that is smaller than its next update. The checkpoint's manifest fits the changed file.
    """
    shutil.copytree(run, out)
    newest = valid_checkpoints(out / "checkpoints")[0]
    found = {
        (tensor.numel(), name): (file, tensor)
        for file in sorted(newest.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
        if "|" not in name
    }
    (_, name), (file, tensor) = max(found.items(), key=lambda item: item[0])
    # torch's writer keeps notes in the header, which stay as they are if one bit alone changes.
    content = bytearray(file.read_bytes())
    data = 8 + int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8:data])[name]["data_offsets"]
    content[data + start + int(tensor.abs().argmax()) * tensor.element_size()] ^= 1
    file.write_bytes(content)
    entries = {
        name: file_entry(newest / name) for name in json.loads((newest / MANIFEST).read_text())
    }
    write_json(newest / MANIFEST, {name: entry._asdict() for name, entry in entries.items()})


def stops_after(
    last: int | None, world: World, number: int = signal.SIGINT
) -> Callable[[int, float], None]:
    """What stops a run after a step: a signal to the last process alone."""

    def after_step(step: int, _: float) -> None:
        if step == last and world.rank == world.size - 1:
            os.kill(os.getpid(), number)

    return after_step


def say(case: Mapping[str, Any], world: World, values: Mapping[str, Any]) -> None:
    """Let the first process write a line for the one that started all."""
    if world.first:
        with Path(case["said"]).open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(values)}\n")
