"""What `faults.py` does to a run: a fork of the harness runs the command, and something goes wrong.

The faults are real where the machine permits (SIGKILL, a full tmpfs, removed permission, damaged
files) and otherwise injected in the forked child only, by wrapping a function of a library or of
the package there: the package holds nothing for tests.
"""

import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from reliability.harness import in_child, wait_for
from reliability.run_results import result_of
from tiny import CONFIG, change, save_teacher, write_corpus
from tiny_onn.cli import main as cli
from tiny_onn.config.schema import RunConfig
from tiny_onn.config.template import config_template
from tiny_onn.data import sources
from tiny_onn.distill import loop as train
from tiny_onn.distill import passes, saving, step
from tiny_onn.runs import checkpoint
from tiny_onn.runs.checkpoint import valid_checkpoints
from tiny_onn.runs.metrics import MetricsWriter

ROW, STEPS, SAVE_STEPS = 64, 24, 4
SAVE_TOKENS = SAVE_STEPS * ROW
LIMIT_S = 300

Arm = Callable[[], None]


@dataclass(kw_only=True, slots=True)
class Ended:
    """How a process ended: its status (negative: a signal) and what it printed."""

    status: int
    output: str


@dataclass(kw_only=True, slots=True)
class Outcome:
    """One trial: what is wrong with how it ended (nothing: it survived), and the work lost."""

    problems: list[str] = field(default_factory=list)
    lost_tokens: int = 0
    line: str = ""
    """What the user was told."""


class Lab:
    """A teacher, text and settings, the finished reference run, and a place for trials."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.number = 0
        self.teacher = save_teacher(folder / "teacher")
        self.corpus = write_corpus(folder / "corpus")
        self.config = self.settings()
        self.toml = folder / "run.toml"
        self.toml.write_text(config_template(self.config))
        self.reference = folder / "reference"
        started = time.monotonic()
        ended = self.run(self.reference)
        self.seconds = time.monotonic() - started
        assert ended.status == 0, ended.output
        self.want = result_of(self.reference)

    def settings(self) -> RunConfig:
        """The settings of the runs."""
        return change(
            CONFIG,
            teacher={"path": str(self.teacher)},
            data={
                "sources": (str(self.corpus),),
                "row_tokens": ROW,
                "shuffle_tokens": 3 * ROW,
                "eval_tokens": 2 * ROW,
                "held_out_fraction": 0.2,
            },
            train={
                "tokens": STEPS * ROW,
                "save_every_tokens": SAVE_TOKENS,
                "eval_every_tokens": 2 * SAVE_TOKENS,
            },
        )

    def new(self) -> Path:
        """A folder for a trial's run."""
        self.number += 1
        return self.folder / f"trial-{self.number}"

    def start(self, out: Path, arm: Arm | None = None, toml: Path | None = None) -> int:
        """Start the command in a fork, going on with the run if there is one; the fork's id."""
        arguments = ["distill", str(toml or self.toml), "--out", str(out)]
        if (out / "config.json").exists():
            arguments = ["distill", "--resume", "--out", str(out)]

        def work() -> int:
            torch.set_num_threads(1)
            os.chdir(self.folder)
            sys.argv = ["tiny-onn", *arguments]
            if arm is not None:
                arm()
            return cli.main(arguments)

        return in_child(work, self.log(out))

    def log(self, out: Path) -> Path:
        """What all the processes of a run printed."""
        return out.with_suffix(".log")

    def run(self, out: Path, arm: Arm | None = None, toml: Path | None = None) -> Ended:
        """The command to its end."""
        log = self.log(out)
        before = log.stat().st_size if log.exists() else 0
        return self.end(out, self.start(out, arm, toml), before)

    def end(self, out: Path, child: int, before: int = 0) -> Ended:
        """Wait for a process; one that hangs is killed and has the status of that."""
        status = wait_for(child, LIMIT_S)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            status = 124
        output = self.log(out).read_text(errors="replace")[before:]
        return Ended(status=status, output=output)

    def finish(
        self, out: Path, outcome: Outcome, *, intervals: int = 2, done: int | None = None
    ) -> None:
        """Resume until the run is done and hold it against the reference.

        Args:
            out: the run folder.
            outcome: of the trial.
            intervals: between checkpoints, that may be lost: one since the last save, and one while
                that was being written.
            done: tokens that were done before the fault; None: those of the last record.
        """
        lost = (tokens_done(out) if done is None else done) - tokens_kept(out)
        outcome.lost_tokens = max(outcome.lost_tokens, lost)
        if outcome.lost_tokens > intervals * SAVE_TOKENS:
            outcome.problems.append(f"lost {outcome.lost_tokens} tokens")
        ended = self.run(out)
        if ended.status != 0:
            outcome.problems.append(f"the resumed run ended with {ended.status}: {tail(ended)}")
            return
        if "Traceback" in ended.output:
            outcome.problems.append(f"traceback: {tail(ended)}")
        got = result_of(out)
        outcome.problems += [
            f"another {name}" for name in self.want if got.get(name) != self.want[name]
        ]


