"""One run in a folder: the second is refused by name, a killed one's lock is taken over."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from tiny_onn.errors import UserError
from tiny_onn.runs.lock import LOCK_NAME, run_lock

HOLD = """
import sys
from pathlib import Path
from tiny_onn.runs.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_by_the_first_ones_name(tmp_path, holder):
    named = f"in use by process {holder.pid} on {socket.gethostname()} since 20"
    for _ in range(2):
        with pytest.raises(UserError, match=named), run_lock(tmp_path):
            pass
    assert holder.poll() is None
    holder.communicate("\n")
    with run_lock(tmp_path):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_runs_lock_is_taken_over_with_one_line(tmp_path, holder, number, capsys):
    holder.send_signal(number)
    holder.wait()
    assert (tmp_path / LOCK_NAME).exists()
    with run_lock(tmp_path):
        assert f'"pid": {os.getpid()}' in (tmp_path / LOCK_NAME).read_text()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"left by process {holder.pid} on " in lines[0]
    assert lines[0].endswith("which has ended; taken over")


def test_a_run_that_ends_leaves_no_lock(tmp_path, capsys):
    folder = tmp_path / "new" / "run"
    with pytest.raises(RuntimeError, match="mine"), run_lock(folder):
        raise RuntimeError("mine")
    assert list(folder.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_two_runs_of_one_process_are_kept_apart(tmp_path):
    with run_lock(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()} "), run_lock(tmp_path):
            pass
        # The refused one must not have freed it.
        with pytest.raises(UserError, match=f"process {os.getpid()} "), run_lock(tmp_path):
            pass


def test_who_waited_on_a_removed_lock_does_not_hold_the_folder(tmp_path, monkeypatch):
    """The file opened before the holder removed it is another one than the folder's."""
    real_open, ends = os.open, [run_lock(tmp_path)]
    ends[0].__enter__()

    def open_late(path, *arguments):
        descriptor = real_open(path, *arguments)
        if ends:
            ends.pop().__exit__(None, None, None)
        return descriptor

    monkeypatch.setattr("tiny_onn.runs.lock.os.open", open_late)
    with run_lock(tmp_path):
        assert (tmp_path / LOCK_NAME).exists()
        with pytest.raises(UserError, match="in use"), run_lock(tmp_path):
            pass


@pytest.mark.parametrize("text", ["{", "[]", "3", "{}"])
def test_a_lock_that_says_nothing_is_taken_over(tmp_path, text, capsys):
    (tmp_path / LOCK_NAME).write_text(text)
    with run_lock(tmp_path):
        pass
    assert "left by an unknown process" in capsys.readouterr().err


def test_a_folder_that_cannot_be_locked_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot lock it"), run_lock(tmp_path / "file" / "run"):
        pass
