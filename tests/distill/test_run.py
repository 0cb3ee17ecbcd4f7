"""A whole run, from a teacher's folder and text files to a student that generates."""

import json
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from run_records import assert_same_run, at_step, records, send, student_of
from tiny import change, write_run
from tiny_onn.conversion.pipeline import prepare
from tiny_onn.conversion.verify import backbone_hash
from tiny_onn.distill import loop as train_module
from tiny_onn.distill.loop import run_distill
from tiny_onn.distill.profile import run_profile
from tiny_onn.distill.start_checks import check_start
from tiny_onn.errors import UserError
from tiny_onn.planning.plan import plan
from tiny_onn.runs import checkpoint as checkpoint_module
from tiny_onn.runs.lock import run_lock
from tiny_onn.runs.metrics import read_metrics
from tiny_onn.teacher.load import load_dense

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return write_run(
        folder,
        teacher={"dtype": "bfloat16"},
        experts={"init": "importance", "gate_init": "ridge"},
        # So low that the held-out loss falls to the end: the best checkpoint is the last.
        optim={"expert_lr": 1e-3, "gate_lr": 1e-4},
        train={
            "tokens": 8 * 64,
            "eval_every_tokens": 4 * 64,
            "save_every_tokens": 3 * 64,
            "checkpointing": "layer",
        },
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that nobody disturbed: its folder and its result."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run_distill(config, out=out, argv=["tiny-onn", "distill"])


def test_the_folder_holds_the_whole_run(whole):
    out, result = whole
    names = {entry.name for entry in out.iterdir()}
    assert names >= {"config.json", "environment.json", "metrics.jsonl", "summary.json"}
    assert {"checkpoints", "student"} <= names
    assert not any(name.startswith(".") for name in names)
    rows = read_metrics(out / "metrics.jsonl")
    kinds = ["start", *["step"] * 4, "eval", *["step"] * 4, "end"]
    assert [row["kind"] for row in rows] == kinds
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["tokens"] for row in steps] == [64 * n for n in range(1, 9)]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "step-0000006",
        "step-0000008",
    ]
    assert (result.tokens, result.interrupted) == (512, False)


def test_the_summary_says_what_the_run_brought(whole):
    out, result = whole
    summary = json.loads((out / "summary.json").read_text())
    assert summary["before"] == result.before.as_dict()
    assert summary["after"] == result.after.as_dict()
    assert (summary["steps"], summary["tokens"], summary["interrupted"]) == (8, 512, False)
    assert result.after.forward_kl < 0.95 * result.before.forward_kl
    rows = read_metrics(out / "metrics.jsonl")
    assert summary["before"]["forward_kl"] == rows[0]["forward_kl"]
    assert summary["after"]["forward_kl"] == rows[-1]["forward_kl"]


def test_the_student_loads_and_generates(whole, config):
    out, result = whole
    student, tokenizer = student_of(out), AutoTokenizer.from_pretrained(out / "student")
    prompt = tokenizer("the lazy dog", return_tensors="pt")
    tokens = student.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert tokens.shape[1] == prompt["input_ids"].shape[1] + 8
    assert isinstance(tokenizer.decode(tokens[0]), str)
    dense, _ = load_dense(config.teacher, torch.device("cpu"))
    assert backbone_hash(student) == backbone_hash(dense)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, result.prepared.student.state_dict()[name]), name
    scales = [s.config.sequence_scale for s in (student, result.prepared.student)]
    assert scales == [pytest.approx(1.0, abs=0.1)] * 2
    assert scales[0] == scales[1] != 1.0


def test_the_same_settings_give_the_same_run(whole, config, tmp_path):
    run_distill(config, out=tmp_path / "run")
    assert_same_run(tmp_path / "run", whole[0])


def test_a_folder_with_a_run_in_it_is_not_overwritten(whole, config):
    with pytest.raises(UserError, match="not empty"):
        run_distill(config, out=whole[0])


class PowerCutError(Exception):
    """Stands for whatever ends a process between two steps."""


def fail():
    raise PowerCutError


@pytest.mark.parametrize("last", [2, 3, 5])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(whole, config, tmp_path, last):
    out = tmp_path / "run"
    with pytest.raises(PowerCutError):
        run_distill(config, out=out, after_step=at_step(last, fail))
    assert not (out / "student").exists()
    result = run_distill(config, out=out, resume=True)
    assert not result.interrupted
    assert_same_run(out, whole[0])


def test_ctrl_c_between_steps_leaves_a_usable_student(config, tmp_path, capsys):
    out = tmp_path / "run"
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    interrupt = at_step(2, partial(send, signal.SIGINT))
    result = run_distill(config, out=out, after_step=interrupt)
    assert (result.interrupted, result.tokens) == (True, 128)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert "Stopping: the current work" in capsys.readouterr().err
    assert json.loads((out / "summary.json").read_text())["interrupted"] is True
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-0000002"]
    prompt = AutoTokenizer.from_pretrained(out / "student")("the fox", return_tensors="pt")
    assert student_of(out).generate(**prompt, max_new_tokens=2).shape[0] == 1


