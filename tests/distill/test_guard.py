"""Updates that are not finite change nothing, are told with their documents, and end in time."""

import itertools
import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiny import CONFIG, change, make_dense, make_rows, write_run
from tiny_onn.conversion import pipeline as prepare
from tiny_onn.data.packing import Origin, Packer
from tiny_onn.distill import passes, step
from tiny_onn.distill.anomalies import MIN_WINDOW, SPIKE_MADS, WINDOW, Guard, provenance
from tiny_onn.distill.loop import run_distill
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.step import distill_step
from tiny_onn.errors import UserError
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.runs.metrics import read_metrics
from tiny_onn.runs.trained_tensors import student_tensors

ROWS = make_rows((20, 13, 30, 40, 9), 32)
REAL_DISTILL, REAL_CLIP = passes.distill, step.clip_gradients


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    return write_run(
        folder,
        train={
            "tokens": 8 * 64,
            "eval_every_tokens": 0,
            "save_every_tokens": 2 * 64,
            "max_skipped_steps": 3,
        },
    )


@pytest.fixture
def poison(monkeypatch):
    """Make a part of some steps, counted from 1, not finite."""

    def arrange(numbers, part="loss", value=math.nan):
        # A step of one row takes one loss and then clips.
        count, current = itertools.count(1), {"poisoned": False}

        def distill(*arguments, **options):
            current["poisoned"] = next(count) in numbers
            values = REAL_DISTILL(*arguments, **options)
            if current["poisoned"] and part == "loss":
                values.loss.data[3] = value
            return values

        def clip_gradients(student, clip_norm, *rest):
            if current["poisoned"] and part == "gradient":
                bank = student.banks()[1]
                bank.experts.down_proj.grad.view(-1)[7] = value
            return REAL_CLIP(student, clip_norm, *rest)

        monkeypatch.setattr(passes, "distill", distill)
        monkeypatch.setattr(step, "clip_gradients", clip_gradients)

    return arrange


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "muon"])
@pytest.mark.parametrize("part", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_changes_nothing(poison, name, part, value):
    config = change(CONFIG, optim={"name": name})
    dense = make_dense("llama")
    student = prepare.make_student(config, MlpInputs(dense, ROWS))
    optimizer = build_optimizer(student, config.optim)

    def tensors():
        found = {n: t.clone() for n, t in student_tensors(student).items()}
        for label, parameter in student.trainable().items():
            for entry, state in optimizer.state[parameter].items():
                found[f"{label} {entry}"] = torch.as_tensor(state).clone()
        return found

    def take_step(rows):
        return distill_step(student, dense, optimizer, rows, config)

    poison([2], part, value)
    assert take_step(ROWS[:1]).finite
    before = tensors()
    assert not take_step(ROWS[1:2]).finite
    after = tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(p.grad is None for p in student.trainable().values())
    # The skipped batch leaves no trace in the next update either.
    assert take_step(ROWS[2:3]).finite
    assert all(
        tensor.isfinite().all() for tensor in tensors().values() if tensor.is_floating_point()
    )


def test_skipped_steps_are_counted_and_told_with_their_documents(config, tmp_path, poison, capsys):
    poison([2, 3, 5], "loss")
    out = tmp_path / "run"
    run_distill(config, out=out)
    rows: list[Any] = read_metrics(out / "metrics.jsonl")
    skipped = [row for row in rows if row["kind"] == "skipped"]
    assert [(row["step"], row["in_row"]) for row in skipped] == [(2, 1), (3, 2), (5, 1)]
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 4, 6, 7, 8]
    for row in skipped:
        assert math.isnan(row["loss"])
        (fragments,) = row["rows"]
        assert sum(fragment["tokens"] for fragment in fragments) == 64
        assert math.isnan(fragments[0]["loss"])
        assert all(f["source"].startswith(config.data.sources[0]) for f in fragments)
        assert {f["document"] for f in fragments} == {0}
    assert json.loads((out / "summary.json").read_text())["skipped_steps"] == 3
    assert capsys.readouterr().err.count("not finite, skipped (loss nan") == 3


