"""The layer's rows hold what ran, and what did not is named with its reason."""

from argparse import Namespace

import pytest

from benchmarks import sparse_layer
from benchmarks.registry import find


def run(**options):
    """Return the result of a tiny run, and how many rows were kept each time."""
    kept = []
    given = {"smoke": True, "device": "cpu", "tokens": [40], "k": [4], "rule": ["card"],
             "checked": ["float32"], "repeats": 1, "seconds": 60.0, "profile": False,
             "sweep": None, "keep": lambda result: kept.append(len(result.rows))}  # fmt: skip
    result = find("sparse_layer").run(Namespace(**(given | options)))
    assert result is not None
    return result, kept


def test_a_contender_that_fails_is_named_and_the_others_are_timed(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such\n kernel")

    monkeypatch.setattr(sparse_layer.grouped, "expert_layer", broken)
    result, kept = run()
    (row,) = result.rows
    assert row["dense"] > 0
    assert "grouped" not in row
    assert {"tokens": 40, "k": 4, "rule": "card", "way": "grouped",
            "reason": "RuntimeError: no such kernel"} in result.more["skipped"]  # fmt: skip
    assert kept[-1] == 1


def test_rows_beyond_the_time_budget_are_named():
    result, kept = run(seconds=0.0, rule=["card", "default"])
    assert list(result.rows) == []
    late = [row for row in result.more["skipped"] if row["reason"] == "time budget"]
    assert [row["rule"] for row in late] == ["card", "default"]
    assert kept == [0, 0]


def test_ours_is_the_fastest_path_that_is_launched_as_the_mlp_is():
    row = {"rule": "default", "tokens": 2048, "k": 4, "MLP": 2.0, "dense": 3.0, "grouped": 2.5,
           "MLP, captured": 1.0, "dense, captured": 1.5, "sparse, captured": 1.25,
           "sparse, rows, captured": 4.0}  # fmt: skip
    ratios = sparse_layer.ratios_of([row])
    where = "default, 2048 tokens, k=4"
    assert ratios == {
        f"dense / MLP, {where}": 1.5,
        f"ours / MLP, {where}": 1.25,
        f"sparse / MLP, captured, {where}": 1.25,
        f"dense / MLP, captured, {where}": 1.5,
        f"ours / MLP, captured, {where}": pytest.approx(1.25),
    }
