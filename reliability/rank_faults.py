"""Kill processes of runs that have several, let torch's agent start them again, compare the ends.

    python -m reliability.rank_faults --kills 40

Every value of `train.shard` has its share of the kills, and an undisturbed run of its own. A trial
survived if the run went on by itself and ended with the student, the last checkpoint, the
optimizer state, the data position and the metrics of that run, bit for bit, and if nobody saw a
traceback. Prints a table, writes it as JSON and into docs/reliability.md. The instants of the
kills depend on the machine's speed.
"""

# ruff: noqa: E402 - the environment is set before the libraries read it

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

from reliability.harness import set_environment

set_environment()

import torch

from reliability import rank_trials as trials
from reliability.fault_trials import ROW
from reliability.harness import RANKS, add_outputs, publish, surroundings
from reliability.rank_trials import ROWS_PER_STEP, SAVE_TOKENS, STAGES, STEPS, Kills, RankLab
from tiny_onn.config.schema import Shard
from tiny_onn.teacher.load import quiet_transformers

# Trials of each stage of saving, of each kind of damage, and kills under the command torchrun.
FEW = 5
SHARDS = get_args(Shard)


def tried(shard: str, name: str, trial: Callable[[], Kills], kills: int) -> dict[str, Any]:
    """A row: how often the fault was tried and survived, and the most work lost."""
    started, done, survived, lost = time.monotonic(), 0, 0, 0
    problems: set[str] = set()
    while done < kills:
        one = trial()
        done += one.number
        survived += 0 if one.outcome.problems else one.number
        lost = max(lost, one.outcome.lost_tokens)
        problems |= set(one.outcome.problems)
        for problem in one.outcome.problems:
            print(f"  {name}: {problem}", flush=True)
    seconds = time.monotonic() - started
    print(f"{survived:4} of {done:4}  {name}, {shard} ({seconds:.0f} s)", flush=True)
    row = {"fault": name, "shard": shard, "tried": done, "survived": survived}
    return {**row, "lost_tokens": lost, "told": "", "problems": sorted(problems)}


def rows_of(lab: RankLab, kills: int, few: int) -> list[dict[str, Any]]:
    """The rows of some processes and a value of `train.shard`."""
    who = f"{lab.processes} processes"
    at_random = f"SIGKILL of one of {who} at a random instant"
    faults: list[tuple[str, Callable[[], Kills], int]] = [
        (at_random, partial(trials.killed_at_random, lab), kills),
        (
            f"{at_random}, under the command torchrun",
            partial(trials.killed_at_random, lab, command=True),
            few,
        ),
        (
            f"{at_random}, on the second of two machines",
            partial(trials.killed_at_random, lab, machines=2),
            few,
        ),
    ]
    if lab.processes == 2:
        faults += [
            (
                f"SIGKILL while {who} save: {stage}",
                partial(trials.killed_in_stage, lab, stage=stage),
                few,
            )
            for stage in STAGES
        ]
        faults += [
            (f"Newest checkpoint of {who}: {text}", partial(trials.damaged, lab, kind=kind), few)
            for kind, text in (
                ("a bit flipped", "a bit of a file flipped"),
                ("truncated", "a file truncated"),
                ("gone", "a file gone"),
            )
        ]
    return [tried(lab.shard, *fault) for fault in faults if fault[2]]


def main() -> int:
    """Run, print, write; 1 if a fault was not survived."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=40, help="SIGKILLs for each number")
    few = "trials of each other kind, for each value of train.shard"
    parser.add_argument("--few", type=int, default=FEW, help=few)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--shard", nargs="+", choices=SHARDS, default=SHARDS)
    parser.add_argument("--seed", type=int, default=0)
    add_outputs(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_transformers()
    started, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="tiny-onn-ranks-") as temporary:
        for processes, shard in itertools.product(options.processes, options.shard):
            lab = RankLab(Path(temporary) / f"{processes}-{shard}", options.seed, processes, shard)
            print(f"reference run of {processes}, {shard}: {lab.seconds:.1f} s", flush=True)
            rows += rows_of(lab, -(-options.kills // len(options.shard)), options.few)
    record = {
        **surroundings(sys.argv),
        "run": f"{STEPS} steps of {ROWS_PER_STEP} x {ROW} tokens, saved every {SAVE_TOKENS} tokens",
        "seed": options.seed,
        "seconds": round(time.monotonic() - started),
        "rows": rows,
    }
    publish(RANKS, record, options)
    return 0 if all(row["tried"] == row["survived"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
