"""Make the tables of the expert layer on a GPU, beside the dense MLP and other projects' layers.

The records are what `python -m benchmarks sparse_layer` and `layer_peers` wrote. Without one the
page says which command makes it.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.sparse_layer import AIMS, OURS, RULES
from docs.tools import pages

LAYER, PEERS = RESULTS / "sparse_layer_cuda.json", RESULTS / "layer_peers_cuda.json"
LAYER_COMMAND = "python -m benchmarks sparse_layer --device cuda"
PEERS_COMMAND = "python -m benchmarks layer_peers --device cuda"
WORDS = {"card": "the model card's", "default": "the default recipe's", "sampled": "sampled lesson"}
HOW = {True: ", captured", False: ""}


def read(path: Path) -> dict[str, Any] | None:
    """Return a record; None while there is none."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """Return a table in Markdown."""
    rows = (head, ["---"] * len(head), *lines)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def layer_section(record: dict[str, Any] | None, place: str) -> str:
    """Return the layer's times as shares of the dense MLP's, launched alike.

    Args:
        record: the benchmark's record; None while there is none.
        place: the machine, the versions and the day of the record.
    """
    if record is None:
        return pages.no_record(LAYER_COMMAND)
    head = ["rule", "tokens", "k", "captured", "of the MLP", "of it compiled", "goal",
            "launched by the host", "of the MLP"]  # fmt: skip
    rules = list(RULES)
    rows = sorted(
        record["rows"], key=lambda row: (rules.index(row["rule"]), -row["tokens"], -row["k"])
    )
    return f"Measured on {place}.\n\n{table(head, map(layer_line, rows))}{left_out(record)}"


def layer_line(row: dict[str, Any]) -> list[str]:
    """Return the cells of one rule, number of tokens and k, by the fastest of our paths."""
    aim = AIMS.get((row["tokens"], row["k"]))
    cells = [WORDS[row["rule"]], f"{row['tokens']:,}", str(row["k"])]
    for how, peers in ((True, ("MLP", "MLP compiled")), (False, ("MLP",))):
        ours = {row[n + HOW[how]]: n for n in OURS if n + HOW[how] in row}
        if not ours:
            cells += [""] * (1 + len(peers))
        else:
            best = min(ours)
            cells += [f"{best:.3g} ms ({ours[best]})"]
            cells += [f"{best / row[p + HOW[how]]:.2f}" if p + HOW[how] in row else ""
                      for p in peers]  # fmt: skip
        if how:
            cells.append(f"<= {aim:g}" if aim else "")
    return cells


def peers_section(record: dict[str, Any] | None, place: str) -> str:
    """Return every layer's time as a share of the dense MLP's in the same process.

    Args:
        record: the benchmark's record; None while there is none.
        place: the machine, the versions and the day of the record.
    """
    if record is None:
        return pages.no_record(PEERS_COMMAND)
    parts = [f"Measured on {place}.\n"]
    for captured, words in ((True, "captured in a CUDA graph"), (False, "launched by the host")):
        rows = [row for row in record["rows"] if row["captured"] == captured]
        if rows:
            sizes = sorted({(row["tokens"], row["k"]) for row in rows}, key=lambda s: (s[0], -s[1]))
            head = [f"of the dense MLP, {words}", *(f"{t:,}, k = {k}" for t, k in sizes)]
            parts.append(f"\n{table(head, peer_lines(rows, sizes))}")
    return "".join(parts) + candidates(record["settings"]["tuning"]) + left_out(record)


def candidates(tuning: str | dict[str, str]) -> str:
    """Return how many tiles the libraries that time theirs could choose from."""
    known = {"liger, sonicmoe": tuning} if isinstance(tuning, str) else tuning
    words = "; ".join(f"{name}: {number}" for name, number in known.items())
    return f"\nTiles that a library could choose from, by timing them: {words}.\n"


def peer_lines(rows: list[dict[str, Any]], sizes: list[tuple[int, int]]) -> Iterator[list[str]]:
    """Yield ours, as the range beside all peers, and each peer."""
    ours = {
        size: [row["ours_ms"] / row["mlp_ms"] for row in rows
               if (row["tokens"], row["k"]) == size and "ours_ms" in row]
        for size in sizes
    }  # fmt: skip
    yield ["ours, with surprise", *(span(ours[size]) for size in sizes)]
    for peer in dict.fromkeys(row["peer"] for row in rows):
        own = {(r["tokens"], r["k"]): r["peer_ms"] / r["mlp_ms"] for r in rows if r["peer"] == peer}
        yield [peer, *(span([own[size]] if size in own else []) for size in sizes)]


def span(values: list[float]) -> str:
    """Return the smallest and the largest of some ratios, or the one if they are alike."""
    ends = list(dict.fromkeys(f"{end:.2f}" for end in (min(values), max(values)))) if values else []
    return " to ".join(ends)


def left_out(record: dict[str, Any]) -> str:
    """Return what the record skipped, with the reasons, as a list."""
    sizes: dict[tuple[str, str], list[str]] = {}
    for row in record.get("skipped", ()):
        name = row.get("peer") or row.get("rule") or row.get("way")
        size = f"{row['tokens']:,} tokens, k = {row['k']}" if "tokens" in row else ""
        size += ", captured" if row.get("captured") else ""
        sizes.setdefault((name, row["reason"]), []).append(size)
    if not sizes:
        return ""
    lines = []
    for (name, reason), known in sizes.items():
        times = f" ({len(known)} of the cells)" if any(known) else ""
        lines.append(f"- {name}{times}: {reason}\n")
    return "\nLeft out:\n\n" + "".join(lines)
