"""Gather what `tiny-onn probe` wrote and put its tables into docs/probe.md.

python benchmarks/probe_docs.py --dense runs/probe --student runs/probe-demo

Without arguments the tables are written again from benchmarks/results/probe_smollm2.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pages
from tiny_onn.probe_report import markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "probe_smollm2.json"
DOCS = ROOT / "docs" / "probe.md"
SUBJECTS = ("dense", "student")
BEGIN, END = "<!-- {name}: begin -->", "<!-- {name}: end -->"


def with_tables(text: str, records: dict[str, Any]) -> str:
    """The document with each subject's tables between its markers."""
    for name in records:
        assert BEGIN.format(name=name) in text, f"{DOCS}: lacks {BEGIN.format(name=name)}"
    contents = {name: markdown(record) for name, record in records.items()}
    return pages.filled(text, contents, BEGIN, END)


def main() -> None:
    """Read, gather, write."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in SUBJECTS:
        options.add_argument(f"--{name}", type=Path, help="folder that holds its probe.json")
    given = vars(options.parse_args())
    records = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in SUBJECTS:
        if given[name] is not None:
            records[name] = json.loads((given[name] / "probe.json").read_text(encoding="utf-8"))
    RESULTS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    DOCS.write_text(with_tables(DOCS.read_text(encoding="utf-8"), records), encoding="utf-8")


if __name__ == "__main__":
    main()