def tail(ended: Ended) -> str:
    """The end of what a process printed."""
    return ended.output[-600:]


def told(ended: Ended, outcome: Outcome, *, status: int = 2) -> None:
    """Check that a process ended as it should for a user: one line, no traceback."""
    lines = [line for line in ended.output.splitlines() if line.startswith("tiny-onn: error: ")]
    if "Traceback" in ended.output:
        outcome.problems.append(f"traceback: {tail(ended)}")
    elif ended.status != status:
        outcome.problems.append(f"ended with {ended.status}, not {status}: {tail(ended)}")
    elif status == 2 and len(lines) != 1:
        outcome.problems.append(f"{len(lines)} error lines: {tail(ended)}")
    if lines:
        outcome.line = re.sub(r"(/[\w.-]+)+/", "", lines[0].removeprefix("tiny-onn: error: "))


def tokens_done(out: Path) -> int:
    """Tokens of the last whole record in the metrics."""
    file = out / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return max((json.loads(line)["tokens"] for line in lines), default=0)


def tokens_kept(out: Path) -> int:
    """Tokens of the newest checkpoint whose hashes hold."""
    for path in valid_checkpoints(out / "checkpoints"):
        manifest = json.loads((path / "manifest.json").read_text())
        digests = {n: hashlib.sha256((path / n).read_bytes()).hexdigest() for n in manifest}
        if all(manifest[name]["sha256"] == digest for name, digest in digests.items()):
            return json.loads((path / "state.json").read_text())["tokens"]
    return 0


def control(lab: Lab) -> Outcome:
    """No fault, but a resumption that forgets the optimizer's state: the harness must see it."""
    out, outcome = half_run(lab), Outcome()
    arm = partial(setattr, checkpoint, "copy_to_optimizer", lambda *_: None)
    ended = lab.run(out, arm)
    if ended.status == 0 and result_of(out) != lab.want:
        outcome.problems.append("seen")
    return outcome


# --- kills ---


def killed_at_random(lab: Lab, kills: int) -> Outcome:
    """One run, killed at `kills` random instants, each time resumed."""
    out, outcome = lab.new(), Outcome()
    for _ in range(kills):
        child = lab.start(out)
        status = wait_for(child, lab.random.uniform(0, lab.seconds))
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        outcome.lost_tokens = max(outcome.lost_tokens, tokens_done(out) - tokens_kept(out))
        # Killed before it had opened its log, it said nothing.
        said = lab.log(out).read_text(errors="replace") if lab.log(out).exists() else ""
        if "Traceback" in said:
            outcome.problems.append(f"traceback: {said[-600:]}")
    lab.finish(out, outcome)
    return outcome


def die() -> None:
    """What a lost machine does."""
    os.kill(os.getpid(), signal.SIGKILL)


