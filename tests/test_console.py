"""Bars: how far work is and the time left, on a terminal and in a file, while a model is loaded."""

import hashlib
import http.server
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from serving import serving
from tiny import make_dense, save_teacher
from tiny_onn import console
from tiny_onn.config.schema import TeacherConfig
from tiny_onn.teacher.load import load_dense
from tiny_onn.teacher.quantize import quantize_nf4

COMMIT = "0123456789" * 4


@pytest.fixture
def every_line(monkeypatch):
    """A line after every unit of work, however fast it was."""
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal is sent."""
    shown = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(console, "console", lambda: shown)
    return shown.file


@pytest.fixture
def sharded(tmp_path):
    """A teacher in several files of weights."""
    folder = save_teacher(tmp_path / "teacher")
    (folder / "model.safetensors").unlink()
    make_dense(vocab_size=320).save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def load(folder):
    return load_dense(TeacherConfig(path=str(folder), dtype="float32"), torch.device("cpu"))


def test_a_file_gets_lines_with_the_time_left(every_line, capsys):
    assert list(console.track("abc", "reading")) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["reading: 1 of 3, 0 s left", "reading: 2 of 3, 0 s left"]


def test_a_file_gets_no_line_of_short_work(capsys):
    assert list(console.track("abc", "reading")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_time_left_counts_only_what_was_done_under_the_bar(monkeypatch, capsys):
    clock = iter([0.0, 60.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.Bar("copying", 4_000_000, done=1_000_000, in_bytes=True) as bar:
        bar.update(1_000_000)
    assert capsys.readouterr().err == "copying: 2.0 MB of 4.0 MB, 120 s left\n"


def test_total_may_be_unknown_and_may_be_learned(every_line, capsys):
    with console.Bar("copying", None) as bar:
        bar.update()
        bar.total = 4
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["copying: 1", "copying: 2 of 4, 0 s left"]


def test_a_terminal_gets_a_bar_that_goes_when_the_work_is_done(terminal):
    with console.Bar("copying", 4_000_000, in_bytes=True) as bar:
        bar.update(1_000_000)
    text = terminal.getvalue()
    assert "copying" in text
    assert "/4.0 MB" in text
    # The last thing sent erases the line.
    assert text.endswith("\x1b[2K")


def test_loading_local_shards_shows_the_time_left(sharded, quiet, every_line, capsys):
    model, _ = load(sharded)
    lines = capsys.readouterr().err.splitlines()
    assert f"Loading weights: 1 of {len(list(model.parameters()))}, 0 s left" in lines
    assert f"Checking weights: 1 of {len(model.state_dict())}, 0 s left" in lines


def test_loading_local_shards_draws_bars_on_a_terminal(sharded, quiet, terminal, capsys):
    load(sharded)
    assert "Loading weights" in terminal.getvalue()
    # transformers' own bars go to standard error.
    assert capsys.readouterr().err == ""


def test_quantising_shows_the_time_left(every_line, capsys):
    dense = make_dense(hidden_size=64, intermediate_size=64)
    quantize_nf4(dense, only_mlps=True, double_quant=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Quantising layers: 1 of 6, ")


class Hub(http.server.SimpleHTTPRequestHandler):
    """The part of the hub's protocol that a download of one repository's files uses."""

    def translate_path(self, path):
        # /OWNER/NAME/resolve/REVISION/FILE
        name = path.partition("?")[0].split("/resolve/")[-1].partition("/")[2]
        return str(Path(self.directory) / (name or "missing"))

    def end_headers(self):
        file = Path(self.translate_path(self.path))
        if file.is_file():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            self.send_header("ETag", f'"{digest}"')
            self.send_header("X-Repo-Commit", COMMIT)
        super().end_headers()

    def log_message(self, format, *args):
        """Keep the test's output clean."""


@pytest.fixture
def hub(sharded):
    """The address of a hub whose every repository is the sharded teacher."""

    def handler(*arguments):
        return Hub(*arguments, directory=str(sharded))

    with serving(handler) as address:
        yield address


GENERATE = """
import sys
import huggingface_hub.constants
import tiny_onn.console
from tiny_onn.cli import main as cli

huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096
tiny_onn.console.LINE_SECONDS = 0.0
sys.exit(cli.main(["generate", "owner/teacher", "--prompt", "the", "--max-new-tokens", "1"]))
"""


def test_downloading_from_the_hub_shows_each_file_of_weights(hub, sharded, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    environment |= {"no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", GENERATE]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    for file in sorted(sharded.glob("*.safetensors")):
        size = console.filesize.decimal(file.stat().st_size)
        about = [line for line in lines if line.startswith(f"Downloading {file.name}: ")]
        assert about, done.stderr
        assert f": 4.1 kB of {size}, " in about[0]
    assert any(line.startswith("Loading weights: ") for line in lines)
    # No other bars than ours.
    assert "\r" not in done.stderr
    assert "%|" not in done.stderr


TO_A_DISK_THAT_IS_FULL_FOR_A_WHILE = """
import os
from tiny_onn.console import say
kept = os.dup(2)
say("before")
os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
say("lost")
os.dup2(kept, 2)
say("after")
"""
TO_A_TERMINAL_THAT_VANISHES = """
import os, sys, time
from tiny_onn.console import Bar, console, say
assert console().is_terminal
with Bar("working", 2) as bar:
    os.write(1, b"shown\\n")
    sys.stdin.readline()
    for _ in range(2):
        bar.update()
        time.sleep(0.3)
    say("a line")
print("done", flush=True)
"""


def run_python(program, **options):
    # Python keeps what it could not write, and tries again at its end, only with a buffer.
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.Popen([sys.executable, "-c", program], env=variables, text=True, **options)


def test_lines_for_a_full_disk_are_lost_and_those_after_it_are_written(tmp_path):
    with (tmp_path / "log").open("w") as log:
        assert run_python(TO_A_DISK_THAT_IS_FULL_FOR_A_WHILE, stderr=log).wait(60) == 0
    assert (tmp_path / "log").read_text() == "before\nafter\n"


def test_a_bar_goes_on_where_its_terminal_has_vanished():
    ours, terminal = os.openpty()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with run_python(TO_A_TERMINAL_THAT_VANISHES, stderr=terminal, **pipes) as program:
        os.close(terminal)
        assert program.stdout is not None
        assert program.stdout.readline() == "shown\n"
        os.close(ours)
        assert program.communicate("\n", timeout=60) == ("done\n", None)
    assert program.returncode == 0
