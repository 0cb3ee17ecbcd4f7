"""Run folders and students that an earlier version wrote load, go on and end as they did there.

`tests/old_files` was written by the commit of that name: a teacher, its text, and runs that were
stopped after three of six steps. Beside each run stand the student and the losses of the same run
without the stop. `/PROJECT` stands for the folder's own path.
"""

import hashlib
import json
import shutil

import pytest
import torch

from repository import ROOT
from tiny import make_ids
from tiny_onn import TinyOnnForCausalLM
from tiny_onn.distill.loop import run_distill
from tiny_onn.runs.folder import read_run_config
from tiny_onn.runs.metrics import read_metrics

OLD = ROOT / "tests" / "old_files"
RUNS = ("adamw", "adamw8bit", "adafactor")


@pytest.fixture
def project(tmp_path):
    """A copy of the old files in which the paths are true."""
    folder = tmp_path / "project"
    shutil.copytree(OLD, folder)
    for path in folder.rglob("*.json"):
        path.write_text(path.read_text("utf-8").replace("/PROJECT", str(folder)), "utf-8")
    for manifest in folder.rglob("manifest.json"):
        state = (manifest.parent / "state.json").read_bytes()
        entries = json.loads(manifest.read_text("utf-8"))
        entries["state.json"] = {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}
        manifest.write_text(json.dumps(entries), "utf-8")
    return folder


def expected(run):
    return json.loads((OLD / run / "expected.json").read_text("utf-8"))


@pytest.mark.parametrize("run", RUNS)
def test_an_old_student_loads_and_computes_the_same(run, project):
    student = TinyOnnForCausalLM.from_pretrained(project / run / "student").eval()
    with torch.no_grad():
        logits = student(make_ids(1, 12)).logits[0, -1]
    torch.testing.assert_close(logits, torch.tensor(expected(run)["logits"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("run", RUNS)
def test_an_old_run_goes_on_as_it_would_have_without_the_stop(run, project):
    run_distill(read_run_config(project / run), out=project / run, resume=True)
    rows = read_metrics(project / run / "metrics.jsonl")
    losses = [row["loss"] for row in rows if row["kind"] == "step"]
    # The same steps on another processor differ by rounding, which training amplifies.
    assert losses == pytest.approx(expected(run)["losses"], rel=1e-3)
