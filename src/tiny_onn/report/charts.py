"""Charts as SVG in a self-contained HTML page, which needs no script and no network."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

COLOURS = ("#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#666666")
_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:2em;max-width:60em;color:#222;background:#fff}"
    "svg{margin:0 1em 1em 0}svg text{font:12px system-ui,sans-serif;fill:#222}"
    "table{border-collapse:collapse}td,th{padding:.2em .7em;text-align:right}"
)


class Bar(NamedTuple):
    """A labelled value with an interval."""

    label: str
    value: float
    low: float
    high: float
    colour: int = 0


class Line(NamedTuple):
    """A labelled series of points (x, y, label of the point)."""

    label: str
    points: Sequence[tuple[float, float, str]]


def page(title: str, text: Sequence[str], pictures: Sequence[str]) -> str:
    """Return an HTML page with a heading, paragraphs and pictures."""
    paragraphs = "".join(f"<p>{html.escape(part)}</p>\n" for part in text)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{_STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n"
        f"{paragraphs}{''.join(pictures)}</body></html>\n"
    )


def dot_plot(
    title: str, bars: Sequence[Bar], marks: Sequence[tuple[str, float]] = ((("0", 0.0)),)
) -> str:
    """Draw values with their intervals, one under the other, and vertical lines at `marks`."""
    left, width, row = 190, 300, 20
    finite = [x for bar in bars for x in bar[1:4] if math.isfinite(x)]
    low, high = _span([*finite, *(value for _, value in marks)])
    height = 30 + row * len(bars) + 40

    def at(value: float) -> float:
        return left + width * (value - low) / (high - low)

    parts = [_text(0, 14, title, weight="bold")]
    bottom = 30 + row * len(bars)
    for number, (name, value) in enumerate(marks):
        parts.append(
            f'<line x1="{at(value):.1f}" x2="{at(value):.1f}" y1="24" y2="{bottom}" stroke="#999" '
            'stroke-dasharray="3 3"/>'
        )
        parts.append(_text(at(value), bottom + 14 + 14 * (number % 2), name, anchor="middle"))
    for number, bar in enumerate(bars):
        y, colour = 40 + row * number, COLOURS[bar.colour % len(COLOURS)]
        parts.append(_text(left - 10, y + 4, bar.label, anchor="end"))
        if not math.isfinite(bar.value):
            continue
        if math.isfinite(bar.low) and math.isfinite(bar.high):
            parts.append(
                f'<line x1="{at(bar.low):.1f}" x2="{at(bar.high):.1f}" y1="{y}" y2="{y}" '
                f'stroke="{colour}" stroke-width="2"/>'
            )
        parts.append(f'<circle cx="{at(bar.value):.1f}" cy="{y}" r="4" fill="{colour}"/>')
        parts.append(_text(left + width + 8, y + 4, f"{bar.value:.3f}"))
    return _svg(left + width + 60, height, parts, title)


def line_plot(title: str, x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """Draw series of labelled points, joined by lines."""
    left, top, width, height = 70, 30, 460, 280
    points = [point for line in lines for point in line.points]
    x_low, x_high = _span([0.0, *(x for x, _, _ in points)])
    y_low, y_high = _span([0.0, *(y for _, y, _ in points)])

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + width * (x - x_low) / (x_high - x_low),
            top + height * (1 - (y - y_low) / (y_high - y_low)),
        )

    parts = [
        _text(0, 14, title, weight="bold"),
        f'<path d="M{left} {top}V{top + height}H{left + width}" fill="none" stroke="#222"/>',
        _text(left + width / 2, top + height + 34, x_label, anchor="middle"),
        _text(left, top - 4, y_label),
    ]
    for tick in range(5):
        x, y = (low + (high - low) * tick / 4 for low, high in ((x_low, x_high), (y_low, y_high)))
        parts.append(_text(place(x, 0.0)[0], top + height + 16, f"{x:.4g}", anchor="middle"))
        parts.append(_text(left - 6, place(0.0, y)[1] + 4, f"{y:.3g}", anchor="end"))
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        placed = [(*place(x, y), label) for x, y, label in line.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in placed)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, label in placed:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
            parts.append(_text(x + 6, y - 6, label))
        parts.append(_text(left + width - 90, top + 14 * (number + 1), line.label, colour=colour))
    return _svg(left + width + 40, top + height + 44, parts, title)


def _span(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _text(
    x: int | float,
    y: int | float,
    text: str,
    *,
    anchor: str = "start",
    weight: str = "",
    colour: str = "",
) -> str:
    style = (f"font-weight:{weight};" if weight else "") + (f"fill:{colour};" if colour else "")
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{style}">'
        f"{html.escape(text)}</text>"
    )


def _svg(width: int | float, height: int | float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg role="img" aria-label="{html.escape(label)}" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">{"".join(parts)}</svg>\n'
    )
