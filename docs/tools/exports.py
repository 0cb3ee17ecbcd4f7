"""Make the tables of docs/exports.md and of the README's engines from the record of a study.

python -m experiments.gguf runs/demo/student --threads 2 --tokens 4096   # makes the record
"""

import json
from typing import Any

from benchmarks.common import ROOT
from docs.tools import pages

RESULTS = ROOT / "experiments" / "results" / "gguf.json"
PAGES = (ROOT / "docs" / "exports.md", ROOT / "README.md")
BEGIN, END = "<!-- exports: {name} -->", "<!-- end -->"


def share(record: dict[str, Any], name: str, kind: str) -> str:
    """Return a file's tokens per second over those of the dense file of its format."""
    return f"{record['ratios'][f'{name} / dense teacher, F16, {kind}']:.2f}"


def measured(record: dict[str, Any]) -> str:
    """Return the table of quality and speed of every file."""
    environment, settings = record["environment"], record["settings"]
    versions = environment["versions"]
    lines = [
        f"{settings['tokens']:,} held-out tokens in pieces of 512, {settings['threads']} threads on"
        f" an {environment['machine']}, llama-cpp-python {settings['llama_cpp_python']}, torch"
        f" {versions['torch']}, {environment['time'][:10]}:",
        "",
        "| model | perplexity | KL to the student | agreement | MB | read, tokens/s | write |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        size, read, write = "", "", ""
        if "bytes" in row:
            size, read, write = (
                f"{row['bytes'] / 1e6:.0f}",
                f"{row['read tokens/s']:.0f}",
                f"{row['write tokens/s']:.0f}",
            )
        lines.append(
            f"| {row['model']} | {row['perplexity']:.2f} | {row['kl']:.3f} |"
            f" {row['agreement']:.1%} | {size} | {read} | {write} |"
        )
    return "\n".join(lines) + "\n"


def engines(record: dict[str, Any]) -> str:
    """Return the README's table of engines."""
    speeds = {
        name: f"{share(record, name, 'read')}, {share(record, name, 'write')}"
        for name in ("threshold", "fixed k")
    }
    return "\n".join(
        [
            "| engine, `export --to` | result | experts per token | reads, writes, of the dense |",
            "|---|---|---|---|",
            "| transformers, `transformers` | exact | vary by need | not measured |",
            "| vLLM, `vllm` | exact | vary by need, all computed | not measured |",
            f"| llama.cpp, `gguf` | approximate | vary by need | {speeds['threshold']} |",
            f"| llama.cpp, `gguf --fixed-k` | approximate | fixed | {speeds['fixed k']} |",
            "",
        ]
    )


def filled(text: str) -> str:
    """Return a page with the tables of the committed record."""
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    contents = {"measured": measured(record), "engines": engines(record)}
    return pages.filled(text, contents, BEGIN, END)
