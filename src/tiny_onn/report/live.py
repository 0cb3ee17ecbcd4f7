"""The view of a run in a terminal: curves as sparklines, the load of experts, and the verdict."""

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group
from rich.progress_bar import ProgressBar
from rich.style import Style
from rich.table import Table
from rich.text import Text

from tiny_onn.report.curves import curve
from tiny_onn.report.run_data import Record, Run
from tiny_onn.report.theme import colours

# Eight heights of a block, the lowest first.
BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
# The upper half of a cell, so that a line of text shows two layers.
UPPER_HALF = "\u2580"
# The same shares where a terminal has no colours.
SHADES = " .:-=+*#%@"
VERDICT_STYLES = MappingProxyType({"healthy": "green", "suspicious": "yellow", "dead": "bold red"})
MAX_HEAT_LINES = 16
# Values that span more than this factor are drawn by their logarithms.
LOG_FACTOR = 20


def sparkline(values: Sequence[int | float], width: int) -> str:
    """Return values as a line of blocks, as many as fit; a block is the mean of its values.

    Values that are not finite are left out, and leave a gap where a block has no others.

    Args:
        values: the values in order.
        width: the number of blocks at most.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    log = low > 0 and high > LOG_FACTOR * low
    scale = math.log if log else float
    count = min(width, len(values))
    line = ""
    for number in range(count):
        part = values[number * len(values) // count : (number + 1) * len(values) // count]
        known = [scale(value) for value in part if math.isfinite(value)]
        if not known:
            line += " "
            continue
        span = scale(high) - scale(low)
        height = (sum(known) / len(known) - scale(low)) / span if span > 0 else 0.5
        line += BLOCKS[min(len(BLOCKS) - 1, int(height * len(BLOCKS)))]
    return line


class Heatmap:
    """The share of tokens that use each expert, for as many layers and experts as there is room.

    Args:
        load: for each layer and expert the share of tokens, from 0 to 1.
    """

    def __init__(self, load: Sequence[Sequence[float]]) -> None:
        self._load = load

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        cells = _shrunk(self._load, 2 * MAX_HEAT_LINES, max(1, options.max_width - 8))
        per_row = len(self._load) / len(cells)
        coloured = console.color_system is not None
        for row in range(0, len(cells), 2 if coloured else 1):
            line = Text.assemble((f"{round(row * per_row):5d}  ", "dim"))
            pairs = zip(cells[row], cells[row + 1] if row + 1 < len(cells) else [], strict=False)
            if not coloured:
                line.append("".join(_shade(share) for share in cells[row]))
            elif row + 1 < len(cells):
                for above, below in pairs:
                    line.append(UPPER_HALF, Style(color=_colour(above), bgcolor=_colour(below)))
            else:
                for share in cells[row]:
                    line.append(UPPER_HALF, Style(color=_colour(share)))
            yield line


def live_view(run: Run, state: str) -> Group:
    """Return what is known of a run.

    Args:
        run: the run so far.
        state: a sentence on whether it trains, waits or has ended.
    """
    parts: list[object] = [Text.assemble((run.name, "bold"), f": {state}")]
    if run.tokens:
        parts.append(_progress(run))
    parts += _verdict(run)
    rows = _curves(run)
    if rows:
        parts.append(_table(rows))
    heat = _load(run)
    if heat is not None:
        parts += [Text("Share of tokens that use each expert, by layer:"), heat]
    return Group(*parts)  # pyright: ignore[reportArgumentType] - every part is a renderable


def _progress(run: Run) -> Table:
    total = max(run.planned_tokens, run.tokens)
    last = run.steps[-1:]
    speed = last[0]["tokens_per_s"] if last else 0.0
    stands = not speed or run.process != "trains" or run.tokens >= total
    left = "" if stands else f", {_time((total - run.tokens) / speed)}"
    text = f"{run.tokens:,} of {total:,} tokens"
    if last:
        text = f"step {last[0]['step']:,}, {text}, {speed:,.0f} tokens/s{left}"
    grid = Table.grid(padding=(0, 1))
    grid.add_row(ProgressBar(total=total, completed=run.tokens, width=20), Text(text))
    return grid


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    return (
        f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"
    )


def _curves(run: Run) -> list[tuple[str, list[float], str, str]]:
    """Return the curves: the name, the values, the newest value, and what to hold beside it."""
    steps, evaluations = run.of_kind("step"), run.evaluations
    trained = [record for record in evaluations if record["step"] > 0]
    best = min((record["forward_kl"] for record in trained), default=None)
    target = "" if run.target_k is None else f"target {run.target_k:g}"
    teacher = f"teacher {run.last['teacher_perplexity']:.2f}" if run.last else ""
    smk = [record for record in steps if record.get("smk")]
    chance = f"another token's {smk[-1]['smk']['shuffled']:.1%}" if smk else ""
    blocks = run.of_kind("blockwise")
    shown = [
        ("block error", _values(blocks, "loss"), "{:.4f}", ""),
        ("loss", _values(steps, "loss"), "{:.4f}", ""),
        ("KL", _values(steps, "forward_kl"), "{:.4f}", ""),
        (
            "KL, held out",
            _values(evaluations, "forward_kl"),
            "{:.4f}",
            "" if best is None else f"best {best:.4f}",
        ),
        ("perplexity, held out", _values(evaluations, "student_perplexity"), "{:.2f}", teacher),
        ("active experts", _values(run.steps, "mean_k"), "{:.2f}", target),
        ("active, held out", _values(evaluations, "mean_k"), "{:.2f}", target),
        ("gate agreement", [r["smk"]["agreement"] for r in smk], "{:.1%}", chance),
        ("learning rate", [r["lr"][0] for r in run.steps if r.get("lr")], "{:.2g}", ""),
        ("gradient, experts", _values(run.steps, "expert_grad_norm"), "{:.3g}", ""),
        ("tokens/s", _values(run.steps, "tokens_per_s"), "{:,.0f}", ""),
    ]
    if shown[1][1] == shown[2][1]:
        # The loss is the KL, unless another divergence or temperature is set.
        del shown[1]
    return [
        (name, values, form.format(values[-1]), beside)
        for name, values, form, beside in shown
        if values
    ]


def _values(records: Sequence[Record], name: str) -> list[float]:
    return [value for _, value in curve(records, name)]


class _Spark:
    """A sparkline as wide as its column."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values = values

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text(sparkline(self._values, options.max_width), style="cyan", no_wrap=True)


