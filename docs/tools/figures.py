"""Draw the pictures of README and docs from the committed records.

`python -m docs.tools` writes every picture as SVG to `docs/figures/`, for light and dark pages.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import vl_convert

from benchmarks.common import RESULTS, ROOT
from docs.tools import arms_figure, layer_scaling
from docs.tools.arms_figure import digits
from experiments import quality
from experiments.arms_table import read_records
from tiny_onn.report.theme import THEMES, colours, vega_config

FOLDER = ROOT / "docs" / "figures"
CARD = RESULTS / "gpu_nvidia_h200.jsonl"
FONT = "Arial, 'Liberation Sans', Helvetica, sans-serif"
TITLE = {"anchor": "start", "frame": "bounds", "fontSize": 14, "fontWeight": 600, "offset": 12}
ARMS = {
    "recommended": "recommended: the gate learns",
    "frozen ridge gate": "frozen ridge gate: it does not",
    "half-width dense": "half-width dense: pruned, no experts",
    "static choice": "static choice: same experts for all tokens",
    "random routing": "random routing: experts by chance",
}
ROWS = {"packed": "packed documents", "whole": "one document"}

Spec = dict[str, Any]


def figures() -> Iterator[tuple[str, Spec]]:
    """Yield every picture by name."""
    runs = [r for r in read_records(quality.RECORDS, needed=True) if r["group"] == "long"]
    arms = sorted({r["arm"] for r in runs}, key=lambda arm: mean_of(runs, arm, "after"))
    yield "controls", controls(runs, arms)
    yield "tokens", arms_figure.tokens_chart(quality.controls_at_half())
    yield "step-time", step_time(read_records(CARD, needed=True))
    yield from layer_scaling.charts(layer_scaling.read())


def mean_of(runs: Sequence[dict[str, Any]], arm: str, when: str) -> float:
    """Return the mean over seeds of an arm's held-out KL."""
    return fmean(run[when]["forward_kl"] for run in runs if run["arm"] == arm)


def controls(runs: Sequence[dict[str, Any]], arms: Sequence[str]) -> Spec:
    """Draw KL at half of the FFN's compute by arm: a dot for each seed, a bar at their mean."""
    seeds = [{"arm": ARMS[run["arm"]], "kl": digits(run["after"]["forward_kl"])} for run in runs]
    means = [{"arm": ARMS[arm], "kl": digits(mean_of(runs, arm, "after"))} for arm in arms]
    y = {
        "field": "arm",
        "type": "nominal",
        "sort": [ARMS[arm] for arm in arms],
        "title": None,
        "axis": {"labelFontSize": 13, "labelLimit": 320, "grid": True},
    }
    x = {
        "field": "kl",
        "type": "quantitative",
        "title": "KL to the original model on held-out text, nats a token (left is better)",
        "scale": {"type": "log", "domain": [0.1, 1]},
        "axis": {"values": [0.1, 0.2, 0.3, 0.5, 1]},
    }
    return {
        "title": {
            "text": "How far from the original model, at half of its MLP compute",
            "subtitle": "after 2M training tokens; a dot for each seed, a bar at their mean",
        },
        "width": 420,
        "height": {"step": 30},
        "layer": [
            {
                "data": {"values": means},
                "mark": {"type": "tick", "thickness": 2, "size": 20, "style": "reference"},
                "encoding": {"x": x, "y": y},
            },
            {
                "data": {"values": means},
                "mark": {"type": "text", "dx": 34, "align": "left", "fontSize": 12},
                "encoding": {"x": x, "y": y, "text": {"field": "kl", "format": ".3f"}},
            },
            {
                "data": {"values": seeds},
                "mark": {"type": "point", "filled": True, "size": 55, "opacity": 0.85},
                "encoding": {"x": x, "y": y},
            },
        ],
    }


def step_time(records: Sequence[dict[str, Any]]) -> Spec:
    """Draw the time of the card's step, part by part, as stacked bars."""
    phases = {r["rows"]: r["seconds"] for r in records if r.get("kind") == "phases"}
    names = list(next(iter(phases.values())))
    rows = [
        {"rows": ROWS[kind], "part": part, "order": order, "seconds": digits(seconds[part])}
        for kind, seconds in phases.items()
        for order, part in enumerate(names)
    ]
    return {
        "width": 440,
        "height": {"step": 44},
        "data": {"values": rows},
        "mark": {"type": "bar", "height": 26},
        "encoding": {
            "x": {
                "field": "seconds",
                "type": "quantitative",
                "stack": "zero",
                "title": "seconds of a step of 32,768 tokens",
            },
            "y": {
                "field": "rows",
                "type": "nominal",
                "title": None,
                "sort": list(ROWS.values()),
                "axis": {"labelFontSize": 13},
            },
            "order": {"field": "order"},
            "color": {
                "field": "part",
                "type": "nominal",
                "scale": {"domain": names},
                "legend": {"title": None, "orient": "top", "columns": 5, "columnPadding": 22},
            },
        },
    }


def drawn(spec: Spec, theme: str) -> str:
    """Return the picture as SVG in a theme's colours.

    A reader's machine may have another font than the one that was measured here, so there is some
    room around the picture.
    """
    named = colours(theme)
    title = {"color": named["ink"], "subtitleColor": named["soft"], "subtitlePadding": 6}
    config = vega_config(theme) | {"font": FONT, "padding": 16, "title": TITLE | title}
    return vl_convert.vegalite_to_svg(spec, config=config) + "\n"


def marks(svg: str) -> list[str]:
    """Return each mark's description, for readers who cannot see it, and the colours, in order."""
    return re.findall(r'(?:aria-label|fill|stroke)="([^"]*)"', svg)


def pictures() -> Iterator[tuple[Path, Callable[[str], str]]]:
    """Yield each picture's file with the function that gives its text from the one it has.

    A file whose marks are right stays as it is: another machine measures text by other fonts, and
    would place the same marks a little differently.
    """

    def renewed(spec: Spec, theme: str, before: str) -> str:
        after = drawn(spec, theme)
        return before if marks(before) == marks(after) else after

    for name, spec in figures():
        for theme in THEMES:
            yield FOLDER / f"{name}-{theme}.svg", partial(renewed, spec, theme)
