"""What `rank_faults.py` does to a run of several processes: one of them dies, or a part is damaged.

The processes are started, watched and started again by torch's elastic agent, which is what
torchrun runs. Here its workers are forks of the harness, so that the imports are done once; a part
of the trials starts the command `torchrun` itself.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import psutil
import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from reliability.fault_trials import (
    ROW,
    SAVE_STEPS,
    Arm,
    Lab,
    Outcome,
    after,
    before,
    damage,
    is_partial,
    tail,
    tokens_done,
    tokens_kept,
    wrapped,
)
from reliability.harness import in_child
from reliability.run_results import result_of
from tiny import change
from tiny_onn.cli import main as cli
from tiny_onn.config.schema import RunConfig, Shard
from tiny_onn.distill import loop as train
from tiny_onn.runs import checkpoint, sharded_files
from tiny_onn.runs.checkpoint import valid_checkpoints

ROWS_PER_STEP = 4
STEP_TOKENS = ROWS_PER_STEP * ROW
SAVE_TOKENS = SAVE_STEPS * STEP_TOKENS
STEPS = 24
GOES_ON = re.compile(r"(?:going on after step (\d+)|no checkpoint yet)")
# torch's agent logs how its workers ended, which is not what a user is told.
AGENT_LINE = re.compile(r"[EWI]\d{4} .*torch/distributed/")


class RankLab(Lab):
    """A laboratory whose runs have several processes.

    Args:
        folder: where its runs are.
        seed: of the choices.
        processes: the number of processes.
        shard: the setting `train.shard` of the runs.
    """

    restarts = 3

    def __init__(self, folder: Path, seed: int, processes: int, shard: Shard) -> None:
        self.processes, self.shard = processes, shard
        folder.mkdir()
        super().__init__(folder, seed)

    def settings(self) -> RunConfig:
        """The settings of the runs."""
        return change(
            super().settings(),
            train={
                "rows_per_step": ROWS_PER_STEP,
                "shard": self.shard,
                "tokens": STEPS * STEP_TOKENS,
                "save_every_tokens": SAVE_TOKENS,
                "eval_every_tokens": 2 * SAVE_TOKENS,
            },
        )

    @cached_property
    def command_seconds(self) -> float:
        """The time of an undisturbed run under the command torchrun."""
        started, outcome, out = time.monotonic(), Outcome(), self.new()
        check(self, out, self.start(out, command=True), outcome)
        assert not outcome.problems, outcome.problems
        return time.monotonic() - started

    def start(
        self, out: Path, arm: Arm | None = None, toml: Path | None = None, *, command: bool = False
    ) -> int:
        """Start the agent in a fork, or torchrun; the fork's id."""
        arguments = ["distill", str(toml or self.toml), "--out", str(out)]
        if (out / "config.json").exists():
            arguments = ["distill", "--resume", "--out", str(out)]
        if command:
            return self._torchrun(out, arguments)
        return self._agent(out, arguments, arm, "127.0.0.1:0", machines=1)

    def start_two(self, out: Path) -> list[int]:
        """Start the agents of two machines, both of which are this one; the forks' ids."""
        arguments, meeting = ["distill", str(self.toml), "--out", str(out)], get_free_port()
        options = (out, arguments, None, f"127.0.0.1:{meeting}")
        return [self._agent(*options, machines=2) for _ in range(2)]

    def _agent(
        self, out: Path, arguments: list[str], arm: Arm | None, endpoint: str, machines: int
    ) -> int:
        def worker() -> None:
            # Up to here the agent's own handlers, which a fork inherits, answer a signal.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            (self.folder / f"ready-{os.getpid()}").touch()
            torch.set_num_threads(1)
            os.chdir(self.folder)
            sys.argv = ["tiny-onn", *arguments]
            if arm is not None and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                arm()
            sys.exit(cli.main(arguments))

        def agent() -> int:
            config = LaunchConfig(
                min_nodes=machines,
                max_nodes=machines,
                nproc_per_node=self.processes // machines,
                rdzv_backend="c10d",
                rdzv_endpoint=endpoint,
                run_id=out.name,
                max_restarts=self.restarts,
                start_method="fork",
                local_addr="127.0.0.1",
            )
            try:
                elastic_launch(config, worker)()
            except (ChildFailedError, SignalException) as error:
                print(type(error).__name__)
                return 1
            return 0

        return in_child(agent, self.log(out))

    def all_begun(self, agents: Sequence[int]) -> bool:
        """Whether all forks of the agents have begun their work."""
        pids = [w.pid for w in workers(*agents)]
        begun = [(self.folder / f"ready-{pid}").exists() for pid in pids]
        return len(begun) == self.processes and all(begun)

    def _torchrun(self, out: Path, arguments: list[str]) -> int:
        options = [f"--nproc-per-node={self.processes}", f"--max-restarts={self.restarts}"]
        launcher = ["-m", "torch.distributed.run", "--standalone", *options]
        with self.log(out).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *launcher, "-m", "tiny_onn.cli", *arguments],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            ).pid


def workers(*agents: int) -> list[psutil.Process]:
    """The processes that agents started and that are alive or not yet waited for."""
    found: list[psutil.Process] = []
    for agent in agents:
        with suppress(psutil.NoSuchProcess):
            found += psutil.Process(agent).children()
    return found


def ended(agent: int) -> bool:
    """Whether a process has ended."""
    try:
        return psutil.Process(agent).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@dataclass(kw_only=True, slots=True)
class Kills:
    """A trial with the number of kills that hit a process."""

    outcome: Outcome
    number: int


