"""Signals and lines that nobody reads: a run is saved, its lock is kept, and no handler prints."""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest
import torch

from repository import VARIABLES
from run_records import send
from tiny import write_run
from tiny_onn.console import say
from tiny_onn.distill.loop import run_distill
from tiny_onn.runs import checkpoint as checkpoint_module
from tiny_onn.runs import signals as signals_module
from tiny_onn.runs.checkpoint import Snapshot
from tiny_onn.runs.checkpointer import Checkpointer
from tiny_onn.runs.folder import create_run_folder
from tiny_onn.runs.lock import is_held, run_lock
from tiny_onn.runs.metrics import read_metrics
from tiny_onn.runs.signals import stop_on_signal

pytestmark = pytest.mark.usefixtures("quiet")

SECONDS = 120


@pytest.fixture
def press():
    """Send the main thread Ctrl-C, as a terminal does; another thread may call it."""
    main = threading.main_thread().ident
    assert main is not None
    return lambda: signal.pthread_kill(main, signal.SIGINT)


def steps_of(out):
    metrics = out / "metrics.jsonl"
    return sum(row["kind"] == "step" for row in read_metrics(metrics)) if metrics.exists() else 0


def test_ctrl_c_saves_the_steps_although_it_ends_the_reader_of_the_lines_too(tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    config = write_run(tmp_path, train={"tokens": 10_000_000, "eval_every_tokens": 0})
    create_run_folder(out, config, argv=[])
    command = [sys.executable, "-m", "tiny_onn.cli", "distill", "--resume", "--out", str(out)]
    # A terminal sends Ctrl-C to both programs; a shell with a trap stays to tell the status.
    piped = f"{shlex.join(command)} 2>&1 | tee {shlex.quote(str(log))}"
    line = f"trap : INT; {piped}; exit ${{PIPESTATUS[0]}}"
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | VARIABLES
    with subprocess.Popen(["bash", "-c", line], start_new_session=True, env=variables) as shell:
        deadline = time.monotonic() + SECONDS
        while steps_of(out) < 3:
            assert shell.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(shell.pid, signal.SIGINT)
        assert shell.wait(SECONDS) == 130
    steps = steps_of(out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{steps:07d}"]
    assert (out / "student").is_dir()


def broken_pipe():
    read, write = os.pipe()
    os.close(read)
    return write


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("refusing", [broken_pipe, full_disk])
def test_a_run_whose_lines_nobody_can_get_goes_on_to_its_end(tmp_path, monkeypatch, refusing):
    config = write_run(tmp_path, train={"tokens": 4 * 64, "eval_every_tokens": 128})
    with os.fdopen(refusing(), "w", buffering=1, encoding="utf-8") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        result = run_distill(config, out=tmp_path / "run")
        monkeypatch.undo()
    assert (result.tokens, result.interrupted) == (4 * 64, False)
    assert (tmp_path / "run" / "student").is_dir()


def test_a_signal_in_a_blocked_write_is_noted_and_told_afterwards(monkeypatch, press):
    read, write = os.pipe()
    size = fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    got: list[bytes] = []

    def press_and_read():
        while int.from_bytes(fcntl.ioctl(read, termios.FIONREAD, bytes(4)), sys.byteorder) < size:
            time.sleep(0.01)
        # The main thread has filled the pipe, so that it writes and waits.
        time.sleep(0.2)
        press()
        time.sleep(0.2)
        with os.fdopen(read, "rb") as file:
            got.append(file.read())

    reader = threading.Thread(target=press_and_read)
    reader.start()
    with os.fdopen(write, "w", buffering=1, encoding="utf-8") as stderr, stop_on_signal() as stop:
        monkeypatch.setattr(sys, "stderr", stderr)
        stop.graceful = True
        for _ in range(200):
            say("x" * 63)
        assert stop.agreed()
        monkeypatch.undo()
    reader.join()
    lines = got[0].decode().splitlines()
    assert lines.count("x" * 63) == 200
    assert lines[-1].startswith("Stopping: the current work is abandoned")


def test_a_handler_prints_nothing_and_the_line_comes_once(capsys):
    with stop_on_signal() as stop:
        stop.graceful = True
        send(signal.SIGTERM)
        assert stop
        assert capsys.readouterr().err == ""
        assert stop.agreed()
        assert capsys.readouterr().err.startswith("Stopping: the current work is abandoned")
        assert stop.agreed()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("graceful", [False, True])
def test_signals_after_the_one_that_ends_a_run_leave_its_clean_up_alone(graceful):
    cleaned = False
    with pytest.raises(KeyboardInterrupt), stop_on_signal() as stop:
        stop.graceful = graceful
        try:
            for _ in range(1 + graceful):
                send(signal.SIGTERM)
        finally:
            send(signal.SIGINT)
            send(signal.SIGTERM)
            cleaned = True
    assert cleaned


def test_clean_up_that_takes_too_long_can_be_ended(monkeypatch):
    monkeypatch.setattr(signals_module, "CLEANUP_S", 0.0)
    with stop_on_signal():
        for number in (signal.SIGINT, signal.SIGTERM):
            with pytest.raises(KeyboardInterrupt):
                send(number)


@pytest.fixture
def slow(monkeypatch):
    """Events: that a file of a checkpoint is being written, and that it may be finished."""
    at_work, go_on, real = threading.Event(), threading.Event(), checkpoint_module.save_file

    def save_file(*arguments):
        at_work.set()
        assert go_on.wait(SECONDS)
        real(*arguments)

    monkeypatch.setattr(checkpoint_module, "save_file", save_file)
    return at_work, go_on


def snapshot():
    tensors = {"a": torch.zeros(2)}
    return Snapshot(step=1, student=tensors, optimizer=tensors, state="{}\n")


def test_a_second_ctrl_c_gives_up_a_write_in_flight_and_a_third_leaves_the_lock_to_it(
    tmp_path, slow, press, capsys
):
    (at_work, go_on), told, held = slow, [], []

    def press_thrice():
        assert at_work.wait(SECONDS)
        press()
        while not (said := capsys.readouterr().err):
            time.sleep(0.05)
        told.append(said)
        for _ in range(2):
            press()
            time.sleep(0.3)
        held.append(is_held(tmp_path))
        go_on.set()

    user = threading.Thread(target=press_thrice)
    folder = tmp_path / "checkpoints"
    with pytest.raises(KeyboardInterrupt), stop_on_signal() as stop, run_lock(tmp_path):
        stop.graceful = True
        with Checkpointer(folder, 2, while_waiting=stop.tell) as writer:
            user.start()
            writer.save(snapshot())
            writer.wait()
    assert not is_held(tmp_path)
    user.join()
    assert told[0].startswith("Stopping: the current work is abandoned")
    assert held == [True]
    assert list(folder.iterdir()) == []


def test_an_error_lets_the_write_in_flight_end_and_signals_wait_for_it(tmp_path, slow, press):
    at_work, go_on = slow

    def press_twice():
        assert at_work.wait(SECONDS)
        for _ in range(2):
            time.sleep(0.3)
            press()
        time.sleep(0.3)
        go_on.set()

    def fail():
        with Checkpointer(tmp_path, 2) as writer:
            writer.save(snapshot())
            raise RuntimeError("mine")

    user = threading.Thread(target=press_twice)
    user.start()
    # The second signal ends the run, once the thread has written.
    with pytest.raises(KeyboardInterrupt), stop_on_signal() as stop:
        stop.graceful = True
        fail()
    user.join()
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]
