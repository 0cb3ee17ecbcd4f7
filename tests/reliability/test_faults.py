"""The short form of the fault harness, and the document that its long form wrote."""

import json

import pytest

from reliability.harness import FAULTS, FUZZ, PAGE, RANKS, document_with, results_file
from repository import run_module


@pytest.mark.timeout(600)
def test_a_run_survives_each_kind_of_fault(tmp_path):
    run_module("reliability.faults", "--short", "--kills", 4, "--out", tmp_path / "f.json")
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert len(rows) == 15
    assert all(row["survived"] == row["tried"] >= 1 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_of_two_processes_survives_the_death_of_one(tmp_path):
    options = ("--kills", 6, "--few", 0, "--processes", 2)
    run_module("reliability.rank_faults", *options, "--out", tmp_path / "f.json")
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [row["shard"] for row in rows] == ["none", "optimizer", "full"]
    assert all(row["survived"] == row["tried"] >= 2 for row in rows)


@pytest.mark.parametrize("name", [FAULTS, RANKS, FUZZ])
def test_the_document_says_what_was_measured(name):
    record = json.loads(results_file(name).read_text(encoding="utf-8"))
    document = PAGE.read_text(encoding="utf-8")
    assert document_with(document, name, record) == document


def test_the_long_forms_were_run_and_nothing_was_lost():
    faults, ranks, fuzz = (
        json.loads(results_file(name).read_text()) for name in (FAULTS, RANKS, FUZZ)
    )
    kills = [row for row in faults["rows"] if row["fault"].startswith("SIGKILL at a random")]
    assert sum(row["tried"] for row in kills) >= 100
    for processes in (2, 4):
        name = f"SIGKILL of one of {processes} processes at a random instant"
        assert sum(row["tried"] for row in ranks["rows"] if row["fault"] == name) >= 40
    for row in (*faults["rows"], *ranks["rows"]):
        assert row["tried"] == row["survived"] > 0
    assert fuzz["cases"] >= 10_000
    assert fuzz["failed"] == 0
