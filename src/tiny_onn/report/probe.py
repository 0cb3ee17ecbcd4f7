"""The results of `probe` as tables for the terminal and for documents, and as charts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from tiny_onn.report.charts import Bar, dot_plot, page
from tiny_onn.report.terminal import add_numbers, counted, narrow_table

ENDS = ("min", "max")


def console_tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the tables of the document, for a terminal of 80 columns."""
    for title, header, rows in tables(found):
        table = narrow_table(Text(title))
        table.add_column(header[0], overflow="fold")
        add_numbers(table, [_stacked(name) for name in header[1:]])
        for name, *cells in rows:
            table.add_row(Text(name), *(Text(_stacked(cell)) for cell in cells))
        yield table


def _stacked(text: str) -> str:
    """Return a cell with each of its words in a line of its own, the longest one shortened."""
    return text.replace("correlation", "corr.").replace(" / ", "/ ").replace(" ", "\n")


def markdown(found: Mapping[str, Any]) -> str:
    """Return the tables as Markdown, after a line on what was measured."""
    parts = [summary(found)]
    for title, header, rows in tables(found):
        escaped = ([cell.replace("|", "\\|") for cell in row] for row in (header, *rows))
        lines = [f"**{title}**", "", *(f"| {' | '.join(row)} |" for row in escaped)]
        lines.insert(3, "|" + "---|" * len(header))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def summary(found: Mapping[str, Any]) -> str:
    """Return a line on what was probed."""
    documents = counted(found["num_documents"], "document")
    return (
        f"{found['model']} ({found['conversion']}), {found['num_experts']} experts a layer, loss "
        f"{found['loss']} (mean {found['mean_loss']:.4f} nats), {found['num_tokens']:,} tokens of "
        f"{documents}; intervals: 95 %, over {found['intervals']}."
    )


def tables(
    found: Mapping[str, Any],
) -> Iterator[tuple[str, tuple[str, ...], Sequence[tuple[str, ...]]]]:
    """Yield title, header and rows of every table."""
    for layer, record in found["layers"].items():
        for kind, title in (
            ("remove", "leaving an active expert out"),
            ("add", "adding an inactive expert"),
            ("remove_first_token", "leaving one out, first token of a document"),
        ):
            if record[kind] is not None:
                yield _rules_table(f"Layer {layer}, {title}", record[kind])
        if record["predictable"] is not None:
            yield _predictable_table(layer, record["predictable"], found["fit_tokens"])


def _rules_table(
    title: str, record: Mapping[str, Any]
) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    level = {name: value[0] for name, value in record["levels"].items()}
    title += (
        f" ({record['num_tokens']:,} tokens, {record['mean_candidates']:.1f} candidates; nats: "
        f"random {level['random']:.4f}, best {level['best']:.4f}, worst {level['worst']:.4f})"
    )
    header = (
        "rule",
        "rank correlation",
        "nats at its min",
        "nats at its max",
        "magnitude rank, min",
        "magnitude rank, max",
        "ties, min / max",
        "rows all zero",
    )
    rows = []
    for kind, rule in record["rules"].items():
        mean = {name: value[0] for name, value in rule.items()}
        rows.append(
            (
                kind,
                _with_interval(rule["spearman"], 2),
                *(_with_interval(rule[f"truth_at_{end}"], 4) for end in ENDS),
                *(f"{mean[f'magnitude_rank_{end}']:.1f}" for end in ENDS),
                " / ".join(f"{mean[f'tied_{end}']:.0%}" for end in ENDS),
                f"{mean['zero']:.0%}",
            )
        )
    return title, header, rows


def _predictable_table(
    layer: str, record: Mapping[str, Any], fit_tokens: int
) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    header = (
        "regressed quantity",
        "rank of the quantity",
        "the same, token-blind",
        "rank of the truth",
        "the same, token-blind",
        "nats at its max",
        "the same, token-blind",
    )
    rows = [
        (
            name,
            *(
                _with_interval(found[who][number], digits)
                for number, digits in (
                    ("rank_of_quantity", 2),
                    ("rank_of_truth", 2),
                    ("truth_at_max", 4),
                )
                for who in ("token", "blind")
            ),
        )
        for name, found in record.items()
    ]
    title = f"Layer {layer}, what a linear gate can know of the token ({fit_tokens:,} tokens fit)"
    return title, header, rows


def _with_interval(value: Sequence[float], digits: int) -> str:
    mean, low, high = value
    if math.isnan(mean):
        return "none"
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _bar(label: str, value: Sequence[float], colour: int = 0) -> Bar:
    mean, low, high = value
    return Bar(label, mean, low, high, colour)


def html_page(found: Mapping[str, Any]) -> str:
    """Return a self-contained page with each layer's rank correlations and worth of its choices."""
    pictures = []
    for layer, record in found["layers"].items():
        for kind, name in (("remove", "leave one out"), ("add", "add one")):
            if record[kind] is None:
                continue
            rules, level = record[kind]["rules"], record[kind]["levels"]
            pictures.append(
                dot_plot(
                    f"Layer {layer}, {name}: rank correlation with the truth",
                    [_bar(rule, values["spearman"]) for rule, values in rules.items()],
                    [("0", 0.0)],
                )
            )
            pictures.append(
                dot_plot(
                    f"Layer {layer}, {name}: nats of the expert pointed at",
                    [
                        _bar(f"{rule}, {end}", values[f"truth_at_{end}"], colour)
                        for rule, values in rules.items()
                        for colour, end in enumerate(ENDS)
                    ],
                    [("random", level["random"][0]), ("best", level["best"][0])],
                )
            )
        if record["predictable"] is not None:
            pictures.append(
                dot_plot(
                    f"Layer {layer}: regression from the token, rank correlation with the truth",
                    [
                        _bar(f"{name}, {who}", guess[who]["rank_of_truth"], colour)
                        for name, guess in record["predictable"].items()
                        for colour, who in enumerate(("token", "blind"))
                    ],
                    [("0", 0.0)],
                )
            )
    return page("What surprise says about experts", [summary(found)], pictures)
