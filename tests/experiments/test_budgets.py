"""The study of budgets: mistakes are told before the work, and each measurement is kept."""

import json
import sys

import pytest

from experiments import budgets
from tiny_onn.errors import UserError

ROW = {"way": "sequence", "budget": 8.0, "text": "mixed", "mean_k": 8.1, "standard_error": None}


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Run the program's main function with options."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["budgets", "--smoke", "--out", str(tmp_path), *options])
        return budgets.main()

    return run


def test_budgets_that_no_router_can_have_are_refused_before_the_conversion(study, monkeypatch):
    monkeypatch.setattr(budgets, "prepare", lambda _: pytest.fail("the model is converted"))
    with pytest.raises(UserError, match=r"^--budgets: got 99, -1, nan, expected 1 to 32 "):
        study("--budgets", "99", "8", "-1", "nan")
    with pytest.raises(UserError, match=r"^--budgets: got 2, expected 3 to 32"):
        study("--budgets", "2", "3", "--set", "experts.num_shared=2")


def test_each_measurement_is_kept_whatever_ends_the_next(study, monkeypatch, tmp_path):
    path = tmp_path / budgets.NAME

    def made(*_):
        for number in (1, 2):
            yield {**ROW, "budget": number}
            rows = json.loads(path.read_text())["rows"]
            assert [row["budget"] for row in rows] == [*range(1, number + 1)]
        raise KeyboardInterrupt

    monkeypatch.setattr(budgets, "made", made)
    with pytest.raises(KeyboardInterrupt):
        study()
    assert "| sequence | mixed | 2 | 8.10 |" in budgets.render(json.loads(path.read_text()))
