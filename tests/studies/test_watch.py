"""A run followed from outside: partial lines, resumption, and runs that wait, train or end."""

import io
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from run_records import send, write_records
from tiny import CONFIG, write_run
from tiny_onn.cli import main as cli
from tiny_onn.distill.loop import run_distill
from tiny_onn.errors import UserError
from tiny_onn.report.live import BLOCKS, Heatmap, sparkline
from tiny_onn.report.sentences import health_of, state_of
from tiny_onn.runs.metrics import MetricsTail, read_metrics
from tiny_onn.studies.report import read_run
from tiny_onn.studies.watch import Follower, run_watch


def shown(renderable, *, width=100, **options: Any) -> str:
    """Return what a terminal shows."""
    out = io.StringIO()
    Console(file=out, width=width, **options).print(renderable)
    return out.getvalue()


def words(renderable, **options: Any) -> str:
    """Return what a terminal shows, with single spaces between the words."""
    return " ".join(shown(renderable, **options).split())


def test_a_line_that_is_being_written_waits_for_its_rest(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.poll() == ([], False)
    path.write_bytes(b'{"step": 1}\n{"st')
    assert tail.poll() == ([{"step": 1}], True)
    assert tail.poll() == ([], False)
    with path.open("ab") as file:
        file.write(b'ep": 2}\n')
    assert tail.poll() == ([{"step": 2}], False)


@pytest.mark.parametrize("after", [b"", b'{"step": 3}\n{"step": 4}\n{"step": 5}\n'])
def test_records_that_a_resumed_run_cut_off_are_forgotten(tmp_path, after):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 9}\n')
    tail = MetricsTail(path)
    tail.poll()
    path.write_bytes(b'{"step": 1}\n' + after)
    assert tail.poll() == (read_metrics(path), True)


def test_a_line_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n')
    tail = MetricsTail(path)
    tail.poll()
    path.write_bytes(b'{"step": 1}\nnonsense\n')
    with pytest.raises(UserError, match="no JSON object in line 2"):
        tail.poll()


def test_a_run_is_followed_from_before_its_start_to_its_end(tmp_path, capsys):
    out = tmp_path / "run"
    follower = Follower(out)
    assert "waiting for it to begin" in words(follower.view())
    assert not follower.ended
    seen = []

    def look(_step, _seconds):
        seen.append(words(follower.view()))
        assert not follower.ended

    config = write_run(tmp_path, train={"tokens": 3 * 64, "stats_every_steps": 1})
    run_distill(config, out=out, after_step=look)
    assert ["step 1," in seen[0], "step 3," in seen[2]] == [True, True]
    for part in ("it trains", "KL, held out", "active experts", "target 4", "Share of tokens"):
        assert part in seen[2]
    assert "too early for a verdict" in seen[2]
    assert follower.ended
    capsys.readouterr()
    run_watch(out, interval_s=0.01, once=False)
    view = " ".join(capsys.readouterr().out.split())
    assert "it has finished" in view
    assert "Verdict: " in view
    assert any(block in view for block in BLOCKS)


def test_a_name_where_no_run_has_begun_is_told_at_once_with_the_runs_beside_it(
    tmp_path, capsys, monkeypatch
):
    out = write_records(tmp_path / "mine", CONFIG, [])
    monkeypatch.setattr("time.sleep", lambda _: out.rename(tmp_path / "mime"))
    run_watch(tmp_path / "mime", interval_s=0.01, once=False)
    said = f"{tmp_path / 'mime'}: no run has begun there yet, and it is waited for; there are {out}"
    assert capsys.readouterr().err == f"{said}\n"


def test_an_interrupted_and_a_killed_run_name_the_way_on(tmp_path):
    config = write_run(tmp_path, train={"tokens": 4 * 64})
    out = tmp_path / "run"
    run_distill(config, out=out, after_step=lambda step, _: send(2) if step == 1 else None)
    assert "it was interrupted; `tiny-onn distill --resume" in words(Follower(out).view())
    (out / "summary.json").unlink()
    assert "it was stopped before its end, by a signal or an error" in words(Follower(out).view())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lock = {"pid": gone.pid, "host": os.uname().nodename, "since_utc": "now"}
    (out / "lock").write_text(json.dumps(lock))
    follower = Follower(out)
    assert "its process has ended without saving" in words(follower.view())
    assert follower.ended


def test_a_run_of_another_machine_that_writes_nothing_is_not_said_to_train(tmp_path):
    out = write_records(tmp_path / "run", CONFIG, [])
    lock = {"pid": os.getpid(), "host": "another-machine", "since_utc": "now"}
    (out / "lock").write_text(json.dumps(lock))
    follower = Follower(out)
    assert "it is being prepared" in words(follower.view())
    assert "The run still trains: 0 of" in state_of(read_run(out))
    for name in ("lock", "metrics.jsonl"):
        os.utime(out / name, (1e9, 1e9))
    said = words(follower.view())
    assert "no news since 2001-09-09 01:46 UTC; it is on another-machine, whose processes" in said
    assert "If it has ended, `tiny-onn distill --resume --out" in said
    run = read_run(out)
    assert "is on another machine and gives no news since 2001-09-09 01:46 UTC" in state_of(run)
    assert health_of(run).startswith("No news since 2001-09-09 01:46 UTC. ")
    # It may train, so that nobody calls it ended.
    assert not follower.ended
    assert not run.finished


def test_the_verb_shows_a_run_once_and_refuses_what_is_none(tmp_path, capsys):
    write_records(tmp_path / "young", CONFIG, [])
    assert cli.main(["watch", str(tmp_path / "young"), "--once"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "it ended before its first step, by a signal or an error; start it again with" in said
    assert cli.main(["watch", str(tmp_path / "none"), "--once"]) == 2
    assert "where no run has begun, expected the folder of a run" in capsys.readouterr().err
    assert cli.main(["watch", "x", "--interval", "0"]) == 2
    assert "--interval: got 0.0, expected a number of seconds" in capsys.readouterr().err


def test_sparklines_rise_with_their_values_and_survive_what_is_not_finite():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 80) == BLOCKS
    assert sparkline(list(range(800)), 8) == BLOCKS
    assert sparkline([1.0, float("nan"), 2.0], 3) == f"{BLOCKS[0]} {BLOCKS[-1]}"
    assert sparkline([float("inf")], 3) == ""
    # Each value is ten times the one before, so that heights are even only in logarithms.
    assert sparkline([10.0**n for n in range(8)], 8) == BLOCKS


def test_a_heatmap_fits_its_terminal_with_and_without_colours():
    load = [[(layer + expert) % 10 / 10 for expert in range(300)] for layer in range(90)]
    plain = shown(Heatmap(load), width=60, color_system=None)
    coloured = shown(Heatmap(load), width=60, color_system="truecolor", force_terminal=True)
    assert [len(text.splitlines()) for text in (plain, coloured)] == [32, 16]
    assert words(Heatmap([[0.0, 0.55, 1.0]]), color_system=None) == "0 +@"
