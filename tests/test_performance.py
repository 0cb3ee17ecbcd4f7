"""The tables of README and docs say what the records say."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def performance(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("performance")
    sys.modules.pop("performance", None)


def test_tables_are_what_the_records_say(performance):
    for page in performance.PAGES:
        text = page.read_text("utf-8")
        assert performance.filled(text) == text, f"{page.name}: run benchmarks/performance.py"
        assert "<!-- performance: " in text


def test_a_stale_table_is_noticed_and_the_text_around_it_kept(performance):
    name, content = next(iter(performance.sections().items()))
    begin = performance.BEGIN.format(name=name)
    page = f"before\n{begin}| old |\n{performance.END}\nafter\n"
    assert performance.filled(page) == f"before\n{begin}{content}{performance.END}\nafter\n"
