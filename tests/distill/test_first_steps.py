"""A run that harms its student ends after a few steps, with the reason, and can go on."""

import json

import pytest

from tiny import change, write_run
from tiny_onn.config.read import ADDED
from tiny_onn.distill.loop import run_distill
from tiny_onn.errors import UserError
from tiny_onn.runs.checkpoint import valid_checkpoints
from tiny_onn.runs.folder import read_run_config

ROW = 64
RECIPE = {
    "experts": {"init": "importance", "gate_init": "ridge"},
    "smk": {"surprise": "gain", "direction": "max", "candidates": "all"},
    "train": {"tokens": 18 * ROW, "eval_every_tokens": 0, "save_every_tokens": 0},
}
ABSURD = {"expert_lr": 1.0, "gate_lr": 1e-3}


def settings(folder, **optim):
    return change(write_run(folder, **RECIPE), optim=optim)


def test_a_run_with_an_absurd_rate_stops_with_advice_and_a_checkpoint(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"step 4: got a KL of .* lower optim.expert_lr") as caught:
        run_distill(settings(tmp_path, **ABSURD), out=out)
    assert "\n" not in str(caught.value)
    assert 'optim.lr_scale = "rms"' in str(caught.value)
    assert "step-0000004" in str(caught.value)
    assert [path.name for path in valid_checkpoints(out / "checkpoints")] == ["step-0000004"]
    # The message names the way on.
    config = change(read_run_config(out), train={"stop_if_worse": False})
    allowed = ("train.stop_if_worse",)
    result = run_distill(config, out=out, resume=True, allow_change=allowed)
    assert result.tokens == 18 * ROW


def test_a_run_without_the_check_goes_on(tmp_path):
    config = change(settings(tmp_path, **ABSURD), train={"stop_if_worse": False})
    assert run_distill(config, out=tmp_path / "run").tokens == 18 * ROW


def test_a_rate_that_harms_only_later_is_found_at_the_next_check(tmp_path):
    # Warm-up hides the rate until half of the run is over.
    config = settings(tmp_path, expert_lr=0.3, gate_lr=1e-3, warmup_fraction=0.5)
    config = change(config, train={"tokens": 200 * ROW})
    with pytest.raises(UserError, match=r"step (16|64): got a KL"):
        run_distill(config, out=tmp_path / "run")


@pytest.mark.parametrize("lr_scale", ["absolute", "rms"])
def test_healthy_runs_pass_and_the_check_changes_no_bit(tmp_path, lr_scale):
    config = settings(tmp_path, lr_scale=lr_scale, expert_lr=2e-3, gate_lr=2e-3)
    losses = []
    for name, checked in (("with", True), ("without", False)):
        run = change(config, train={"stop_if_worse": checked})
        run_distill(run, out=tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text("utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        losses.append([r.get("loss", r.get("forward_kl")) for r in records])
    assert losses[0] == losses[1]


def test_a_run_that_learns_labels_is_measured_by_its_own_loss(tmp_path):
    # The teacher is random, so that a student that learns the text moves away from it.
    config = change(settings(tmp_path, expert_lr=2e-3), loss={"label_coef": 0.9})
    result = run_distill(change(config, train={"tokens": 70 * ROW}), out=tmp_path / "run")
    assert result.before is not None
    assert result.after is not None
    assert result.after.forward_kl > 1.5 * result.before.forward_kl + 0.1
    assert result.after.student_nll < result.before.student_nll


def test_a_check_that_begins_with_a_resume_measures_from_there(tmp_path):
    out = tmp_path / "run"
    config = settings(tmp_path, expert_lr=1e-4, gate_lr=1e-4)
    run_distill(change(config, train={"stop_if_worse": False, "tokens": 2 * ROW}), out=out)
    allowed = ("train.stop_if_worse", "train.tokens", "optim.expert_lr", "optim.gate_lr")
    with pytest.raises(UserError, match="step 4: got a KL"):
        run_distill(change(config, optim=ABSURD), out=out, resume=True, allow_change=allowed)


def test_students_that_lose_experts_by_annealing_are_not_stopped(tmp_path):
    # With all experts on, the first steps' losses are near 0 and then rise.
    config = settings(tmp_path, expert_lr=1e-3, gate_lr=1e-3)
    config = change(config, router={"anneal_fraction": 0.8})
    assert run_distill(config, out=tmp_path / "run").tokens == 18 * ROW


def test_a_student_that_equals_its_teacher_at_the_start_is_not_stopped_for_rounding(tmp_path):
    config = settings(tmp_path, expert_lr=1e-4, gate_lr=1e-4)
    config = change(config, router={"selection": "top_k", "target_k": 8.0})
    assert run_distill(config, out=tmp_path / "run").tokens == 18 * ROW


def test_old_runs_go_on_unchecked_in_absolute_units():
    assert ADDED["train.stop_if_worse"] is False
    assert ADDED["optim.lr_scale"] == "absolute"
