"""Curves over training, and the frontier, as Vega-Lite specifications: plain dictionaries.

Colours, fonts and grid come from the page's theme, so that one specification serves light and dark.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from tiny_onn.report.comparing import points_of
from tiny_onn.report.run_data import Record, Run

Spec = dict[str, Any]

# The maximum number of points of a curve; a longer curve is averaged over neighbouring points.
MAX_POINTS = 300
# The maximum number of points of a chart whose points are marked one by one.
FEW_POINTS = 60
HEIGHT = 240


def thin(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbouring points until at most `MAX_POINTS` are left.

    Points that are not finite are left out, so that a curve ends where its run diverged.
    """
    finite = [pair for pair in pairs if all(math.isfinite(value) for value in pair)]
    size = math.ceil(len(finite) / MAX_POINTS) or 1
    groups = [finite[start : start + size] for start in range(0, len(finite), size)]
    return [tuple(_mean(column) for column in zip(*group, strict=True)) for group in groups]  # pyright: ignore[reportReturnType] - two columns stay two


def rows_of(label: str, pairs: Sequence[tuple[float, float]], **more: str) -> list[Spec]:
    """Return the points of one curve as rows of data."""
    return [
        {"series": label, "tokens": round(x), "value": _digits(y), **more} for x, y in thin(pairs)
    ]


def curve(records: Iterable[Record], field: str) -> list[tuple[float, float]]:
    """Return a field of records over the tokens, without the records that lack it."""
    return [
        (float(record["tokens"]), float(record[field]))
        for record in records
        if record.get(field) is not None
    ]


def kl_spec(runs: Sequence[Run]) -> Spec:
    """Draw the KL of training steps as a line, and of held-out evaluations as points, by run."""
    rows = []
    for run in runs:
        rows += rows_of(run.name, curve(run.steps, "forward_kl"), what="training step")
        rows += rows_of(run.name, curve(run.evaluations, "forward_kl"), what="held-out text")
    names = [run.name for run in runs]
    y = quantity("KL to the teacher, nats", [row["value"] for row in rows])
    shared = {"x": tokens_axis(), "y": y, "color": series_colour(names), "tooltip": tooltip("what")}
    return chart(
        rows,
        [
            layer(shared, {**line_mark(rows), "opacity": 0.75}, "training step"),
            layer(shared, {"type": "line", "strokeDash": [2, 3]}, "held-out text"),
            layer(shared, {"type": "point", "filled": True, "size": 70}, "held-out text"),
            *hovered(shared),
        ],
    )


def rates_spec(runs: Sequence[Run]) -> Spec:
    """Draw the learning rates of experts and gates, with a colour per run, or per rate of one."""
    rows, names = [], ("experts", "gates")
    for run in runs:
        for group, what in enumerate(names):
            pairs = [
                (float(r["tokens"]), float(r["lr"][group]))
                for r in run.steps
                if len(r["lr"]) > group
            ]
            rows += rows_of(run.name if len(runs) > 1 else what, pairs, what=what)
    colour = series_colour([run.name for run in runs] if len(runs) > 1 else names)
    dash = {
        "field": "what",
        "type": "nominal",
        "scale": {"domain": list(names), "range": [[1, 0], [4, 3]]},
        "legend": {
            "title": None,
            "orient": "top",
            "symbolType": "stroke",
            "symbolSize": 300,
            "symbolStrokeColor": "gray",
            "symbolStrokeWidth": 2,
            "symbolFillColor": "transparent",
        },
    }
    y = {**quantity("learning rate", [row["value"] for row in rows]), "axis": {"format": "~e"}}
    shared = {"x": tokens_axis(), "y": y, "color": colour, "tooltip": tooltip("what")}
    dashed = {**shared, "strokeDash": dash} if len(runs) > 1 else shared
    return chart(rows, [{"mark": line_mark(rows), "encoding": dashed}, *hovered(shared)])


def line_spec(title: str, series: dict[str, list[tuple[float, float]]], **axis: Any) -> Spec:  # noqa: ANN401 - what Vega-Lite's axis takes
    """Draw some named curves over the tokens.

    Args:
        title: the title of the vertical axis.
        series: the points of each curve by its name.
        axis: further properties of the vertical axis.
    """
    rows = [row for name, pairs in series.items() for row in rows_of(name, pairs)]
    y = quantity(title, [row["value"] for row in rows])
    y["axis"] = axis
    shared = {
        "x": tokens_axis(),
        "y": y,
        "color": series_colour(list(series)),
        "tooltip": tooltip(),
    }
    return chart(rows, [{"mark": line_mark(rows), "encoding": shared}, *hovered(shared)])


