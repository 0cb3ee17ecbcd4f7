"""A dense export is the teacher's architecture, exact with all experts on, static with some."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM

from export_cases import save_student
from tiny import make_dense, make_ids, write_corpus
from tiny_onn.conversion.convert import all_experts_on
from tiny_onn.deploy.export import run_export
from tiny_onn.deploy.exporting import Job
from tiny_onn.deploy.to_dense import most_used, usage
from tiny_onn.errors import UserError
from tiny_onn.model.router import Routing
from tiny_onn.runs.students import load_student

pytestmark = pytest.mark.usefixtures("quiet")

CLOSE: dict[str, Any] = {"atol": 2e-4, "rtol": 1e-4}


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def ours(folder):
    return load_student(str(folder), torch.device("cpu")).student


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("num_shared", [0, 2])
def test_all_experts_give_the_student_with_all_on(tmp_path, family, num_shared):
    changes = {"compensation": "mean", "learn_scale": True, "num_shared": num_shared}
    folder = save_student(tmp_path / "student", family, **changes)
    lost = run_export(str(folder), to="dense", out=tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    student = ours(folder)
    ids = make_ids()
    with all_experts_on(student.banks()):
        torch.testing.assert_close(logits(dense, ids), logits(student, ids), **CLOSE)
    assert dense.config.intermediate_size == 48
    assert "nothing else" in lost


def test_mean_weights_are_those_of_all_experts(tmp_path):
    changes = {"selection": "top_k", "weighting": "mean", "num_shared": 2, "target_k": 8.0}
    folder = save_student(tmp_path / "student", **changes)
    run_export(str(folder), to="dense", out=tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = make_ids()
    torch.testing.assert_close(logits(dense, ids), logits(ours(folder), ids), **CLOSE)


def test_a_student_that_never_trained_gives_its_teacher_back(tmp_path):
    folder = save_student(tmp_path / "student", "llama")
    run_export(str(folder), to="dense", out=tmp_path / "out")
    teacher = make_dense("llama", vocab_size=320)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(dense) is LlamaForCausalLM
    teacher.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits(dense, make_ids()), logits(teacher, make_ids()), **CLOSE)


def choosing(student, kept):
    """Let every layer of the student use its kept experts for all tokens."""
    for bank, experts in zip(student.banks(), kept, strict=True):
        active_E = torch.zeros(bank.experts.num_experts, dtype=torch.bool)
        active_E[experts] = True

        def route(x_TD, active_E=active_E, **_):
            active_TE = active_E.expand(len(x_TD), -1)
            weights_TE = active_TE.float()
            return Routing(
                router_logits=weights_TE, scores=weights_TE, active=active_TE, weights=weights_TE
            )

        bank.route = route


@pytest.mark.parametrize(("family", "bias"), [("llama", True), ("qwen3", False)])
def test_some_experts_give_the_student_that_always_uses_them(tmp_path, family, bias):
    folder = save_student(tmp_path / "student", family, compensation="mean", num_shared=1)
    text = write_corpus(tmp_path / "text")
    lost = run_export(str(folder), to="dense", out=tmp_path / "out", keep=3, text=text)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    student = ours(folder)
    loaded = load_student(str(folder), torch.device("cpu"))
    kept = [most_used(shares, 3) for shares in usage(Job(loaded=loaded, text=text))]
    assert all(0 in experts for experts in kept)
    choosing(student, kept)
    if not bias:
        for bank in student.banks():
            bank.reset_corrections()
    torch.testing.assert_close(logits(dense, make_ids()), logits(student, make_ids()), **CLOSE)
    assert dense.config.intermediate_size == 18
    assert ("bias of down_proj" in lost) == bias
    assert isinstance(dense, LlamaForCausalLM if bias else Qwen3ForCausalLM)


def test_usage_is_the_share_of_tokens_that_activate_an_expert(tmp_path):
    folder = save_student(tmp_path / "student", selection="top_k", target_k=3.0)
    text = write_corpus(tmp_path / "text")
    shares = usage(Job(loaded=load_student(str(folder), torch.device("cpu")), text=text))
    for share_E in shares:
        assert share_E.sum().item() == pytest.approx(3, abs=1e-4)
    assert most_used(torch.tensor([0.1, 0.9, 0.5, 0.9]), 3) == [1, 2, 3]


@pytest.mark.parametrize("keep", [1, 9])
def test_an_impossible_number_is_refused(tmp_path, keep):
    folder = save_student(tmp_path / "student", num_shared=2)
    with pytest.raises(UserError, match=rf"^--keep: got {keep}, expected 2 to 8"):
        run_export(str(folder), to="dense", out=tmp_path / "out", keep=keep)


def test_a_choice_needs_text(tmp_path):
    folder = save_student(tmp_path / "student")
    with pytest.raises(UserError, match=r"^--text: got none"):
        run_export(str(folder), to="dense", out=tmp_path / "out", keep=2)


def test_weights_that_vary_are_refused(tmp_path):
    folder = save_student(tmp_path / "student", selection="top_k", weighting="softmax")
    with pytest.raises(UserError, match=r"^--to dense: got a student with experts.weighting"):
        run_export(str(folder), to="dense", out=tmp_path / "out")
