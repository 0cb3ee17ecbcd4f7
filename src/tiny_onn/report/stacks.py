"""Bars whose parts are stacked, for a terminal and as Vega-Lite specifications."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.text import Text

from tiny_onn.report.theme import colours

# The number of parts that are told apart; smaller ones are drawn together.
MAX_PARTS = 6
REST = "everything else"
# The marks of the parts where a terminal has no colours.
MARKS = "#=+:o."
FULL = "\u2588"
BAR_HEIGHT = 34
# True in Vega where the page gives a chart the width of a phone.
NARROW = "containerSize()[0] < 500"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stacks:
    """Several bars in one unit.

    Attributes:
        title: the title.
        unit: the unit of all values.
        bars: by name of the bar, its parts by name.
        limit: a value that the bars are held to, with its name; None: there is none.
        form: the format of a value as text.
    """

    title: str
    unit: str
    bars: Mapping[str, Mapping[str, float]]
    limit: tuple[str, float] | None = None
    form: str = "{:,.2f}"

    def parts(self) -> list[str]:
        """Return the names of the parts that are told apart, the largest over all bars first."""
        total: dict[str, float] = {}
        for bar in self.bars.values():
            for name, value in bar.items():
                total[name] = total.get(name, 0.0) + value
        names = sorted(total, key=lambda name: -total[name])
        if len(names) <= MAX_PARTS:
            return names
        return [*names[: MAX_PARTS - 1], REST]

    def merged(self, bar: str) -> dict[str, float]:
        """Return the parts of a bar by the names of `parts`, those of 0 included."""
        names = self.parts()
        found = dict.fromkeys(names, 0.0)
        for name, value in self.bars[bar].items():
            found[name if name in found else REST] += value
        return found

    @property
    def end(self) -> float:
        """The value at the end of the axis: the longest bar or the limit."""
        totals = [float(sum(bar.values())) for bar in self.bars.values()]
        limit = 0.0 if self.limit is None else self.limit[1]
        return max(limit, *totals)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text(self.title, style="italic")
        width = max(map(len, self.bars), default=0)
        room = max(10, min(60, options.max_width - width - 16))
        styles, marks = _styles(self.parts()), dict(zip(self.parts(), MARKS, strict=False))
        coloured = console.color_system is not None
        scale = room / self.end if self.end else 0.0
        for name in self.bars:
            line, done, value = Text(f"  {name:{width}}  "), 0, 0.0
            for part, size in self.merged(name).items():
                value += size
                cells = round(value * scale) - done
                done += cells
                mark = FULL if coloured else marks[part]
                line.append(mark * cells, style=styles[part] if coloured else "")
            shown = self.form.format(sum(self.bars[name].values()))
            line.append(f"{' ' * (room - done)} {shown} {self.unit}")
            yield line
        if self.limit is not None:
            place = max(1, round(self.limit[1] * scale))
            label = f"{self.limit[0]}: {self.form.format(self.limit[1])} {self.unit}"
            left = place > room // 2
            line = f"{label} ^".rjust(width + 4 + place) if left else " " * (width + 3 + place)
            yield Text(line if left else f"{line}^ {label}", style="dim")
        legend = Text("  ")
        for part in self.parts():
            mark = FULL if coloured else marks[part]
            legend.append(mark, style=styles[part] if coloured else "")
            legend.append(f" {part}   ")
        yield legend

    def spec(self) -> dict[str, Any]:
        """Return the bars as a Vega-Lite specification without colours of a theme."""
        order = self.parts()
        rows = [
            {
                "bar": bar,
                "part": part,
                "order": order.index(part),
                "value": float(f"{value:.5g}"),
                "share": value / (sum(self.bars[bar].values()) or 1.0),
            }
            for bar in self.bars
            for part, value in self.merged(bar).items()
        ]
        tips = [
            {"field": "bar", "title": "of"},
            {"field": "part"},
            {"field": "value", "format": ",.4~r", "title": self.unit},
            {"field": "share", "format": ".1%"},
        ]
        y = {"field": "bar", "type": "nominal", "sort": list(self.bars), "title": None}
        x = {"field": "value", "type": "quantitative", "title": self.unit, "stack": "zero"}
        columns = {"expr": f"{NARROW} ? 1 : 3"}
        colour = {
            "field": "part",
            "type": "nominal",
            "scale": {"domain": order},
            "legend": {"title": None, "orient": "top", "columns": columns, "labelLimit": 260},
        }
        # On a phone a long name takes two lines.
        label = f"{NARROW} ? split(datum.label, ' of ') : datum.label"
        bars = {
            "mark": {"type": "bar"},
            "encoding": {
                "x": x,
                "y": {**y, "axis": {"labelLimit": 220, "labelExpr": label}},
                "color": colour,
                "order": {"field": "order", "type": "quantitative"},
                "tooltip": tips,
            },
        }
        layers: list[dict[str, Any]] = [bars]
        if self.limit is not None:
            name, value = self.limit
            layers.append(
                {
                    "data": {"values": [{"limit": value, "name": name}]},
                    "mark": {"type": "rule", "strokeDash": [5, 4], "style": "reference"},
                    "encoding": {
                        "x": {"field": "limit", "type": "quantitative"},
                        "tooltip": [
                            {"field": "name", "title": "limit"},
                            {"field": "limit", "format": ",.4~r", "title": self.unit},
                        ],
                    },
                }
            )
        return {
            "width": "container",
            "height": BAR_HEIGHT * len(self.bars),
            "autosize": {"type": "fit-x", "contains": "padding"},
            "data": {"values": rows},
            "layer": layers,
        }


def _styles(parts: Sequence[str]) -> dict[str, str]:
    named = colours("dark")
    return {part: named[f"c{number}"] for number, part in enumerate(parts)}