def k_spec(runs: Sequence[Run]) -> Spec:
    """Draw the mean k over training with the span of the layers, held-out k, and the targets."""
    rows, bands = [], []
    for run in runs:
        rows += rows_of(run.name, curve(run.steps, "mean_k"), what="training step")
        rows += rows_of(run.name, curve(run.evaluations, "mean_k"), what="held-out text")
        low = thin(curve(run.steps, "min_layer_k"))
        high = thin(curve(run.steps, "max_layer_k"))
        bands += [
            {"series": run.name, "tokens": round(x), "low": _digits(a), "high": _digits(b)}
            for (x, a), (_, b) in zip(low, high, strict=False)
        ]
    targets = sorted({run.target_k for run in runs if run.target_k is not None})
    y: Spec = {
        "field": "value",
        "type": "quantitative",
        "title": "active experts a token",
        "scale": {"zero": False},
    }
    colour = series_colour([run.name for run in runs])
    shared = {"x": tokens_axis(), "y": y, "color": colour, "tooltip": tooltip("what")}
    band: Spec = {
        "data": {"values": bands},
        "mark": {"type": "area", "opacity": 0.16},
        "encoding": {
            "x": tokens_axis(),
            "y": {**y, "field": "low"},
            "y2": {"field": "high"},
            "color": colour,
        },
    }
    rule: Spec = {
        "data": {"values": [{"target": target} for target in targets]},
        "mark": {"type": "rule", "strokeDash": [5, 4], "style": "reference"},
        "encoding": {"y": {"field": "target", "type": "quantitative"}},
    }
    return chart(
        rows,
        [
            *([band] if bands else []),
            *([rule] if targets else []),
            layer(shared, line_mark(rows), "training step"),
            layer(shared, {"type": "point", "filled": True, "size": 70}, "held-out text"),
            *hovered(shared),
        ],
    )


def agreement_spec(run: Run) -> Spec | None:
    """Draw how often the gate agrees with its targets, with another token's, and by chance."""
    records = [(record["tokens"], record["smk"]) for record in run.steps if record.get("smk")]
    if not records:
        return None
    names = {
        "gate": "agreement",
        "another token's target": "shuffled",
        "chance": "chance",
    }
    series = {
        label: [(float(tokens), float(smk[field])) for tokens, smk in records]
        for label, field in names.items()
    }
    return line_spec("share of tokens", series, format="~%")


def layer_agreement_spec(run: Run) -> Spec | None:
    """Draw the agreement of each layer's gate with its targets, and with another token's."""
    newest = [record for record in run.with_layers() if record["layers"].get("smk_agreement")]
    if not newest:
        return None
    layers = newest[-1]["layers"]
    rows = [
        {"layer": number, "gate": _digits(gate), "shuffled": _digits(other)}
        for number, (gate, other) in enumerate(
            zip(layers["smk_agreement"], layers["smk_shuffled"], strict=True)
        )
    ]
    x = {"field": "layer", "type": "ordinal", "axis": {"labelAngle": 0, "labelOverlap": True}}
    tips = [
        {"field": "layer"},
        {"field": "gate", "format": ".1%", "title": "agreement"},
        {"field": "shuffled", "format": ".1%", "title": "with another token's target"},
    ]

    def y(field: str) -> Spec:
        axis = {"format": "~%"}
        return {"field": field, "type": "quantitative", "title": "share of tokens", "axis": axis}

    return chart(
        rows,
        [
            {
                "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.5},
                "encoding": {"x": x, "y": y("shuffled"), "y2": {"field": "gate"}},
            },
            {
                "mark": {"type": "tick", "thickness": 2, "size": 12, "style": "reference"},
                "encoding": {"x": x, "y": y("shuffled"), "tooltip": tips},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
                "encoding": {"x": x, "y": y("gate"), "tooltip": tips},
            },
        ],
    )


