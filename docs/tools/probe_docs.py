"""Gather what `tiny-onn probe` wrote, and make the tables of docs/probe.md from it.

    python -m docs.tools.probe_docs --dense runs/probe --student runs/probe-demo

The records go to experiments/results/probe_smollm2.json, from which `python -m docs.tools` makes
the tables.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from docs.tools import pages
from tiny_onn.report.probe import markdown

RESULTS = ROOT / "experiments" / "results" / "probe_smollm2.json"
PAGE = ROOT / "docs" / "probe.md"
SUBJECTS = ("dense", "student")
BEGIN, END = "<!-- {name}: begin -->", "<!-- {name}: end -->"


def with_tables(text: str, records: dict[str, Any]) -> str:
    """Return the document with each subject's tables between its markers."""
    for name in records:
        assert BEGIN.format(name=name) in text, f"{PAGE}: lacks {BEGIN.format(name=name)}"
    contents = {name: markdown(record) for name, record in records.items()}
    return pages.filled(text, contents, BEGIN, END)


def filled(text: str) -> str:
    """Return the page with the tables of the committed records."""
    return with_tables(text, json.loads(RESULTS.read_text(encoding="utf-8")))


def main() -> None:
    """Read the given records and write them beside those that are kept."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in SUBJECTS:
        options.add_argument(f"--{name}", type=Path, help="folder that holds its probe.json")
    given = vars(options.parse_args())
    records = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in SUBJECTS:
        if given[name] is not None:
            records[name] = json.loads((given[name] / "probe.json").read_text(encoding="utf-8"))
    RESULTS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
