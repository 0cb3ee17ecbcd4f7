"""The short form of the fault harness, and the document that its long form wrote."""

import json
import os
import subprocess
import sys

import pytest

from harness import DOCUMENT, FAULTS, FUZZ, ROOT, document_with, results_file


@pytest.mark.timeout(600)
def test_a_run_survives_each_kind_of_fault(tmp_path):
    script = str(ROOT / "tests" / "faults.py")
    command = [sys.executable, script, "--short", "--kills", "4", "--out", str(tmp_path / "f.json")]
    # Shapes are checked elsewhere; here many processes start.
    variables = os.environ | {"JAXTYPING_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert len(rows) == 15
    assert all(row["survived"] == row["tried"] >= 1 for row in rows)


@pytest.mark.parametrize("name", [FAULTS, FUZZ])
def test_the_document_says_what_was_measured(name):
    record = json.loads(results_file(name).read_text(encoding="utf-8"))
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document_with(document, name, record) == document


def test_the_long_forms_were_run_and_nothing_was_lost():
    faults, fuzz = (json.loads(results_file(name).read_text()) for name in (FAULTS, FUZZ))
    kills = [row for row in faults["rows"] if row["fault"].startswith("SIGKILL at a random")]
    assert sum(row["tried"] for row in kills) >= 100
    assert all(row["tried"] == row["survived"] for row in faults["rows"])
    assert fuzz["cases"] >= 10_000
    assert fuzz["failed"] == 0
