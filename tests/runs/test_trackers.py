"""A run's records in an experiment tracker: off by default, and in one place through resumption."""

import json
import os
import threading

import pytest

from run_records import at_step, send
from tiny import write_run
from tiny_onn.distill.loop import run_distill
from tiny_onn.distill.run_log import RunLog
from tiny_onn.distill.run_state import RunState
from tiny_onn.errors import UserError
from tiny_onn.runs.metrics import read_metrics
from tiny_onn.runs.trackers import KINDS, Trackers, check_trackers, flat_settings, numbers_in


def scalars(folder):
    """Return what TensorBoard shows of a folder: steps and values by name."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_shows_what_the_metrics_hold_and_a_resumed_run_goes_on(tmp_path):
    pytest.importorskip("tensorboard")
    config = write_run(tmp_path, train={"tokens": 4 * 64, "eval_every_tokens": 2 * 64})
    out = tmp_path / "run"
    stopped = run_distill(
        config, out=out, track=["tensorboard"], after_step=at_step(2, lambda: send(2))
    )
    assert stopped.interrupted
    assert json.loads((out / "trackers.json").read_text()) == {"tensorboard": "tensorboard"}
    # A resumed run is not told of its tracker again.
    run_distill(config, out=out, resume=True)
    shown, records = scalars(out / "tensorboard"), read_metrics(out / "metrics.jsonl")
    for kinds, name in ((("step",), "train/loss"), (("start", "eval", "end"), "held_out/mean_k")):
        expected = [
            (record["step"], record[name.split("/")[1]])
            for record in records
            if record["kind"] in kinds
        ]
        assert [step for step, _ in shown[name]] == [step for step, _ in expected], name
        values = [value for _, value in expected]
        assert [value for _, value in shown[name]] == pytest.approx(values)
    assert "train/smk/agreement" in shown
    assert "train/lr/0" in shown


def test_a_new_run_in_trackio_never_goes_on_in_one_of_the_same_name(tmp_path):
    options = KINDS["trackio"].options
    settings = flat_settings(write_run(tmp_path))
    one, two = (options(tmp_path / name / "run", None, 0, settings) for name in "ab")
    assert one["name"] != two["name"]
    assert one["resume"] == two["resume"] == "never"
    again = options(tmp_path / "a" / "run", one["name"], 4, settings)
    assert again == {**one, "resume": "allow"}
    assert again["config"]["train.tokens"] == settings["train.tokens"]


def test_a_tracker_that_cannot_begin_is_refused_in_one_line(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none://nowhere")
    with pytest.raises(UserError, match="--track: mlflow cannot begin"):
        Trackers(tmp_path, ["mlflow"], write_run(tmp_path), 0)


def test_nothing_is_tracked_by_default(tmp_path):
    config = write_run(tmp_path, train={"tokens": 64})
    run_distill(config, out=tmp_path / "run")
    assert not (tmp_path / "run" / "trackers.json").exists()
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_tracker_that_is_unknown_or_missing_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(UserError, match="--track: got foo, expected one of tensorboard, wandb"):
        run_distill(write_run(tmp_path), out=tmp_path / "run", track=["foo"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="--track: got trackio, which is not installed; `pip inst"):
        check_trackers(["trackio"])


def test_a_damaged_record_of_trackers_is_refused(tmp_path):
    (tmp_path / "trackers.json").write_text('{"foo": "1"}')
    with pytest.raises(UserError, match="got other trackers than tensorboard"):
        Trackers(tmp_path, [], write_run(tmp_path), 0)


def test_numbers_of_a_record_are_named_by_their_parts():
    record = {"kind": "step", "step": 3, "loss": 0.5, "lr": [1.0], "smk": {"a": 2}, "layers": {}}
    record |= {"pi": None, "tokens": 7}
    assert dict(numbers_in(record)) == {"loss": 0.5, "lr/0": 1.0, "smk/a": 2, "tokens": 7}


def test_a_tracker_that_began_is_finished_where_its_id_cannot_be_recorded(tmp_path):
    pytest.importorskip("tensorboard")
    before = set(threading.enumerate())
    (tmp_path / f".trackers.json.{os.getpid()}.tmp").mkdir()
    with pytest.raises(UserError, match=r"trackers\.json: cannot write it"):
        Trackers(tmp_path, ["tensorboard"], write_run(tmp_path), 0)
    assert set(threading.enumerate()) == before


def test_a_tracker_that_began_is_finished_where_the_metrics_cannot_be_written(tmp_path):
    pytest.importorskip("tensorboard")
    config, before = write_run(tmp_path), set(threading.enumerate())
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot write it"):
        RunLog(tmp_path, config, "distill", (0, 64), RunState.new(config), ["tensorboard"])
    assert set(threading.enumerate()) == before
