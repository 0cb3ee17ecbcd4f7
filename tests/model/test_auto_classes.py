"""A saved student opened by programs that know transformers alone, and by ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from tiny import make_dense, make_ids, make_student, make_tokenizer
from tiny_onn.model.backbone import last_hidden_states
from tiny_onn.model.configuration import CODE_FILE
from tiny_onn.model.student import TinyOnnForCausalLM, TinyOnnModel
from tiny_onn.runs.students import load_student

pytestmark = pytest.mark.usefixtures("quiet")

STRANGER = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

assert not any(name.startswith("tiny_onn") for name in sys.modules)
folder, copy = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(copy)
print(type(config).__module__, type(model).__module__, type(base).__name__)
print(float(model(model.dummy_inputs["input_ids"]).logits.sum()))
"""
# The program runs as in an environment without the package.
WITHOUT = """
import importlib.abc
import sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tiny_onn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""


def save(folder: Path) -> Path:
    make_student(make_dense(vocab_size=320)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def run(program: str, *arguments: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_program_without_the_import_opens_a_student_if_it_trusts_its_code(tmp_path):
    folder = save(tmp_path / "student")
    done = run(STRANGER, folder, tmp_path / "copy", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-3000:]
    kinds, total = done.stdout.splitlines()[-2:]
    assert kinds == "tiny_onn.model.configuration tiny_onn.model.student TinyOnnModel"
    student = TinyOnnForCausalLM.from_pretrained(folder)
    expected = student(student.dummy_inputs["input_ids"]).logits.detach().sum()
    assert float(total) == pytest.approx(float(expected), rel=1e-4)
    # That program saves a student like ours, with none of the package's source.
    files = {path.name for path in (tmp_path / "copy").iterdir()}
    assert files == {CODE_FILE, "config.json", "generation_config.json", "model.safetensors"}
    assert (tmp_path / "copy" / CODE_FILE).read_text() == (folder / CODE_FILE).read_text()


def test_a_program_that_does_not_trust_it_is_told_of_the_code(tmp_path):
    folder = save(tmp_path / "student")
    program = STRANGER.replace("trust_remote_code=True", "trust_remote_code=False")
    done = run(program, folder, tmp_path / "copy", cache=tmp_path / "cache")
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr


def test_where_the_package_is_missing_it_is_named(tmp_path):
    folder = save(tmp_path / "student")
    done = run(WITHOUT + STRANGER, folder, tmp_path / "copy", cache=tmp_path / "cache")
    assert done.returncode != 0
    assert "pip install tiny_onn" in done.stderr


@pytest.mark.parametrize("trust", [None, True])
def test_our_loading_runs_no_code_of_the_folder(tmp_path, trust):
    folder = save(tmp_path / "student")
    (folder / CODE_FILE).write_text(
        f"import pathlib\npathlib.Path({str(tmp_path)!r}, 'ran').touch()"
    )
    load_student(str(folder), torch.device("cpu"))
    TinyOnnForCausalLM.from_pretrained(folder)
    for auto in (AutoModel, AutoModelForCausalLM):
        auto.from_pretrained(folder, trust_remote_code=trust)
    assert not (tmp_path / "ran").exists()


def test_a_student_without_the_file_still_loads(tmp_path):
    folder = save(tmp_path / "student")
    (folder / CODE_FILE).unlink()
    table = json.loads((folder / "config.json").read_text())
    assert set(table.pop("auto_map")) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    (folder / "config.json").write_text(json.dumps(table))
    student = AutoModelForCausalLM.from_pretrained(folder)
    assert type(student) is TinyOnnForCausalLM
    load_student(str(folder), torch.device("cpu"))


def test_the_model_without_a_head_gives_the_hidden_states(tmp_path):
    student = make_student(make_dense("gemma2")).eval()
    student.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is TinyOnnModel
    ids = make_ids()
    with torch.no_grad():
        got = base.eval()(ids).last_hidden_state
        assert torch.equal(got, last_hidden_states(student, ids))
