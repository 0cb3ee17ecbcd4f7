"""docs/probe.md says what the recorded results say."""

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def generator(monkeypatch):
    """The script that writes the tables."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module("probe_docs")
    sys.modules.pop("probe_docs")


def test_the_tables_are_those_of_the_results(generator):
    records = json.loads(generator.RESULTS.read_text(encoding="utf-8"))
    text = generator.DOCS.read_text(encoding="utf-8")
    assert set(records) <= set(generator.SUBJECTS)
    assert generator.with_tables(text, records) == text


def test_a_changed_number_shows(generator):
    records = json.loads(generator.RESULTS.read_text(encoding="utf-8"))
    records["dense"]["layers"]["15"]["remove"]["rules"]["gain"]["spearman"][0] += 0.1
    text = generator.DOCS.read_text(encoding="utf-8")
    assert generator.with_tables(text, records) != text
