"""The pictures of README and docs show what the records say, in both themes."""

import pytest

from docs.tools import figures
from repository import ROOT
from tiny_onn.report.theme import THEMES, colours, vega_config


def test_pictures_show_what_the_records_say():
    for file, renewed in figures.pictures():
        text = file.read_text("utf-8")
        assert renewed(text) == text, f"{file.name}: run python -m docs.tools"
        assert len(figures.marks(text)) > 3


def test_every_picture_has_both_themes_and_no_other_file_lies_beside_them():
    names = [file.name for file, _ in figures.pictures()]
    assert names == [f"{name}-{theme}.svg" for name, _ in figures.figures() for theme in THEMES]
    assert sorted(names) == sorted(path.name for path in figures.FOLDER.iterdir())


@pytest.mark.parametrize("change", ["missing", "number", "colour"])
def test_a_stale_picture_is_drawn_again(change):
    file, renewed = next(iter(figures.pictures()))
    text = file.read_text("utf-8")
    old = {
        "missing": "",
        "number": text.replace("kl: 0", "kl: 9", 1),
        "colour": text.replace(colours("light")["ink"], "#123456"),
    }[change]
    assert old != text
    assert figures.marks(renewed(old)) == figures.marks(text)


def test_a_picture_that_only_measures_text_otherwise_stays_as_it_is():
    file, renewed = next(iter(figures.pictures()))
    moved = file.read_text("utf-8").replace("translate(", "translate(1", 1)
    assert renewed(moved) == moved


def test_pages_show_each_picture_in_both_themes():
    pages = "".join(
        (ROOT / name).read_text("utf-8")
        for name in ("README.md", "docs/results.md", "docs/studies.md", "docs/performance.md")
    )
    for path in figures.FOLDER.iterdir():
        assert f"figures/{path.name}" in pages


def test_themes_have_all_colours_and_they_differ():
    light, dark = map(colours, THEMES)
    assert light.keys() == dark.keys()
    assert all(light[name] != dark[name] for name in light)
    assert len(vega_config("dark")["range"]["heatmap"]) == 5
