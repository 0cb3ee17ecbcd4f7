"""The same benchmark with the package of another commit, and the ratios to it."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, command_of, print_table


def against(
    commit: str, name: str, options: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Run a benchmark with another commit's package and print the ratios of this one to it.

    The two run one after the other, so that a machine that changes its speed in between shows up
    as a difference. The rows of peers, whose code is the same, show by how much it did.

    Args:
        commit: What git can resolve to a commit.
        name: The benchmark.
        options: The options that both get.
        rows: What this tree measured.

    Returns:
        The commit, whose benchmark was run, its rows and the ratios, for the record.

    Raises:
        SystemExit: There is no such commit, or its package does not run the benchmark.
    """
    resolved = _git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}").strip()
    if not resolved:
        raise SystemExit(f"--base: got {commit}, expected a commit of the repository in {ROOT}")
    with _checked_out(resolved) as tree:
        record, program = _measure(tree, name, options)
    ratios = ratio_rows(rows, record["rows"])
    print(f"\nthis tree / {commit}, {program}; rows of peers show the machine's own drift:")
    print_table(ratios)
    print()
    return {"commit": resolved, "program": program, "rows": record["rows"], "ratios": ratios}


def ratio_rows(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Each line's labels, and its measured values divided by the other's.

    Raises:
        SystemExit: The lines of the two tables are not about the same things.
    """
    labels = [[{k: v for k, v in row.items() if not _measured(k, v)} for row in rows]
              for rows in (ours, theirs)]  # fmt: skip
    if labels[0] != labels[1]:
        raise SystemExit("--base: the two commits measure different things; no ratio is reported")
    return [
        label | {k: v / other[k] for k, v in row.items() if _measured(k, v) and other.get(k)}
        for label, row, other in zip(labels[0], ours, theirs, strict=True)
    ]


def _measured(name: str, value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and name.endswith("_bytes"))


def _measure(tree: Path, name: str, options: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The record of the other package, made by this tree's benchmark or else by its own."""
    path = os.pathsep.join([str(tree / "src"), os.environ.get("PYTHONPATH", "")])
    said = ""
    for folder, program in ((ROOT, "this tree's benchmark"), (tree, "each with its own benchmark")):
        if not (folder / "benchmarks" / "__main__.py").is_file():
            continue
        out = tree / "benchmark_records"
        command = command_of(name, *options, "--out", str(out))
        variables = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(
            command, cwd=folder, env=variables, capture_output=True, text=True, check=False
        )
        if not done.returncode:
            return json.loads(done.stdout.splitlines()[-1]), program
        said = said or (done.stderr.strip().splitlines() or ["no output"])[-1]
    raise SystemExit(f"--base: {name} does not run with that commit's package: {said}")


@contextmanager
def _checked_out(commit: str) -> Iterator[Path]:
    """A work tree of the commit in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="tiny-onn-base-") as temporary:
        tree = Path(temporary) / "tree"
        _git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> str:
    """What git says; nothing if it fails."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
