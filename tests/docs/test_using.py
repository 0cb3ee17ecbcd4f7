"""The examples of the page on using a student run, one after the other, as they stand there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from repository import ROOT
from tiny import make_dense, make_ids, make_student, save_teacher, write_corpus
from tiny_onn.config.schema import TeacherConfig
from tiny_onn.model.fine_tuning import kind_of
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.runs.students import is_student
from tiny_onn.teacher.load import load_dense

PAGE = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
YAML = [text for language, text in BLOCKS if language == "yaml"]

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    # PEFT 0.21 (2026-11) uses a name of transformers 5.23 that is to be removed.
    # Trainer asks for pinned memory, and torch warns where there is no GPU.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def moved(folder):
    """Return the kinds of parameters in which a student in a folder differs from the first one."""
    before = TinyOnnForCausalLM.from_pretrained("runs/mine/student").state_dict()
    after = TinyOnnForCausalLM.from_pretrained(folder).state_dict()
    return {kind_of(name) for name in before if not torch.equal(before[name], after[name])}


def test_the_examples_of_fine_tuning_run_and_train_what_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    teacher = save_teacher(tmp_path / "teacher")
    dense, tokenizer = load_dense(
        TeacherConfig(path=str(teacher), dtype="float32"), torch.device("cpu")
    )
    make_student(dense).save_pretrained("runs/mine/student")
    tokenizer.save_pretrained("runs/mine/student")
    write_corpus(tmp_path / "my_texts", num_files=8)
    _, trainer, peft = PYTHON
    names = {}
    exec(compile(trainer, "docs/using.md", "exec"), names)
    assert "parameters that train: experts (" in capsys.readouterr().out
    assert is_student("runs/tuned/student")
    assert AutoTokenizer.from_pretrained("runs/tuned/student").pad_token == "<pad>"
    assert moved("runs/tuned/student") >= {"experts", "gates"}
    assert "backbone" not in moved("runs/tuned/student")
    exec(compile(peft, "docs/using.md", "exec"), names)
    assert moved("runs/adapted/student") == {"experts", "gates", "backbone"}
    assert {path.name for path in Path("runs/adapted/adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    merged = TinyOnnForCausalLM.from_pretrained("runs/adapted/student").eval()
    with torch.no_grad():
        expected = names["merged"].cpu().eval()(input_ids=make_ids()).logits
        assert torch.equal(merged(input_ids=make_ids()).logits, expected)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt.*:UserWarning")
def test_the_example_of_experts_in_fewer_bits_runs_in_both_formats(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_student(make_dense(hidden_size=64, head_dim=16)).save_pretrained("runs/mine/student")
    loading = PYTHON[0].rsplit("\n\n", 1)[0]
    in_8_bits = loading.replace('load_in_4bit=True, bnb_4bit_quant_type="nf4"', "load_in_8bit=True")
    assert in_8_bits != loading
    for text, stored_as in ((loading, "nf4"), (in_8_bits, "int8"), (PYTHON[0], "int8")):
        names: dict[str, Any] = {}
        exec(compile(text, "docs/using.md", "exec"), names)
        assert {bank.experts.stored_as for bank in names["student"].banks()} == {stored_as}
        with torch.no_grad():
            assert names["student"](input_ids=make_ids()).logits.isfinite().all()
    assert "MiB in int8 instead of" in capsys.readouterr().out


def test_the_task_of_the_page_is_one_that_the_harness_reads(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    monkeypatch.chdir(tmp_path)
    (text,) = YAML
    folder = tmp_path / "my_tasks"
    folder.mkdir()
    (folder / "facts.yaml").write_text(text)
    line = '{"question": "Is snow cold?", "choices": ["yes", "no"], "answer": 0}\n'
    (folder / "facts.jsonl").write_text(line)
    name = yaml.safe_load(text)["task"]
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    task: Any = manager.load([name])["tasks"][name]
    (document,) = task.test_docs()
    assert task.doc_to_text(document) == "Question: Is snow cold?\nAnswer:"
    assert task.doc_to_choice(document) == ["yes", "no"]
    assert task.doc_to_target(document) == 0
