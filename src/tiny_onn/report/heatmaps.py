"""Tables of numbers by layer and expert as Vega-Lite heatmaps: plain dictionaries.

A heatmap over training holds one frame per record; the parameter `frame` is the one that is shown.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tiny_onn.report.run_data import EVALUATIONS, Record, Run

Spec = dict[str, Any]
Table = Sequence[Sequence[int | float]]

# The maximum number of cells in all frames of one heatmap, and of frames.
MAX_CELLS = 40_000
MAX_FRAMES = 60


class Frames(NamedTuple):
    """A heatmap that is scrubbed, and the names of its frames."""

    spec: Spec
    labels: Sequence[str]


def load_frames(run: Run, cells: int = MAX_CELLS) -> Frames | None:
    """Draw the share of the tokens that used each expert, by layer, over training.

    Args:
        run: the run; None is returned if no record of it holds layers.
        cells: the maximum number of cells in all frames together; one frame is always drawn.
    """
    records = chosen(list(run.with_layers()), lambda layers: layers["load"], cells)
    if not records:
        return None
    tables = [
        _rounded(record["layers"]["load"], 1 / max(1, record["layers"]["num_tokens"]))
        for record in records
    ]
    spec = heatmap(
        tables,
        x="expert",
        value="tokens that used the expert",
        scale={"domain": [0, 1]},
        fmt=".0%",
    )
    return Frames(spec, [_when(record) for record in records])


def k_frames(run: Run, cells: int = MAX_CELLS) -> Frames | None:
    """Draw the share of the tokens with each number of active experts, by layer, over training.

    Args:
        run: the run; None is returned if no record of it holds layers.
        cells: the number given to `load_frames`, so that both show the same records.
    """
    records = chosen(list(run.with_layers()), lambda layers: layers["load"], cells)
    if not records:
        return None
    tables = [
        _rounded(record["layers"]["k_histogram"], 1 / max(1, record["layers"]["num_tokens"]))
        for record in records
    ]
    spec = heatmap(
        tables, x="active experts", value="tokens with so many", scale={"zero": True}, fmt=".1%"
    )
    return Frames(spec, [_when(record) for record in records])


def surprise_spec(run: Run) -> Spec | None:
    """Draw the mean surprise of each expert by layer, in the newest record that has it."""
    newest = [record for record in run.with_layers() if record["layers"].get("surprise")]
    if not newest:
        return None
    table = newest[-1]["layers"]["surprise"]
    values = [value for row in table for value in row]
    signed = min(values) < 0
    scale: Spec = {"domainMid": 0} if signed else {"zero": True}
    tables = [[[_digits(value, 3) for value in row] for row in table]]
    return heatmap(
        tables, x="expert", value="mean surprise", scale=scale, fmt=".3~g", diverging=signed
    )


def coactivation_frames(view: Record) -> Frames:
    """Draw the correlation of every two experts of a layer over tokens, with a frame per layer."""
    layers = view["coactivation"]
    tables = [[[value / 100 for value in row] for row in layer["phi_percent"]] for layer in layers]
    spec = heatmap(
        tables,
        x="expert",
        y="other expert",
        value="correlation",
        scale={"domain": [-0.5, 0, 0.5], "clamp": True},
        fmt=".2f",
        diverging=True,
        height=320,
    )
    return Frames(spec, [f"Layer {layer['layer']}" for layer in layers])


def heatmap(
    tables: Sequence[Table],
    *,
    x: str,
    value: str,
    scale: Spec,
    fmt: str,
    y: str = "layer",
    diverging: bool = False,
    height: int = 0,
) -> Spec:
    """Draw tables as coloured cells, one frame per table.

    Args:
        tables: the tables, all of one shape.
        x: the name of a column.
        value: the name of a number.
        scale: the scale of the colours; its range is the theme's.
        fmt: the format of a number.
        y: the name of a row.
        diverging: true for colours that go in both directions from a middle.
        height: the height in pixels; 0: by the number of rows.
    """
    num_rows, num_columns = len(tables[0]), len(tables[0][0])
    values = [
        {"frame": frame, "row": number, "value": list(row)}
        for frame, table in enumerate(tables)
        for number, row in enumerate(table)
    ]
    range_name = "diverging" if diverging else "heatmap"
    scale = {**scale, "range": range_name, "interpolate": "rgb"}
    axis = {
        "labelOverlap": True,
        "labelSeparation": 5,
        "labelAngle": 0,
        "ticks": False,
        "domain": False,
    }
    return {
        "width": "container",
        "height": height or max(120, min(420, 14 * num_rows)),
        "autosize": {"type": "fit-x", "contains": "padding"},
        "params": [{"name": "frame", "value": len(tables) - 1 if y == "layer" else 0}],
        "data": {"values": values},
        "transform": [
            {"filter": "datum.frame == frame"},
            {"calculate": f"sequence({num_columns})", "as": "column"},
            {"flatten": ["value", "column"]},
        ],
        "mark": {"type": "rect", "tooltip": True},
        "encoding": {
            "x": {"field": "column", "type": "ordinal", "title": x, "axis": axis},
            "y": {"field": "row", "type": "ordinal", "title": y, "axis": axis},
            "color": {
                "field": "value",
                "type": "quantitative",
                "scale": scale,
                "legend": {
                    "title": value,
                    "format": fmt,
                    "orient": "top",
                    "direction": "horizontal",
                    "gradientLength": 160,
                    "gradientThickness": 8,
                    "titleLimit": 320,
                },
            },
            "tooltip": [
                {"field": "row", "title": y},
                {"field": "column", "title": x},
                {"field": "value", "title": value, "format": fmt},
            ],
        },
    }


def chosen(records: Sequence[Record], table: Any, cells: int) -> list[Record]:  # noqa: ANN401 - a function of a record's layers
    """Choose records evenly over training, few enough for the page, with the first and the last."""
    if not records:
        return []
    rows = table(records[0]["layers"])
    most = max(1, min(MAX_FRAMES, cells // (len(rows) * len(rows[0]))))
    if len(records) <= most:
        return list(records)
    if most == 1:
        return [records[-1]]
    last = len(records) - 1
    return [records[round(i * last / (most - 1))] for i in range(most)]


def _when(record: Record) -> str:
    text = "held-out text" if record["kind"] in EVALUATIONS else "the step's own text"
    return f"After {record['tokens']:,} training tokens, on {text}"


def _rounded(table: Table, factor: float) -> list[list[float]]:
    return [[round(value * factor, 3) for value in row] for row in table]


def _digits(value: int | float, digits: int) -> float:
    return float(f"{value:.{digits}g}")
