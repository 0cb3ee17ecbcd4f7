"""Ctrl-C and SIGTERM inside steps and evaluations: what is given up, what is kept, what goes on."""

import json
import os
import signal
import time

import pytest
import torch

from run_records import assert_same_run, at_step, records
from tiny import change, write_run
from tiny_onn.distill import blockwise as blockwise_module
from tiny_onn.distill import loop as train_module
from tiny_onn.distill import passes as passes_module
from tiny_onn.distill import saving as saving_module
from tiny_onn.distill import step as step_module
from tiny_onn.distill.loop import run_distill

pytestmark = pytest.mark.usefixtures("quiet")

ROW = 64


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two blockwise steps and six global ones, of two rows each, evaluated after every other."""
    return write_run(
        tmp_path_factory.mktemp("stopping"),
        experts={"init": "importance", "gate_init": "ridge"},
        optim={"expert_lr": 5e-4, "gate_lr": 1e-4},
        train={
            "blockwise_tokens": 4 * ROW,
            "tokens": 12 * ROW,
            "rows_per_step": 2,
            "eval_every_tokens": 4 * ROW,
            "save_every_tokens": 0,
            "checkpointing": "layer",
        },
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run_distill(config, out=out)
    return out


@pytest.fixture
def signal_in(monkeypatch):
    """Send this process a signal at a call of a function of a module, counted from 1."""

    def arrange(module, name, at, *, number=signal.SIGINT, times=1):
        real, count = getattr(module, name), iter(range(1, 10_000))

        def call(*arguments, **options):
            if next(count) == at:
                for _ in range(times):
                    os.kill(os.getpid(), number)
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    yield arrange
    monkeypatch.undo()


# Where a signal comes, at which call, and how many steps are then finished. `squared_error` is
# called for each layer of each row: four times before the first step, four times in each step. The
# two steps of the blockwise stage call `backward` as often, and the steps after it once for each of
# their two rows.
INSIDE = {
    "a block's forward pass": (blockwise_module, "squared_error", 11, 1),
    "the teacher's forward pass": (passes_module, "last_hidden_states", 5, 3),
    "the student's forward pass": (passes_module, "last_hidden_states", 8, 3),
    "the loss": (passes_module, "distill", 4, 3),
    "the backward pass": (torch.Tensor, "backward", 12, 3),
    "the block errors at the change of stage": (train_module, "block_errors", 2, 2),
    "the evaluation at the change of stage": (train_module, "evaluate_layers", 2, 2),
    "an evaluation": (train_module, "evaluate_layers", 3, 4),
    "the last evaluation": (train_module, "evaluate_layers", 5, 8),
}


@pytest.mark.parametrize("where", INSIDE)
def test_work_in_hand_is_given_up_and_the_run_goes_on_to_the_same_bits(
    request, config, whole, tmp_path, where
):
    signal_in, monkeypatch, capsys = map(
        request.getfixturevalue, ("signal_in", "monkeypatch", "capsys")
    )
    module, name, at, steps = INSIDE[where]
    number = signal.SIGTERM if at % 2 else signal.SIGINT
    monkeypatch.setattr(train_module, "EVALUATION_PATIENCE_S", 0.0)
    signal_in(module, name, at, number=number)
    out = tmp_path / "run"
    result = run_distill(config, out=out)
    assert result.interrupted
    assert "Stopping: the current work is abandoned" in capsys.readouterr().err
    assert not (out / "student").exists()
    assert result.after is None
    newest = max(path.name for path in (out / "checkpoints").iterdir())
    assert newest == f"step-{steps:07d}"
    monkeypatch.undo()
    assert not run_distill(config, out=out, resume=True).interrupted
    assert_same_run(out, whole)


def test_a_stopped_run_with_a_quick_evaluation_ends_with_one(config, whole, tmp_path, signal_in):
    out = tmp_path / "run"
    signal_in(passes_module, "distill", 5)
    result = run_distill(config, out=out)
    assert result.interrupted
    assert result.after is not None
    assert (out / "student").is_dir()
    assert json.loads((out / "summary.json").read_text())["steps"] == 4
    assert records(out)[-1]["kind"] == "end"


def test_a_slow_last_evaluation_is_left_out_and_told(
    config, tmp_path, signal_in, monkeypatch, capsys
):
    monkeypatch.setattr(train_module, "EVALUATION_PATIENCE_S", 0.0)
    signal_in(passes_module, "distill", 5)
    assert run_distill(config, out=tmp_path / "run").after is None
    assert "the last evaluation is left out" in capsys.readouterr().err


def test_a_signal_in_the_update_lets_the_step_end(config, whole, tmp_path, signal_in, monkeypatch):
    out = tmp_path / "run"
    signal_in(step_module, "clip_gradients", 4)
    assert run_distill(config, out=out).tokens == 8 * ROW
    monkeypatch.undo()
    run_distill(config, out=out, resume=True)
    assert_same_run(out, whole)


def test_a_signal_in_the_first_step_leaves_nothing_and_a_folder_to_start_in(
    config, whole, tmp_path, signal_in, monkeypatch
):
    out = tmp_path / "run"
    signal_in(blockwise_module, "squared_error", 5)
    with pytest.raises(KeyboardInterrupt):
        run_distill(config, out=out)
    monkeypatch.undo()
    run_distill(config, out=out, resume=True)
    assert_same_run(out, whole)


def test_a_signal_in_the_first_evaluation_says_that_there_is_nothing_to_save(
    config, tmp_path, signal_in, capsys
):
    signal_in(train_module, "evaluate_layers", 1)
    with pytest.raises(KeyboardInterrupt):
        run_distill(config, out=tmp_path / "run")
    assert "before this run's first step" in capsys.readouterr().err


def test_a_second_signal_inside_a_step_ends_without_saving(config, tmp_path, signal_in):
    out = tmp_path / "run"
    # The first snapshot is that of the evaluation at the change of stage.
    signal_in(saving_module, "take_snapshot", 2)
    signal_in(passes_module, "distill", 5)

    def written():
        while not (out / "checkpoints" / "step-0000002").exists():
            time.sleep(0.01)

    config = change(config, train={"eval_every_tokens": 0})
    with pytest.raises(KeyboardInterrupt):
        # A write that is still in flight would be given up.
        run_distill(config, out=out, after_step=at_step(3, written))
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-0000002"]
    assert not (out / "student").exists()
