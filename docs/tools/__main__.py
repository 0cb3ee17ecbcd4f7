"""Write the generated parts of all pages and the pictures, or say which of them are stale.

    python -m docs.tools            # write them
    python -m docs.tools --check    # write nothing; exit status 1 if one is stale

Every part is made from records that are committed; nothing is measured here.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.common import ROOT
from docs.tools import exports, figures, performance, probe_docs, scaling
from experiments import budgets, quality, routing_rules
from reliability import harness
from tiny_onn.distill.record_docs import metrics_docs


def generators() -> Iterator[tuple[Path, Callable[[str], str]]]:
    """Yield each page or picture with the function that makes its text from its present one."""
    for page in performance.PAGES:
        yield page, performance.filled
    for page in exports.PAGES:
        yield page, exports.filled
    for page in quality.PAGES:
        yield page, quality.filled
    yield routing_rules.PAGE, routing_rules.filled
    yield budgets.PAGE, budgets.filled
    yield probe_docs.PAGE, probe_docs.filled
    yield scaling.PAGE, scaling.filled
    yield harness.PAGE, harness.filled
    yield ROOT / "docs" / "metrics.md", lambda _: metrics_docs()
    yield from figures.pictures()


def main() -> int:
    """Write or check the pages and pictures, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.tools", description="Generated pages and pictures."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if stale")
    check, stale = parser.parse_args().check, []
    for page, generate in generators():
        before = page.read_text("utf-8") if page.exists() else ""
        if (after := generate(before)) == before:
            continue
        stale.append(str(page.relative_to(ROOT)))
        if not check:
            page.write_text(after, encoding="utf-8")
    if stale:
        print(f"{'stale' if check else 'written'}: {', '.join(stale)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