def killed_at_random(lab: RankLab, *, command: bool = False, machines: int = 1) -> Kills:
    """One run, of which a random process is killed at random instants, and which nobody resumes.

    Of two machines, the second one's processes are killed.
    """
    out, outcome, number = lab.new(), Outcome(), 0
    longest = lab.command_seconds if command else lab.seconds
    agents = lab.start_two(out) if machines == 2 else [lab.start(out, command=command)]
    agent = agents[-1]
    while number < lab.restarts and not ended(agent):
        while not command and not lab.all_begun(agents) and not ended(agent):
            time.sleep(0.002)
        until = time.monotonic() + lab.random.uniform(0, longest)
        while time.monotonic() < until and not ended(agent):
            time.sleep(0.002)
        alive = [w for w in workers(*agents) if w.status() != psutil.STATUS_ZOMBIE]
        if len(alive) < lab.processes:
            continue
        # A worker that is killed when its work is done leaves torch's agent waiting for its answer.
        if tokens_done(out) >= STEPS * STEP_TOKENS:
            break
        lost = tokens_done(out) - tokens_kept(out)
        try:
            # The second machine's processes come last.
            lab.random.choice(alive[-(lab.processes // machines) :]).kill()
        except psutil.NoSuchProcess:
            continue
        outcome.lost_tokens = max(outcome.lost_tokens, lost)
        number += 1
        gone = {w.pid for w in alive}
        # The next one is counted from when all processes have been started again.
        while {w.pid for w in workers(*agents)} & gone and not ended(agent):
            time.sleep(0.002)
    check(lab, out, agent, outcome)
    for other in agents[:-1]:
        if (status := lab.end(out, other).status) != 0:
            outcome.problems.append(f"the first machine's agent ended with {status}")
    return Kills(outcome=outcome, number=number)


def check(lab: RankLab, out: Path, agent: int, outcome: Outcome, *, intervals: int = 2) -> None:
    """Wait for the run's end, and hold it against the undisturbed one."""
    how = lab.end(out, agent)
    said = [line for line in how.output.splitlines() if not AGENT_LINE.match(line)]
    if any("Traceback" in line for line in said):
        outcome.problems.append(f"traceback: {how.output[-2000:]}")
    if how.status != 0:
        outcome.problems.append(f"ended with {how.status}: {tail(how)}")
        return
    if outcome.lost_tokens > intervals * SAVE_TOKENS:
        outcome.problems.append(f"lost {outcome.lost_tokens} tokens")
    got = result_of(out)
    outcome.problems += [f"another {name}" for name in lab.want if got.get(name) != lab.want[name]]
    if left := list((out / "checkpoints").glob(".partial-*")):
        outcome.problems.append(f"{left[0].name} is left")


# The stages of saving: the rank that dies, a function, and how the process dies at its n-th call.
STAGES: dict[str, Callable[[int], None]] = {
    "one process before it writes its file": lambda n: of_rank(
        1, lambda: wrapped(sharded_files, "file_entry", n, before)
    ),
    "one process before its file is synced": lambda n: of_rank(
        1, lambda: wrapped(os, "fsync", n, before)
    ),
    "the first process before the manifest": lambda n: of_rank(
        0, lambda: wrapped(checkpoint, "write_json", n, before)
    ),
    "the first process before the folder's rename": lambda n: of_rank(
        0, lambda: wrapped(os, "replace", n, before, is_partial)
    ),
    "the first process after the folder's rename": lambda n: of_rank(
        0, lambda: wrapped(os, "replace", n, after, is_partial)
    ),
}


def of_rank(rank: int, arm: Arm) -> None:
    """Arm the process of one rank alone."""
    if os.environ["RANK"] == str(rank):
        arm()


def killed_in_stage(lab: RankLab, stage: str) -> Kills:
    """A run of which a process dies in a stage of saving, once."""
    out, outcome, number = lab.new(), Outcome(), lab.random.randint(1, 3)
    agent, done, said = lab.start(out, partial(STAGES[stage], number)), 0, ""
    while not (ways := GOES_ON.findall(said)) and not ended(agent):
        time.sleep(0.002)
        done = max(done, tokens_done(out))
        said = lab.log(out).read_text(errors="replace") if lab.log(out).exists() else ""
    outcome.lost_tokens = done - int(ways[0] or 0) * STEP_TOKENS if ways else 0
    check(lab, out, agent, outcome)
    if len(GOES_ON.findall(lab.log(out).read_text(errors="replace"))) != 1:
        outcome.problems.append("was not started again exactly once")
    return Kills(outcome=outcome, number=1)


def half_run(lab: RankLab) -> Path:
    """A run that was killed as a whole between two checkpoints; made once, copied."""
    whole = lab.folder / "half"
    if not whole.exists():
        count = 3 * SAVE_STEPS + 3
        lab.restarts, restarts = 0, lab.restarts
        how = lab.run(whole, lambda: wrapped(train, "distill_step", count, before))
        lab.restarts = restarts
        assert how.status == 1, how.output
    out = lab.new()
    shutil.copytree(whole, out)
    return out


def damaged(lab: RankLab, kind: str) -> Kills:
    """A stopped run, a file of whose newest checkpoint is damaged, then resumed."""
    out, outcome = half_run(lab), Outcome()
    newest = valid_checkpoints(out / "checkpoints")[0]
    damage(lab, newest / lab.random.choice(sorted(p.name for p in newest.iterdir())), kind)
    outcome.lost_tokens = tokens_done(out) - tokens_kept(out)
    check(lab, out, lab.start(out), outcome, intervals=3)
    return Kills(outcome=outcome, number=1)