def _table(rows: Sequence[tuple[str, list[float], str, str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_header=False, expand=True, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, style="dim")
    for name, values, newest, beside in rows:
        table.add_row(name, _Spark(values), newest, beside)
    return table


def _load(run: Run) -> Heatmap | None:
    newest = [record for record in run.with_layers() if record["layers"].get("load")][-1:]
    if not newest:
        return None
    layers = newest[0]["layers"]
    num_tokens = max(1, layers["num_tokens"])
    return Heatmap([[count / num_tokens for count in row] for row in layers["load"]])


def _verdict(run: Run) -> list[Text]:
    if run.last is None or run.last["step"] == 0:
        return [Text("It is too early for a verdict: no evaluation was made after training began.")]
    called = run.health["verdict"]
    lines = [Text.assemble("Verdict: ", (called, VERDICT_STYLES.get(called, "")))]
    return lines + [
        Text(f"  {finding['what']}; {finding['advice']}") for finding in run.health["findings"]
    ]


def _shrunk(load: Sequence[Sequence[float]], max_rows: int, max_columns: int) -> list[list[float]]:
    """Return means of neighbouring layers and experts, so that no more than that many are left."""
    rows, columns = min(len(load), max_rows), min(len(load[0]), max_columns)

    def parts(total: int, count: int) -> list[range]:
        return [range(n * total // count, (n + 1) * total // count) for n in range(count)]

    return [
        [
            sum(load[i][j] for i in row for j in column) / (len(row) * len(column))
            for column in parts(len(load[0]), columns)
        ]
        for row in parts(len(load), rows)
    ]


def _shade(share: float) -> str:
    return SHADES[min(len(SHADES) - 1, int(share * len(SHADES)))]


def _colour(share: float) -> str:
    scale = _scale()
    return scale[min(len(scale) - 1, int(share * len(scale)))]


def _scale() -> Sequence[str]:
    named: Mapping[str, str] = colours("dark")
    return [named[f"h{number}"] for number in range(5)]
