"""The colours of the light and the dark theme for charts, read from `page.css`."""

import re
from pathlib import Path
from typing import Any

STYLE = Path(__file__).parent / "page.css"
THEMES = ("light", "dark")
# Each range of Vega-Lite, its letter in the style sheet, and its number of colours.
RANGES = (("category", "c", 6), ("heatmap", "h", 5), ("diverging", "d", 5))


def colours(theme: str) -> dict[str, str]:
    """Return the style sheet's colours of a theme by name.

    Args:
        theme: one of `THEMES`.
    """
    text = STYLE.read_text(encoding="utf-8")
    selector = ":root" if theme == "light" else f':root[data-theme="{theme}"]'
    block = text.partition(f"{selector} {{")[2].partition("}")[0]
    return dict(re.findall(r"--([a-z]+\d?): (#[0-9a-f]{6});", block))


def vega_config(theme: str) -> dict[str, Any]:
    """Return the configuration that gives Vega-Lite charts a theme's colours.

    Args:
        theme: one of `THEMES`.
    """
    named = colours(theme)
    ink, soft, line = named["ink"], named["soft"], named["line"]
    axis = {
        "labelColor": soft,
        "titleColor": soft,
        "gridColor": line,
        "domainColor": line,
        "tickColor": line,
        "titleFontWeight": 400,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titlePadding": 8,
    }
    return {
        "background": "transparent",
        "font": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
        "view": {"stroke": None},
        "axis": axis,
        "axisX": {"grid": False, "tickCount": 5},
        "axisY": {"domain": False, "ticks": False, "tickCount": 5},
        "legend": {
            "labelColor": ink,
            "titleColor": soft,
            "titleFontWeight": 400,
            "labelFontSize": 12,
        },
        "range": {
            name: [named[f"{letter}{i}"] for i in range(count)] for name, letter, count in RANGES
        },
        "mark": {"color": named["c0"]},
        "text": {"color": ink},
        "style": {"reference": {"stroke": soft, "color": soft, "fill": soft}},
    }