def frontier_spec(runs: Sequence[Run]) -> Spec | None:
    """Draw the KL over the share of the teacher's FFN FLOPs; None if no run has a frontier.

    A run without a frontier is one point.
    """
    rows = [
        {
            "series": run.name,
            "share": _digits(point["ffn_flops"] / point["dense_ffn_flops"]),
            "value": _digits(point["forward_kl"]),
            "k": _digits(point["mean_k"]),
        }
        for run in runs
        for point in points_of(run)
        if math.isfinite(point["forward_kl"])
    ]
    if not any(run.frontier for run in runs):
        return None
    y = quantity("KL to the teacher, nats", [row["value"] for row in rows if row["value"] > 0])
    share = {
        "field": "share",
        "type": "quantitative",
        "title": "share of the teacher's FFN compute",
        "axis": {"format": "~%"},
        "scale": {"domainMin": 0, "domainMax": max(1.0, *(row["share"] for row in rows))},
    }
    tips = [
        {"field": "series", "title": "run"},
        {"field": "k", "format": ".2f", "title": "active experts"},
        {"field": "share", "format": ".1%", "title": "FFN compute"},
        {"field": "value", "format": ".4f", "title": "KL, nats"},
    ]
    names = [run.name for run in runs]
    shared = {"x": share, "y": y, "color": series_colour(names), "tooltip": tips}
    # A logarithmic axis cannot show a KL of 0, which a student has that equals its teacher.
    drawn = [row for row in rows if row["value"] > 0 or y["scale"]["type"] == "linear"]
    return chart(
        drawn,
        [
            {"mark": {"type": "line", "strokeWidth": 1.6}, "encoding": shared},
            {"mark": {"type": "point", "filled": True, "size": 70}, "encoding": shared},
        ],
    )


def chart(rows: Sequence[Spec], layers: Sequence[Spec], height: int = HEIGHT) -> Spec:
    """Return a layered chart that is as wide as the page allows."""
    return {
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": list(rows)},
        "layer": list(layers),
    }


def line_mark(rows: Sequence[Spec]) -> Spec:
    """Return the mark of a line; few points are marked too, as a single point makes no line."""
    few = len(rows) <= FEW_POINTS
    return {"type": "line", "strokeWidth": 1.5, **({"point": {"size": 24}} if few else {})}


def tokens_axis() -> Spec:
    """Return the axis of training tokens, which begins at 0."""
    return {
        "field": "tokens",
        "type": "quantitative",
        "title": "training tokens",
        "axis": {"format": "~s", "labelExpr": "datum.value == 0 ? '0' : datum.label"},
        "scale": {"zero": True, "nice": False},
    }


def layer(encoding: Spec, mark: Spec, what: str) -> Spec:
    """Return a layer of a chart with only the rows of one kind."""
    return {
        "transform": [{"filter": {"field": "what", "equal": what}}],
        "mark": mark,
        "encoding": encoding,
    }


def hovered(encoding: Spec) -> list[Spec]:
    """Return the layers that mark the point nearest to the pointer and show its numbers."""
    point = {"type": "point", "nearest": True, "on": "pointerover", "clear": "pointerout"}
    shown = {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0}
    return [
        {
            "params": [{"name": "near", "select": point}],
            "mark": {"type": "point", "size": 90, "strokeWidth": 2},
            "encoding": {**encoding, "opacity": shown},
        }
    ]


def quantity(title: str, values: Sequence[float]) -> Spec:
    """Return a vertical axis, which is logarithmic if the values span more than a factor of 20."""
    least, most = min(values, default=0.0), max(values, default=0.0)
    log = least > 0 and most > 20 * least
    scale = {"type": "log"} if log else {"type": "linear", "zero": False}
    return {"field": "value", "type": "quantitative", "title": title, "scale": scale}


def series_colour(names: Sequence[str]) -> Spec:
    """Return a colour for each name, with a legend if there are several."""
    legend = {
        "title": None,
        "orient": "top",
        "columns": 2,
        "labelLimit": 260,
        "symbolType": "stroke",
        "symbolStrokeWidth": 3,
        "symbolOpacity": 1,
    }
    return {
        "field": "series",
        "type": "nominal",
        "scale": {"domain": list(names)},
        "legend": legend if len(names) > 1 else None,
    }


def tooltip(*fields: str) -> list[Spec]:
    """Return what hovering shows: the series, fields that describe the point, tokens and value."""
    return [
        {"field": "series", "title": "curve"},
        *({"field": field, "title": "of"} for field in fields),
        {"field": "tokens", "format": ",", "title": "training tokens"},
        {"field": "value", "format": ".4~r", "title": "value"},
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
