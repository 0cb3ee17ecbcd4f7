"""The pictures of README and docs show what the records say, in both themes."""

import importlib
import re
import sys

import pytest

from repository import ROOT
from tiny_onn.report.theme import THEMES, colours, vega_config


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("figures")
    sys.modules.pop("figures", None)


def marks(svg):
    """What the picture says of every mark, for a reader who cannot see it."""
    return re.findall(r'aria-label="([^"]*)"', svg)


def test_pictures_show_what_the_records_say(figures):
    for name, spec in figures.figures():
        for theme in THEMES:
            file = figures.FOLDER / f"{name}-{theme}.svg"
            again = figures.drawn(spec, theme)
            assert marks(file.read_text("utf-8")) == marks(again), "run benchmarks/figures.py"
            assert len(marks(again)) > 3
    assert {path.stem.rpartition("-")[0] for path in figures.FOLDER.iterdir()} == {
        name for name, _ in figures.figures()
    }


def test_pages_show_each_picture_in_both_themes(figures):
    pages = "".join(
        (ROOT / name).read_text("utf-8")
        for name in ("README.md", "docs/results.md", "docs/performance.md")
    )
    for path in figures.FOLDER.iterdir():
        assert f"figures/{path.name}" in pages


def test_themes_have_all_colours_and_they_differ():
    light, dark = map(colours, THEMES)
    assert light.keys() == dark.keys()
    assert all(light[name] != dark[name] for name in light)
    assert len(vega_config("dark")["range"]["heatmap"]) == 5
