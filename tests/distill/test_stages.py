"""Runs of two stages: the schedule, resuming across the boundary, and annealing of k."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from run_records import at_step
from tiny import TIMES, change, write_run
from tiny_onn.config.checks import validate
from tiny_onn.config.schema import RunConfig
from tiny_onn.conversion.pipeline import prepare
from tiny_onn.distill import loop as train_module
from tiny_onn.distill.loop import run_distill
from tiny_onn.distill.stages import annealed, annealed_k, run_tokens, stage_named
from tiny_onn.errors import UserError
from tiny_onn.routing.thresholds import update_thresholds
from tiny_onn.runs.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Five blockwise steps and four global ones, each stage annealed over half of it."""
    folder = tmp_path_factory.mktemp("run")
    return write_run(
        folder,
        teacher={"dtype": "bfloat16"},
        experts={"init": "importance", "gate_init": "ridge"},
        router={"anneal_fraction": 0.5, "blockwise_anneal_fraction": 0.5},
        optim={"master_dtype": "bfloat16"},
        train={
            "blockwise_tokens": 5 * 64 - 1,
            "tokens": 4 * 64,
            "eval_every_tokens": 0,
            "save_every_tokens": 64,
        },
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run_distill(config, out=out)


def records(out) -> list[dict[str, Any]]:
    """The metrics but for what a clock decides."""
    rows = read_metrics(out / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def test_the_metrics_tell_both_stages(whole):
    out, result = whole
    rows = records(out)
    kinds = ["blocks", "start", *["blockwise"] * 5, "blocks", "eval"]
    assert [row["kind"] for row in rows] == [*kinds, *["step"] * 4, "end"]
    assert [row["tokens"] for row in rows] == [
        *(0, 0, 64, 128, 192, 256, 320, 320, 320),
        *(384, 448, 512, 576, 576),
    ]
    before, after = (row["errors"] for row in rows if row["kind"] == "blocks")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["blockwise"]["error_before"] == before
    assert summary["blockwise"]["error_after"] == after
    assert len(before) == len(after) == 2
    assert before != after
    for row in rows:
        if row["kind"] == "blockwise":
            assert row["loss"] == pytest.approx(sum(row["errors"]) / 2)
    assert result.tokens == summary["tokens"] == 576


def test_each_stage_has_the_whole_schedule_and_anneals(whole):
    steps = [row for row in records(whole[0]) if row["kind"] in ("blockwise", "step")]
    rates = [row["lr"][0] for row in steps]
    for stage in (rates[:5], rates[5:]):
        # The default: a short rise, and a fall over the second half.
        assert stage[0] == pytest.approx(3e-3)
        assert 0 < stage[-1] < 0.3 * stage[0]
    ks = [row["mean_k"] for row in steps]
    # 8 experts, target 4: lines over half of 319 and of 256 tokens.
    assert ks[0] == ks[5] == 8
    assert ks[1:3] == pytest.approx([8 - 4 * 128 / 319, 8 - 4 * 256 / 319], rel=0.12)
    assert ks[6] == pytest.approx(6, rel=0.12)
    assert [*ks[3:5], *ks[7:]] == pytest.approx([4] * 4, rel=0.12)


class PowerCutError(Exception):
    """Stands for whatever ends a process between two steps."""


# Within the first stage, at its end before and after the checkpoint there, and in the second.
@pytest.mark.parametrize("last", [1, 3, 4, 5, 7])
def test_a_run_killed_in_any_stage_goes_on_as_if_it_had_not_been(whole, config, tmp_path, last):
    out = tmp_path / "run"

    def cut_power():
        raise PowerCutError

    with pytest.raises(PowerCutError):
        run_distill(config, out=out, after_step=at_step(last + 1, cut_power))
    newest = max(path.name for path in (out / "checkpoints").iterdir())
    assert newest == f"step-{last:07d}"
    run_distill(config, out=out, resume=True)
    assert records(out) == records(whole[0])
    name = "student/model.safetensors"
    assert (out / name).read_bytes() == (whole[0] / name).read_bytes()
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (out, whole[0])]
    assert summaries[0]["blockwise"] == summaries[1]["blockwise"]


def test_the_second_stage_starts_with_an_empty_optimizer(config, tmp_path, monkeypatch):
    sizes = []

    def watch(step):
        def watched(student, teacher, optimizer, *rest, **options):
            sizes.append(len(optimizer.state))
            return step(student, teacher, optimizer, *rest, **options)

        return watched

    for name in ("blockwise_step", "distill_step"):
        monkeypatch.setattr(train_module, name, watch(getattr(train_module, name)))
    run_distill(config, out=tmp_path / "run")
    # Two layers with two tensors of experts and two of the gate.
    assert sizes == [0, 8, 8, 8, 8, 0, 8, 8, 8]


@pytest.mark.parametrize("selection", ["top_k", "static"])
def test_fixed_selections_anneal_in_whole_experts_and_are_evaluated_at_their_own(
    config, tmp_path, selection
):
    config = change(
        config,
        router={"selection": selection, "objective": "none", "anneal_fraction": 1.0},
        train={"blockwise_tokens": 0},
    )
    config = change(config, router={"blockwise_anneal_fraction": 0.0})
    result = run_distill(config, out=tmp_path / "run")
    rows = records(tmp_path / "run")
    assert [row["mean_k"] for row in rows if row["kind"] == "step"] == [8, 7, 6, 5]
    assert [row["mean_k"] for row in rows if row["kind"] in ("start", "end")] == [4, 4]
    rules = [bank.router.rule for bank in result.prepared.student.banks()]
    assert [rule.target_k for rule in rules] == [4, 4]


def test_a_threshold_follows_a_falling_target_at_once(config):
    student = prepare(config).student
    stage = stage_named("blockwise", 0, config)
    banks = student.banks()
    with annealed(banks, config, stage, 0):
        assert all(bank.router.annealing for bank in banks)
        assert all(bank.router.threshold == -1 for bank in banks)
        # What this step moves the threshold to is the next step's number.
        assert banks[0].router.rule.target_k == pytest.approx(8 - 4 * 64 / (0.5 * 319))
        for bank in banks:
            update_thresholds([bank.router], torch.tensor([0.25]), 0.3, torch.tensor([8.0]))
            # All the way, and the distance to a target that falls is no error to sum up.
            assert (bank.router.threshold, bank.router.correction) == (0.25, 0)
    with annealed(banks, config, stage, 192):
        assert banks[0].router.rule.target_k == 4
        assert not any(bank.router.annealing for bank in banks)


fractions = st.floats(0.01, 1)


@settings(deadline=None)
@given(fraction=fractions, experts=st.integers(2, 64), progress=st.floats(0, 1), data=st.data())
def test_annealing_falls_from_all_experts_to_the_target(fraction, experts, progress, data):
    target = data.draw(st.floats(1, experts))
    k = annealed_k(progress, fraction, experts, target)
    assert target <= k <= experts or k == pytest.approx(target)
    assert annealed_k(0.0, fraction, experts, target) == experts
    assert annealed_k(fraction, fraction, experts, target) == target
    assert annealed_k(min(1.0, progress + 0.1), fraction, experts, target) <= k + 1e-9


@given(
    blockwise=st.integers(1, 500),
    tokens=st.integers(1, 500),
    rows=st.integers(1, 3),
    row_tokens=st.integers(3, 50),
)
def test_the_stages_divide_the_run(blockwise, tokens, rows, row_tokens):
    config = change(
        RunConfig(),
        data={"row_tokens": row_tokens},
        train={"blockwise_tokens": blockwise, "tokens": tokens, "rows_per_step": rows},
    )
    size, done = rows * row_tokens, 0
    stage = stage_named("blockwise", 0, config)
    end = run_tokens(stage, config)
    for asked, last in ((blockwise, False), (tokens, True)):
        begin = done
        while not stage.over(done):
            assert stage.progress(done) == (done - begin) / asked < 1
            done += size
        assert stage.progress(done) == 1
        assert asked <= done - begin < asked + size
        if not last:
            stage = stage_named("global", done, config)
            assert run_tokens(stage, config) == end
    assert end <= done < end + size


@pytest.mark.parametrize(
    ("router", "train", "name"),
    [
        ({"blockwise_anneal_fraction": 0.5}, {}, "blockwise_anneal_fraction"),
        ({"anneal_fraction": 0.5, "target_k": 32.0}, {}, "anneal_fraction"),
        (
            {
                "anneal_fraction": 0.5,
                "selection": "top_any",
                "objective": "none",
            },
            {},
            "anneal_fraction",
        ),
        (
            {"blockwise_anneal_fraction": 0.5, "target_k": 32.0},
            {"blockwise_tokens": 9},
            "blockwise_anneal_fraction",
        ),
        ({"anneal_fraction": 1.5}, {}, "anneal_fraction"),
        ({}, {"blockwise_tokens": -1}, "blockwise_tokens"),
    ],
)
def test_annealing_that_would_do_nothing_is_refused(router, train, name):
    config = change(RunConfig(), router=router, train=train)
    if router.get("selection") == "top_any":
        config = change(config, experts={"weighting": "mean", "gate_init": "random"})
    with pytest.raises(UserError, match=rf"{name}: got .*expected"):
        validate(config)