def test_too_many_in_a_row_end_the_run_with_the_last_good_checkpoint(config, tmp_path, poison):
    poison([4, 5, 6, 7, 8], "gradient", math.inf)
    out = tmp_path / "run"
    told = (
        r"^step 6: got 3 updates in a row .*gate_grad_norm.* go on from step-0000002 with --resume"
    )
    with pytest.raises(UserError, match=told):
        run_distill(config, out=out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-0000002"]
    tensors = load_file(out / "checkpoints" / "step-0000002" / "student.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    # The data no longer at fault, the run goes on.
    poison([])
    assert run_distill(config, out=out, resume=True).tokens == 8 * 64


def test_a_run_that_is_never_finite_leaves_no_checkpoint(config, tmp_path, poison):
    poison(range(1, 100), "loss", math.inf)
    with pytest.raises(UserError, match="and start a new run with another --out"):
        run_distill(config, out=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_spikes_stand_out_from_the_losses_before_them():
    losses = [1.0 + 0.02 * (-1) ** n for n in range(MIN_WINDOW)]
    limit = 1.0 + SPIKE_MADS * 0.02
    below, guard = Guard(), Guard()
    for each in (below, guard):
        assert [each.spike(loss) for loss in losses] == [None] * MIN_WINDOW
    assert below.spike(limit - 1e-6) is None
    assert guard.spike(limit + 1e-6) == pytest.approx({"median": 1.0, "limit": limit})
    # A lasting rise stops being a spike.
    for _ in range(WINDOW):
        guard.spike(3.0)
    assert guard.spike(3.0) is None


def test_a_constant_loss_that_moves_a_little_is_no_spike():
    guard = Guard()
    for _ in range(MIN_WINDOW):
        guard.spike(2.0)
    assert guard.spike(2.1) is None
    assert guard.spike(2.3) is not None


def test_a_restored_guard_judges_as_the_first(config):
    first, second = Guard(), Guard()
    for n in range(150):
        first.spike(math.sin(n))
    first.skip()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (second.skipped, second.skipped_in_row) == (1, 1)
    for n in range(150):
        assert first.spike(3 * math.sin(n / 7)) == second.spike(3 * math.sin(n / 7))
    assert first.state_dict() == second.state_dict()


def test_a_spike_is_recorded_with_the_losses_of_its_documents(
    config, tmp_path, monkeypatch, poison
):
    monkeypatch.setattr("tiny_onn.distill.anomalies.MIN_WINDOW", 4)
    poison([7], "loss", 1e4)
    run_distill(config, out=tmp_path / "run")
    rows: list[Any] = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (spike,) = [row for row in rows if row["kind"] == "spike"]
    assert spike["step"] == 7
    assert spike["loss"] > 100 > spike["limit"] > spike["median"]
    (fragments,) = spike["rows"]
    # The poisoned token is the row's fourth.
    assert fragments[0]["loss"] > 100
    assert all(fragment["loss"] < 10 for fragment in fragments[1:])
    # It was applied like any other.
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, 9))


def test_provenance_names_each_fragments_document_and_place():
    packer = Packer(8, pad_token_id=0)
    packer.add([5] * 5, Origin("a.txt", 3, 0))
    packer.add([6] * 9, Origin("b.txt", 0, 0))
    popped = (packer.pop(), packer.pop(), packer.finish())
    rows = [row for row in popped if row is not None]
    losses = [torch.arange(8.0) * row.loss_mask[0] for row in rows]
    first, second = provenance(rows, losses)
    assert [tuple(f.values()) for f in first] == [
        ("a.txt", 3, 0, 5, (0 + 1 + 2 + 3) / 4),
        ("b.txt", 0, 0, 3, (5 + 6) / 2),
    ]
    assert [tuple(f.values()) for f in second] == [("b.txt", 0, 3, 6, (0 + 1 + 2 + 3 + 4) / 5)]