def wrapped(
    module: Any,
    name: str,
    number: int,
    action: Callable[..., Any],
    applies: Callable[..., bool] = lambda *_: True,
) -> None:
    """From here on the `number`-th call of a function that applies runs `action` instead.

    `action` gets the original function, then the call's arguments.
    """
    original, calls = getattr(module, name), [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        if applies(*args):
            calls[0] += 1
            if calls[0] == number:
                return action(original, *args, **kwargs)
        return original(*args, **kwargs)

    setattr(module, name, call)


def before(_: Callable[..., Any], *__: Any, **___: Any) -> None:
    """Die instead of the call."""
    die()


def after(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Die when the call is done."""
    original(*args, **kwargs)
    die()


def half_file(original: Callable[..., Any], tensors: Any, path: Path, **kwargs: Any) -> None:
    """Die with half of the file written."""
    original(tensors, path, **kwargs)
    os.truncate(path, path.stat().st_size // 2)
    die()


def half_line(_: Callable[..., Any], writer: Any, record: dict[str, Any]) -> None:
    """Die with half of a metrics record written."""
    writer._file.write(json.dumps(record).encode()[:40])
    writer._file.flush()
    die()


def half_gone(_: Callable[..., Any], path: Path, **__: Any) -> None:
    """Die with one file of a checkpoint removed."""
    next(iter(sorted(path.iterdir()))).unlink()
    die()


def half_student(original: Callable[..., Any], folder: Path, *others: Any) -> None:
    """Die with half of the finished student written."""
    original(folder, *others)
    os.truncate(folder / "model.safetensors", 1000)
    die()


def in_checkpoints(path: Any, *_: Any) -> bool:
    """Whether a path is a checkpoint that is being written."""
    return ".partial" in str(path)


def is_partial_file(path: Any, *_: Any) -> bool:
    """Whether a path is a file of a checkpoint that is being written."""
    return in_checkpoints(Path(path).parent)


def is_partial(path: Any, *_: Any) -> bool:
    """Whether a path is the folder of a checkpoint that is being written."""
    return in_checkpoints(path) and not is_partial_file(path)


def is_new(path: Any, *_: Any) -> bool:
    """Whether a path is a checkpoint's folder, and is made by this call."""
    return in_checkpoints(path) and Path(path).parent.exists()


def is_old(path: Any, *_: Any) -> bool:
    """Whether a path is a finished checkpoint."""
    return Path(path).name.startswith("step-") and Path(path).exists()


# The stages of saving: a function, and how to die at its n-th call.
STAGES: dict[str, Callable[[int], None]] = {
    "after its folder is made": lambda n: wrapped(os, "mkdir", n, after, is_new),
    "in the middle of a file": lambda n: wrapped(checkpoint, "save_file", 2 * n, half_file),
    "before a file is synced": lambda n: wrapped(os, "fsync", 5 * n, before),
    "before the manifest": lambda n: wrapped(checkpoint, "write_json", n, before),
    "before the manifest's rename": lambda n: wrapped(os, "replace", n, before, is_partial_file),
    "before the folder's rename": lambda n: wrapped(os, "replace", n, before, is_partial),
    "after the folder's rename": lambda n: wrapped(os, "replace", n, after, is_partial),
    "while an old one is removed": lambda n: wrapped(shutil, "rmtree", n, half_gone, is_old),
    "in the middle of a metrics record": lambda n: wrapped(
        MetricsWriter, "write", 4 * n, half_line
    ),
    "in the middle of the finished student": lambda _: wrapped(
        saving, "save_student", 1, half_student
    ),
}


def killed_in_stage(lab: Lab, stage: str) -> Outcome:
    """A run that is killed in a stage of saving, then resumed."""
    out, outcome, number = lab.new(), Outcome(), lab.random.randint(1, 3)
    ended = lab.run(out, lambda: STAGES[stage](number))
    if ended.status != -signal.SIGKILL:
        outcome.problems.append(f"was not killed but ended with {ended.status}: {tail(ended)}")
    if "Traceback" in ended.output:
        outcome.problems.append(f"traceback: {tail(ended)}")
    lab.finish(out, outcome)
    return outcome


def interrupted(lab: Lab, number: signal.Signals) -> Outcome:
    """A run that gets Ctrl-C or SIGTERM at a random instant after its first record."""
    out, outcome = lab.new(), Outcome()
    child = lab.start(out)
    until = time.monotonic() + LIMIT_S
    while tokens_done(out) < lab.random.randint(1, STEPS // 2) * ROW and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(child, number)
    ended = lab.end(out, child)
    told(ended, outcome, status=130)
    lab.finish(out, outcome)
    return outcome


# --- damage ---


def half_run(lab: Lab) -> Path:
    """A run that was killed between its third and its fourth checkpoint; made once, copied."""
    whole = lab.folder / "half"
    if not whole.exists():
        count = 3 * SAVE_STEPS + 3
        ended = lab.run(whole, lambda: wrapped(train, "distill_step", count, before))
        assert ended.status == -signal.SIGKILL, ended.output
    out = lab.new()
    shutil.copytree(whole, out)
    shutil.copy(lab.log(whole), lab.log(out))
    return out


DAMAGED_FILES = ("student.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def damaged(lab: Lab, kind: str) -> Outcome:
    """A stopped run, a file of whose newest checkpoint is damaged, then resumed."""
    out, outcome = half_run(lab), Outcome()
    damage(lab, valid_checkpoints(out / "checkpoints")[0] / lab.random.choice(DAMAGED_FILES), kind)
    lab.finish(out, outcome, intervals=3)
    return outcome


def damage(lab: Lab, path: Path, kind: str) -> None:
    """Damage a file."""
    content = bytearray(path.read_bytes())
    if kind == "a bit flipped":
        # A flip in a manifest's spaces or name of a step would change nothing.
        at = lab.random.randrange(len(content))
        content[at] ^= 1 << lab.random.randrange(8)
        path.write_bytes(content)
    elif kind == "truncated":
        path.write_bytes(content[: lab.random.randrange(len(content))])
    else:
        path.unlink()


# --- disk ---


def mounted(folder: Path, size: int) -> bool:
    """Whether a tmpfs of some bytes could be put there."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def unmount(folder: Path) -> None:
    """Take the tmpfs away."""
    subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def full_disk(lab: Lab) -> Outcome:
    """A run in a small tmpfs that fills up, then gets more space and is resumed."""
    outcome, disk = Outcome(), lab.folder / "disk"
    needed = sum(file.stat().st_size for file in lab.reference.rglob("*") if file.is_file())
    size = int(needed * lab.random.uniform(0.3, 1.0))
    if not mounted(disk, size):
        return without_space(lab)
    try:
        out = disk / "run"
        ended = lab.run(out)
        told(ended, outcome, status=2 if ended.status else 0)
        refused = re.search(r"step-(\d+): cannot write", ended.output)
        done = int(refused[1]) * ROW if refused else tokens_done(out)
        more = ["mount", "-o", f"remount,size={10 * needed}", str(disk)]
        subprocess.run(more, check=True, capture_output=True)
        lab.finish(out, outcome, done=done)
    finally:
        unmount(disk)
    return outcome


def no_space(*_: Any, **__: Any) -> None:
    """What a full disk answers."""
    raise OSError(28, "No space left on device")


def without_space(lab: Lab) -> Outcome:
    """The same where nothing can be mounted: the writes of a checkpoint answer as a full disk's."""
    out, outcome = lab.new(), Outcome()
    number = lab.random.randint(1, 8)
    ended = lab.run(out, lambda: wrapped(checkpoint, "save_file", number, no_space))
    told(ended, outcome, status=2 if ended.status else 0)
    refused = re.search(r"step-(\d+): cannot write", ended.output)
    lab.finish(out, outcome, done=int(refused[1]) * ROW if refused else None)
    return outcome


def drop_override() -> None:
    """Give up root's right to ignore permissions (CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH)."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for index in (0, 1, 2):
        sets[index] &= ~0b110
    assert libc.capset(header, sets) == 0


def no_permission(lab: Lab) -> Outcome:
    """A run whose checkpoint folder becomes read-only at a random instant, and writable again."""
    out, outcome = lab.new(), Outcome()
    child = lab.start(out, drop_override)
    folder, until = out / "checkpoints", time.monotonic() + LIMIT_S
    while not folder.exists() and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(lab.random.uniform(0, 0.2))
    folder.chmod(0o555)
    done = tokens_done(out)
    ended = lab.end(out, child)
    told(ended, outcome, status=2 if ended.status else 0)
    folder.chmod(0o755)
    lab.finish(out, outcome, done=done)
    return outcome


# --- numbers ---


def bad_loss(original: Callable[..., Any], *args: Any, value: float, **kwargs: Any) -> Any:
    """The loss, with a value that is no number in it."""
    values = original(*args, **kwargs)
    return replace(values, loss=values.loss * value)


def bad_hidden(original: Callable[..., Any], *args: Any, value: float, **kwargs: Any) -> Any:
    """A model's outputs with such a value in them."""
    return original(*args, **kwargs) * value


def bad_gradient(original: Callable[..., Any], student: Any, *args: Any, value: float) -> Any:
    """Gradients with such a value in one place."""
    next(p for p in student.parameters() if p.grad is not None).grad.view(-1)[7] = value
    return original(student, *args)


INJECTED: dict[str, tuple[Any, str, Callable[..., Any], int]] = {
    # The module, its function, what that does instead, calls of it per step.
    "loss": (passes, "distill", bad_loss, 1),
    "gradient": (step, "clip_gradients", bad_gradient, 1),
    "teacher's output": (passes, "last_hidden_states", bad_hidden, 2),
}


def not_finite(lab: Lab, where: str, value: float) -> Outcome:
    """One step with a number that is not finite: it is skipped, counted, and the run goes on."""
    out, outcome = lab.new(), Outcome()
    module, name, action, per_step = INJECTED[where]
    number = per_step * (lab.random.randint(2, STEPS) - 1) + 1

    def bad(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return action(original, *args, value=value, **kwargs)

    ended = lab.run(out, lambda: wrapped(module, name, number, bad))
    told(ended, outcome, status=0)
    if ended.status == 0:
        summary = json.loads((out / "summary.json").read_text())
        if summary["skipped_steps"] != 1:
            outcome.problems.append(f"skipped {summary['skipped_steps']} steps, expected 1")
        weights = load_file(out / "student" / "model.safetensors")
        if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
            outcome.problems.append("weights that are not finite")
        said = [line for line in ended.output.splitlines() if "skipped" in line]
        outcome.line = said[0] if said else ""
        if len(said) != 1:
            outcome.problems.append(f"told in {len(said)} lines, expected one")
    outcome.lost_tokens = ROW
    return outcome


def never_finite(lab: Lab) -> Outcome:
    """From some step on every loss is NaN: the run stops, and goes on once that is mended."""
    out, outcome = lab.new(), Outcome()
    begin = lab.random.randint(SAVE_STEPS + 1, STEPS - 11)

    def arm() -> None:
        original, calls = passes.distill, [0]

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] < begin:
                return original(*args, **kwargs)
            return bad_loss(original, *args, value=float("nan"), **kwargs)

        passes.distill = call  # pyright: ignore[reportAttributeAccessIssue]

    told(lab.run(out, arm), outcome)
    # What was skipped is no work; the records of it are cut off by the resumption.
    outcome.lost_tokens = max(0, (begin - 1) * ROW - tokens_kept(out))
    ended = lab.run(out)
    if ended.status:
        outcome.problems.append(f"the resumed run ended with {ended.status}: {tail(ended)}")
    elif result_of(out) != lab.want:
        outcome.problems.append("another result")
    return outcome


# --- data ---


def unreadable(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Some texts, then what a broken disk answers."""
    yield next(iter(original(*args, **kwargs)))
    raise OSError(5, "Input/output error", str(args[0]))


def source_raises(lab: Lab) -> Outcome:
    """The disk fails while text is read, when the run starts or when it is resumed."""
    outcome = Outcome()
    out = lab.random.choice((lab.new, lambda: half_run(lab)))()
    number, kept = lab.random.randint(1, 100), tokens_kept(out)
    told(lab.run(out, lambda: wrapped(sources, "read_texts", number, unreadable)), outcome)
    lab.finish(out, outcome, done=kept)
    return outcome


def source_stalls(lab: Lab) -> Outcome:
    """A pipe that nobody writes to lies among the text when the run is resumed."""
    out, outcome = half_run(lab), Outcome()
    kept = tokens_kept(out)
    pipe = lab.corpus / f"{lab.random.randint(0, 99):02d}-pipe.txt"
    os.mkfifo(pipe)
    try:
        told(lab.run(out), outcome)
    finally:
        pipe.unlink()
    lab.finish(out, outcome, done=kept)
    return outcome


def rows_damaged(lab: Lab) -> Outcome:
    """A file of the text is damaged when the run is resumed, and restored after."""
    out, outcome = half_run(lab), Outcome()
    kept = tokens_kept(out)
    path = lab.random.choice(sorted(lab.corpus.iterdir()))
    content = path.read_bytes()
    path.write_bytes(content[:50] + lab.random.choice((b"\xff\xfe", b"\0")) + content[50:])
    try:
        told(lab.run(out), outcome)
    finally:
        path.write_bytes(content)
    lab.finish(out, outcome, done=kept)
    return outcome


def source_changes(lab: Lab) -> Outcome:
    """A file of the text is gone when the run is resumed, and restored after."""
    out, outcome = half_run(lab), Outcome()
    kept = tokens_kept(out)
    path = lab.random.choice(sorted(lab.corpus.iterdir()))
    content = path.read_bytes()
    path.unlink()
    try:
        told(lab.run(out), outcome)
    finally:
        path.write_bytes(content)
    lab.finish(out, outcome, done=kept)
    return outcome


def tokenizer_fails(lab: Lab) -> Outcome:
    """The tokenizer fails on some batch, as its Rust side does when a worker thread dies."""
    out, outcome = half_run(lab) if lab.random.random() < 0.5 else lab.new(), Outcome()
    number, kept = lab.random.randint(1, 3), tokens_kept(out)

    def arm() -> None:
        from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

        class PanicException(BaseException):
            """Named as PyO3's, which cannot be imported."""

        def panic(*_: Any, **__: Any) -> None:
            raise PanicException("called `Option::unwrap()` on a `None` value")

        wrapped(PreTrainedTokenizerFast, "_encode_plus", number, panic)

    told(lab.run(out, arm), outcome)
    lab.finish(out, outcome, done=kept)
    return outcome


def second_run(lab: Lab) -> Outcome:
    """A second run in the folder of one that is going on is refused; the first one is unharmed."""
    out, outcome = lab.new(), Outcome()
    child = lab.start(out)
    until = time.monotonic() + LIMIT_S
    while tokens_done(out) < ROW and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(child, signal.SIGSTOP)
    other = lab.new()
    log = lab.log(other)
    arguments = ["distill", "--resume", "--out", str(out)]
    second = in_child(lambda: cli.main(arguments), log)
    told(lab.end(other, second), outcome)
    os.kill(child, signal.SIGCONT)
    ended = lab.end(out, child)
    if ended.status != 0 or result_of(out) != lab.want:
        outcome.problems.append(f"the first run ended with {ended.status}: {tail(ended)}")
    return outcome
