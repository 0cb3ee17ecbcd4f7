"""`eval` at several budgets on a real run: points, files, and generation at a budget."""

import io
import json

import pytest
from rich.console import Console

from tiny import write_run
from tiny_onn.deploy.generate import run_generate
from tiny_onn.distill.loop import run_distill
from tiny_onn.errors import UserError
from tiny_onn.evaluation.evaluate import run_eval
from tiny_onn.evaluation.frontier import run_frontier
from tiny_onn.report.frontier import frontier_tables


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier")
    config = write_run(
        folder,
        num_files=80,
        experts={"calibration_tokens": 1024},
        train={"tokens": 128},
    )
    run_distill(config, out=folder / "run")
    return folder


def render(group):
    """Return what a wide terminal shows."""
    out = io.StringIO()
    Console(width=200, file=out).print(group)
    return out.getvalue()


def frontier(run, out, budgets=()):
    return run_frontier(
        str(run / "run"), budgets=budgets, text=None, device="cpu", max_tokens=512, out=out
    )


def test_a_frontier_is_measured_written_and_drawn(run, tmp_path, capsys):
    found = frontier(run, tmp_path)
    assert f"{tmp_path}: frontier.json" in capsys.readouterr().err
    points = found["points"]
    assert [point["budget"] for point in points] == [8, 6, 4, 3, 2, 1]
    for point in points:
        assert point["mean_k"] == pytest.approx(point["budget"], rel=0.05)
    flops = [point["ffn_flops"] for point in points]
    assert flops == sorted(flops, reverse=True)
    assert json.loads((tmp_path / "frontier.json").read_text()) == found
    page = (tmp_path / "frontier.html").read_text()
    assert page.count("<svg") == 2
    assert page.count("k = 8.0") == 2
    # Self-contained: nothing is fetched.
    assert "http" not in page
    assert "<script" not in page
    shown = render(frontier_tables(found))
    firsts = [line.split()[0] for line in shown.splitlines() if line.strip()]
    deployed = [first for first in firsts[: firsts.index("At")] if first.isdigit()]
    assert deployed == list("864321")


def test_a_budget_changes_the_student_and_its_own_does_not_come_from_the_table(run, tmp_path):
    plain = run_eval(str(run / "run"), text=None, device="cpu", max_tokens=512)
    (small,) = frontier(run, tmp_path, [2.0])["points"]
    assert small["mean_k"] == pytest.approx(2, rel=0.1)
    assert plain["mean_k"] != small["mean_k"]


def test_nothing_is_written_without_a_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(run.rglob("*"))
    assert len(frontier(run, None, [4.0])["points"]) == 1
    assert sorted(run.rglob("*")) == before
    assert not [*tmp_path.iterdir()]


def test_a_budget_that_cannot_be_is_refused_before_anything_is_measured(run, tmp_path):
    with pytest.raises(UserError, match="--budget: got 9, expected 1 to 8"):
        frontier(run, tmp_path / "out", [4.0, 9.0])
    assert not (tmp_path / "out").exists()


def test_generation_takes_a_budget(run, capsys):
    options = {"prompt": "the", "max_new_tokens": 3, "temperature": 0.0, "seed": 0}
    assert run_generate(str(run / "run"), budget=8.0, device="cpu", **options)
    with pytest.raises(UserError, match="--budget: got 0, expected 1 to 8"):
        run_generate(str(run / "run"), budget=0.0, **options)
    with pytest.raises(UserError, match="a dense model, expected a student"):
        run_generate(str(run / "teacher"), budget=4.0, **options)
    assert capsys.readouterr().out