def test_a_run_stopped_by_sigterm_goes_on_as_if_it_had_not_been(whole, config, tmp_path, capsys):
    out = tmp_path / "run"
    terminate = at_step(5, partial(send, signal.SIGTERM))
    assert run_distill(config, out=out, after_step=terminate).interrupted
    assert not run_distill(config, out=out, resume=True).interrupted
    assert "going on after step 5, 320 tokens" in capsys.readouterr().err
    assert_same_run(out, whole[0])
    assert json.loads((out / "summary.json").read_text())["interrupted"] is False


def test_a_run_with_bad_input_leaves_no_folder(config, tmp_path):
    (tmp_path / "empty").mkdir()
    bad = change(config, data={"sources": (str(tmp_path / "empty"),)})
    with pytest.raises(UserError, match=r"data\.sources"):
        run_distill(bad, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_second_ctrl_c_stops_at_once_and_the_checkpoint_stays(whole, config, tmp_path):
    out = tmp_path / "run"

    def twice():
        send(signal.SIGINT)
        send(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_distill(config, out=out, after_step=at_step(4, twice))
    run_distill(config, out=out, resume=True)
    assert_same_run(out, whole[0])


def test_resuming_a_finished_run_changes_nothing(config, tmp_path):
    out = tmp_path / "run"
    run_distill(config, out=out)
    before = records(out), (out / "student" / "model.safetensors").read_bytes()
    summary = json.loads((out / "summary.json").read_text())
    run_distill(config, out=out, resume=True)
    assert (records(out), (out / "student" / "model.safetensors").read_bytes()) == before
    assert json.loads((out / "summary.json").read_text()) == summary


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    whole, config, tmp_path
):
    out = tmp_path / "run"
    with pytest.raises(PowerCutError):
        run_distill(config, out=out, after_step=at_step(7, fail))
    file = out / "checkpoints" / "step-0000006" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    run_distill(config, out=out, resume=True)
    assert_same_run(out, whole[0])


def test_resuming_with_other_settings_is_refused(whole, config):
    changed = change(config, optim={"expert_lr": 1.0})
    with pytest.raises(UserError, match="expert_lr"):
        run_distill(changed, out=whole[0], resume=True)


def test_a_second_run_in_the_folder_is_refused(whole, config):
    with run_lock(whole[0]), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        run_distill(config, out=whole[0], resume=True)


def test_resuming_where_there_is_no_run_makes_no_folder(config, tmp_path):
    with pytest.raises(UserError, match="cannot read it"):
        run_distill(config, out=tmp_path / "none", resume=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_is_told_and_leaves_a_folder_to_start_in(
    request, whole, tmp_path, monkeypatch, number
):
    config, capsys = (request.getfixturevalue(name) for name in ("config", "capsys"))
    out = tmp_path / "run"

    def interrupted(*arguments):
        os.kill(os.getpid(), number)
        return prepare(*arguments)

    monkeypatch.setattr(train_module, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_distill(config, out=out)
    assert f"Stopped by {number.name} before this run's first step" in capsys.readouterr().err
    monkeypatch.setattr(train_module, "prepare", prepare)
    run_distill(config, out=out, resume=True)
    assert_same_run(out, whole[0])


def test_the_best_checkpoint_by_held_out_kl_is_named_and_kept(whole, config, tmp_path, monkeypatch):
    scores = iter([9.0, 5.0, 1.0, 4.0, 3.0, 2.0])
    real = train_module.evaluate_layers

    def scored(*arguments):
        result, layers = real(*arguments)
        return replace(result, forward_kl=next(scores)), layers

    monkeypatch.setattr(train_module, "evaluate_layers", scored)
    train = {"eval_every_tokens": 2 * 64, "save_every_tokens": 5 * 64, "keep_checkpoints": 1}
    out = tmp_path / "run"
    run_distill(change(config, train=train), out=out)
    summary = json.loads((out / "summary.json").read_text())
    # Evaluated after steps 2, 4, 6 and 8: the best was not on the schedule of saving.
    assert summary["best"] == {
        "step": 4,
        "tokens": 256,
        "forward_kl": 1.0,
        "checkpoint": "checkpoints/step-0000004",
    }
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["step-0000004", "step-0000008"]
    # An undisturbed run improves to its end.
    assert json.loads((whole[0] / "summary.json").read_text())["best"]["step"] == 8


def refuse(*_):
    raise OSError(28, "No space left on device")


def test_a_disk_without_room_for_a_checkpoint_is_told_before_the_teacher_is_loaded(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    unloadable = shutil.copytree(config.teacher.path, tmp_path / "teacher")
    (unloadable / "model.safetensors").unlink()
    config = change(config, teacher={"path": str(unloadable)})
    out = tmp_path / "new" / "run"
    with pytest.raises(UserError, match=r"--out: got 1.0 kB free on the disk of .*run, expected"):
        run_distill(config, out=out)
    assert not out.parent.exists()


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("master_dtype", ["float32", "bfloat16"])
def test_a_run_takes_the_disk_that_its_plan_counts(config, tmp_path, optimizer, master_dtype):
    config = change(
        config,
        optim={"name": optimizer, "master_dtype": master_dtype},
        train={"tokens": 64, "keep_checkpoints": 2},
    )
    out = tmp_path / "run"
    run_distill(config, out=out)
    counted = plan(config, config.teacher.path, "A100").disk
    files = out.glob("checkpoints/*/*.safetensors")
    tensors = [pair for file in files for pair in load_file(file).items()]
    # The optimizer's scalars are counters.
    held = sum(tensor.nbytes for name, tensor in tensors if tensor.ndim or "|" not in name)
    assert counted.num_checkpoints == 1
    assert counted.checkpoint_bytes == held
    student = load_file(out / "student" / "model.safetensors")
    assert counted.student_bytes == sum(t.nbytes for t in student.values())


def test_a_resumed_run_may_use_the_disk_that_it_has_taken(whole, config, tmp_path, monkeypatch):
    out = shutil.copytree(whole[0], tmp_path / "run")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=250_000))
    with pytest.raises(UserError, match=r"--out: got 250.0 kB free"):
        check_start(config, tmp_path / "other")
    check_start(config, out)


@pytest.mark.parametrize("number", [5, 96])
def test_experts_that_do_not_divide_the_mlp_are_told_from_the_teachers_config(
    config, tmp_path, number
):
    teacher = shutil.copytree(config.teacher.path, tmp_path / "teacher")
    (teacher / "model.safetensors").unlink()
    wrong = change(config, teacher={"path": str(teacher)}, experts={"num_experts": number})
    out = tmp_path / "run"
    for begin in (run_distill, run_profile):
        with pytest.raises(UserError, match=rf"^experts.num_experts: got {number}, expected a div"):
            begin(wrong, out=out)
        assert not out.exists()


def test_a_disk_that_is_full_for_a_while_stops_nothing(request, whole, tmp_path, monkeypatch):
    config, capsys = (request.getfixturevalue(name) for name in ("config", "capsys"))
    out, real = tmp_path / "run", checkpoint_module.save_file
    monkeypatch.setattr(checkpoint_module, "save_file", refuse)
    free = partial(monkeypatch.setattr, checkpoint_module, "save_file", real)
    run_distill(config, out=out, after_step=at_step(4, free))
    assert_same_run(out, whole[0])
    said = capsys.readouterr().err
    assert said.count("the run goes on, but") == 1
    assert "step-0000003: cannot write the checkpoint (No space left on device)" in said
    assert "there is no earlier checkpoint; free some space" in said
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["step-0000006", "step-0000008"]


def test_a_disk_that_is_full_at_the_end_stops_the_run_with_one_line(
    whole, config, tmp_path, monkeypatch
):
    out, real = tmp_path / "run", checkpoint_module.save_file
    fill = partial(monkeypatch.setattr, checkpoint_module, "save_file", refuse)
    told = r"^\S*step-0000008: cannot write .*step-0000004, is whole: free some space and use --res"
    with pytest.raises(UserError, match=told):
        run_distill(config, out=out, after_step=at_step(5, fill))
    assert not (out / "student").exists()
    monkeypatch.setattr(checkpoint_module, "save_file", real)
    run_distill(config, out=out, resume=True)
    assert_same_run(out, whole[0])


@pytest.mark.parametrize("objective", ["smk", "none"])
def test_a_step_records_a_rate_of_the_experts_and_one_of_gates_that_learn(
    config, tmp_path, objective
):
    rates = {"expert_lr": 1e-3, "gate_lr": 5e-3, "warmup_fraction": 0.0, "decay_fraction": 0.0}
    config = change(
        config,
        experts={"compensation": "mean"},
        router={"objective": objective},
        # Muon has several groups of the experts' weights.
        optim={"name": "muon", **rates, "gate_warmup_fraction": 0.0, "gate_decay_fraction": 0.0},
        train={"tokens": 96, "log_every_steps": 1},
    )
    run_distill(config, out=tmp_path / "run")
    rows: list[Any] = read_metrics(tmp_path / "run" / "metrics.jsonl")
    found = {tuple(row["lr"]) for row in rows if row["kind"] == "step"}
    assert found == {(1e-3, 5e-3) if objective == "smk" else (1e-3,)}
