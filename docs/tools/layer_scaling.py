"""Draw how the expert layer's cost grows, and make its table, from the record of a GPU.

The record is what `python -m benchmarks layer_scaling --device cuda` wrote. Without one there is no
picture, and the page says which command makes it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from docs.tools import pages

RECORD = RESULTS / "layer_scaling_cuda.json"
COMMAND = "python -m benchmarks layer_scaling --device cuda"
SWEEPS = {"tokens": "tokens", "experts": "experts of 3,072 neurons", "k": "active experts of 32"}
WAYS = {"MLP": "dense MLP", "dense": "dense-masked path", "sparse": "sparse path"}
RULES = {"default": "", "card": ", card's rule", "sampled": ", sampled lesson"}


def read(path: Path = RECORD) -> dict[str, Any] | None:
    """Return the record; None while there is none."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def label(way: str, rule: str) -> str:
    """Return the name of a line; the dense MLP knows no rule."""
    return WAYS[way] if way == "MLP" else WAYS[way] + RULES[rule]


def charts(record: dict[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a picture for each sweep by its name, with a line for each way."""
    if record is None:
        return
    for sweep, title in SWEEPS.items():
        rows = [row for row in record["rows"] if row["sweep"] == sweep]
        lines = dict.fromkeys(label(way, row["rule"]) for row in rows for way in WAYS if way in row)
        values = {
            # The dense MLP is timed with every rule; its first time counts.
            (label(way, row["rule"]), row[sweep]): float(f"{row[way]:.4g}")
            for row in reversed(rows)
            for way in WAYS
            if way in row
        }
        yield f"layer-{sweep}", chart(sweep, title, list(lines), values)


def chart(
    sweep: str, title: str, lines: list[str], values: dict[tuple[str, int], float]
) -> dict[str, Any]:
    """Draw milliseconds by the number that a sweep changes.

    Args:
        sweep: the name of the number.
        title: the words for it.
        lines: the names of the lines in the order of their colours.
        values: the milliseconds by line and number.
    """
    ticks = sorted({number for _, number in values})
    names = "datum.value >= 1024 ? datum.value / 1024 + 'K' : datum.value"
    encoding = {
        "x": {
            "field": "number",
            "type": "quantitative",
            "title": title,
            "scale": {"type": "log", "base": 2, "domain": [ticks[0], ticks[-1]]},
            "axis": {"values": ticks, "labelExpr": names},
        },
        "y": {
            "field": "ms",
            "type": "quantitative",
            "title": "forward and backward pass, ms",
            "scale": {"type": "log", "nice": True},
        },
        "color": {
            "field": "line",
            "type": "nominal",
            "scale": {"domain": lines},
            "legend": {"title": None, "labelLimit": 260, "symbolType": "stroke"},
        },
    }
    rows = [
        {"line": line, "number": number, "ms": ms} for (line, number), ms in sorted(values.items())
    ]
    return {
        "width": 360,
        "height": 240,
        "data": {"values": rows},
        "mark": {"type": "line", "strokeWidth": 2, "point": {"size": 45}},
        "encoding": encoding,
    }


def section(record: dict[str, Any] | None, place: str) -> str:
    """Return the page's text: exponents and pictures, or the command that makes them.

    Args:
        record: the benchmark's record; None while there is none.
        place: the machine, the versions and the day of the record.
    """
    if record is None:
        return pages.no_record(COMMAND)
    lines = [f"Measured on {place}.", "", "| cost of | against | exponent | from | to |",
             "|---|---|---|---|---|"]  # fmt: skip
    for law in record["fits"]:
        name, against = label(law["way"], law["rule"]), SWEEPS[law["sweep"]]
        ends = f"{law['low']:,} | {law['high']:,}"
        line = f"| {name} | {against} | {law['exponent']:.2f} | {ends} |"
        # The dense MLP is timed with every rule.
        if line not in lines:
            lines.append(line)
    for name, _ in charts(record):
        words = f"Milliseconds of an expert layer against {SWEEPS[name.removeprefix('layer-')]}"
        lines += ["", f'<picture><source media="(prefers-color-scheme: dark)" srcset='
                  f'"figures/{name}-dark.svg"><img', f'src="figures/{name}-light.svg" '
                  f'alt="{words}, a line for each way"></picture>']  # fmt: skip
    return "\n".join(lines) + "\n"
