"""The demo on a tiny teacher: its table, and what it does on a machine that is too slow for it."""

import json

import pytest

from tiny import change, write_run
from tiny_onn.config.read import load_config
from tiny_onn.runs.folder import read_run_config
from tiny_onn.studies import demo
from tiny_onn.studies.demo import TooSlow, check_deadline, run_demo

pytestmark = pytest.mark.usefixtures("quiet")

ROW = 64


@pytest.fixture
def overrides(tmp_path):
    config = write_run(tmp_path)
    return [
        f"teacher.path={config.teacher.path}",
        "teacher.dtype=float32",
        f'data.sources=["{config.data.sources[0]}"]',
        f"data.row_tokens={ROW}",
        "data.eval_row_tokens=0",
        f"data.eval_tokens={2 * ROW}",
        "data.held_out_fraction=0.2",
        "experts.num_experts=8",
        f"experts.calibration_tokens={2 * ROW}",
        "router.target_k=4",
        "train.compile=false",
        "train.device=cpu",
    ]


def test_the_demo_compares_arms_of_equal_length_and_says_how_long(overrides, tmp_path, capsys):
    found = run_demo(tmp_path / "demo", [*overrides, f"train.tokens={3 * ROW}"])
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()) == found
    arms = found["arms"]
    assert isinstance(arms, dict)
    assert {name: arm["tokens"] for name, arm in arms.items()} == {
        "student": 3 * ROW,
        "static choice": 3 * ROW,
        "random routing": 3 * ROW,
    }
    rates = [
        read_run_config(tmp_path / "demo" / folder).optim.expert_lr
        for folder in ("student", "static-choice", "random-routing")
    ]
    assert rates == pytest.approx([rates[0], 2.75 * rates[0], 5.5 * rates[0]])
    shown = capsys.readouterr().out
    for text in ("student,", "untrained", "static", "random", "k / target", " / 4"):
        assert text in shown
    assert f"learned from {3 * ROW:,} tokens" in shown
    at_k = found["at_k"]
    assert isinstance(at_k, list)
    assert [numbers["mean_k"] for numbers in at_k] == [4]
    frontier = json.loads((tmp_path / "demo" / "student" / "frontier.json").read_text())
    assert [point["budget"] for point in frontier["points"]] == [6, 4, 2]
    after = arms["student"]["after"]
    assert frontier["points"][0]["teacher_nll"] == pytest.approx(after["teacher_nll"], rel=1e-5)
    report = (tmp_path / "demo" / "report.html").read_text()
    assert "Quality at every cost" in report
    assert "student, at exactly k = 4" in report


def test_a_slow_machine_begins_again_with_fewer_steps_and_says_so(
    overrides, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(demo, "load_config", lambda *given: short(load_config(*given)))
    monkeypatch.setattr(demo, "DEADLINE_S", 0.0)
    found = run_demo(tmp_path / "demo", overrides)
    arms = found["arms"]
    assert isinstance(arms, dict)
    assert {arm["tokens"] for arm in arms.values()} == {ROW}
    said = "".join(capsys.readouterr().err.split())
    assert "notmeasuredatotherbudgets" in said
    assert found["at_k"] == []
    assert not (tmp_path / "demo" / "student" / "frontier.json").exists()
    assert f"with{ROW}trainingtokensperarminsteadof{5 * ROW}" in said
    # The experts' rate is lowered in proportion to the steps.
    full_rate = load_config(None, "demo", overrides).optim.expert_lr
    assert read_run_config(tmp_path / "demo" / "student").optim.expert_lr == full_rate / 5


def short(config):
    """The preset with five steps."""
    return change(config, train={"tokens": 5 * ROW})


@pytest.mark.parametrize(
    ("passed_s", "step_s", "steps"), [(100.0, 2.0, None), (100.0, 2.75, 16), (100.0, 15.0, 4)]
)
def test_the_second_step_tells_how_many_fit(passed_s, step_s, steps):
    config = load_config(None, "demo", [])
    if steps is None:
        check_deadline(config, passed_s, step_s)
        return
    with pytest.raises(TooSlow) as slow:
        check_deadline(config, passed_s, step_s)
    assert slow.value.tokens == steps * config.data.row_tokens
