"""Break runs in every way that is known, resume them, and hold the result against an unbroken run.

    python -m reliability.faults --kills 100

Each trial is a forked process (the imports are done once) that runs `tiny-onn distill` on a tiny
teacher; a fault hits it, and the run is resumed until it is done. It survived if student, last
checkpoint, optimizer state, data position and metrics then equal those of a run that nothing hit,
bit for bit, and if nobody saw a traceback. Prints a table, writes it as JSON and into
docs/reliability.md. Same seed, same choices; the instants of kills depend on the machine's speed.
"""

# ruff: noqa: E402 - the environment is set before the libraries read it

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from reliability.harness import set_environment

set_environment()

import torch

from reliability import fault_trials as trials
from reliability.fault_trials import ROW, SAVE_TOKENS, STAGES, STEPS, Lab, Outcome
from reliability.harness import FAULTS, add_outputs, publish, surroundings
from tiny_onn.teacher.load import quiet_transformers

# Random kills that one run takes before it may end.
KILLS_PER_RUN = 4
SHORT = (
    "SIGKILL at",
    "SIGKILL while saving, in the middle",
    "SIGKILL while saving, before the folder",
    "SIGKILL while saving, while",
    "Ctrl-C",
    "A second run",
    "Newest checkpoint: a bit",
    "Disk full",
    "Write permission",
    "NaN in the loss",
    "Inf in gradient",
    "A pipe",
    "The tokenizer",
)


class Fault(NamedTuple):
    """One row of the table."""

    name: str
    times: int
    """Trials of the long form with 100 kills; 0: as many as give the random kills asked for."""
    trial: Callable[[Lab], Outcome]


def all_faults() -> list[Fault]:
    """The rows, in the order of the table."""
    nan, inf = float("nan"), float("inf")
    return [
        Fault(
            "SIGKILL at a random instant", 0, partial(trials.killed_at_random, kills=KILLS_PER_RUN)
        ),
        *(
            Fault(f"SIGKILL while saving, {stage}", 5, partial(trials.killed_in_stage, stage=stage))
            for stage in STAGES
        ),
        Fault("Ctrl-C", 5, partial(trials.interrupted, number=signal.SIGINT)),
        Fault("SIGTERM", 5, partial(trials.interrupted, number=signal.SIGTERM)),
        Fault("A second run in the folder", 3, trials.second_run),
        *(
            Fault(f"Newest checkpoint: {text}", 10, partial(trials.damaged, kind=kind))
            for kind, text in (
                ("a bit flipped", "a bit of a file flipped"),
                ("truncated", "a file truncated"),
                ("gone", "a file gone"),
            )
        ),
        Fault("Disk full at a random size", 10, trials.full_disk),
        Fault("Write permission removed at a random instant", 10, trials.no_permission),
        *(
            Fault(
                f"{name} in {where}, one step", 3, partial(trials.not_finite, where=where, value=v)
            )
            for where in trials.INJECTED
            for name, v in (("NaN", nan), ("Inf", inf))
        ),
        Fault("NaN in the loss from some step on", 5, trials.never_finite),
        Fault("Reading text raises an I/O error", 5, trials.source_raises),
        Fault("A pipe without a writer among the text", 3, trials.source_stalls),
        Fault("Rows of the text damaged", 5, trials.rows_damaged),
        Fault("A file of the text gone", 5, trials.source_changes),
        Fault("The tokenizer panics", 5, trials.tokenizer_fails),
    ]


def tried(fault: Fault, lab: Lab, times: int) -> dict[str, Any]:
    """A row: how often the fault was tried and survived, and the most work lost."""
    started, outcomes = time.monotonic(), []
    for _ in range(times):
        outcomes.append(fault.trial(lab))
        for problem in outcomes[-1].problems:
            print(f"  {fault.name}: {problem}", flush=True)
    each = KILLS_PER_RUN if fault.times == 0 else 1
    row = {
        "fault": fault.name,
        "tried": each * times,
        "survived": each * sum(not outcome.problems for outcome in outcomes),
        "lost_tokens": max(outcome.lost_tokens for outcome in outcomes),
        "told": next((outcome.line for outcome in outcomes if outcome.line), ""),
        "problems": sorted({problem for outcome in outcomes for problem in outcome.problems}),
    }
    seconds = time.monotonic() - started
    print(f"{row['survived']:4} of {row['tried']:4}  {fault.name} ({seconds:.0f} s)", flush=True)
    return row


def main() -> int:
    """Run, print, write; 1 if a fault was not survived."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs at random instants")
    parser.add_argument("--short", action="store_true", help="once each, one of a kind")
    parser.add_argument("--only", default="", help="only faults whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    add_outputs(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_transformers()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tiny-onn-faults-") as temporary:
        folder = Path(temporary)
        lab = Lab(folder, options.seed)
        print(f"reference run: {lab.seconds:.1f} s", flush=True)
        assert trials.control(lab).problems == ["seen"], "this harness sees no damage"
        real_disk = trials.mounted(folder / "disk", 2**20)
        if real_disk:
            trials.unmount(folder / "disk")
        rows = []
        faults = [fault for fault in all_faults() if options.only in fault.name]
        if options.short:
            faults = [fault for fault in faults if fault.name.startswith(SHORT)]
        kills = -(-options.kills // KILLS_PER_RUN)
        for fault in faults:
            times = kills if fault.times == 0 else 1 if options.short else fault.times
            rows.append(tried(fault, lab, times))
    record = {
        **surroundings(sys.argv),
        "run": f"{STEPS} steps of {ROW} tokens, saved every {SAVE_TOKENS} tokens",
        "seed": options.seed,
        "seconds": round(time.monotonic() - started),
        "disk": "a tmpfs of 0.3 to 1 times the run's size"
        if real_disk
        else "checkpoint writes that answer ENOSPC (no right to mount a tmpfs)",
        "permission": "mode 0555 for a process without CAP_DAC_OVERRIDE",
        "rows": rows,
    }
    publish(FAULTS, record, options)
    return 0 if all(row["tried"] == row["survived"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
