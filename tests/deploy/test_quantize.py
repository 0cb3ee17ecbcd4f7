"""Students whose experts are held in 4 or 8 bits, from the command line's functions."""

import json
from typing import Any

import pytest
import torch

from tiny_onn.deploy.answers import load_speaker, load_teacher_speaker
from tiny_onn.deploy.generate import run_generate
from tiny_onn.errors import UserError
from tiny_onn.evaluation.evaluate import run_eval
from tiny_onn.evaluation.frontier import run_frontier
from tiny_onn.model.quantized_experts import stored_bytes

pytestmark = pytest.mark.usefixtures("quiet")
CPU = torch.device("cpu")
GREEDY: Any = {"max_new_tokens": 8, "temperature": 0.0, "seed": 0}


@pytest.mark.parametrize(("stored_as", "at_most"), [("nf4", 0.15), ("int8", 0.4)])
def test_a_quantised_student_answers_and_takes_less_memory(student, capsys, stored_as, at_most):
    plain = load_speaker(student, CPU)
    speaker = load_speaker(student, CPU, quantize=stored_as)
    assert f"MiB in {stored_as} instead of" in capsys.readouterr().err
    assert stored_bytes(speaker.network) < at_most * stored_bytes(plain.network)
    prompt = speaker.prompt_ids("the cat")
    answer = speaker.answer(prompt, GREEDY)
    assert len(answer.written) == 8
    assert answer.mean_k is not None
    assert load_teacher_speaker(speaker).answer(prompt, GREEDY).text == (
        load_teacher_speaker(plain).answer(prompt, GREEDY).text
    )


def test_generate_takes_a_format_and_a_budget_together(student, capsys):
    options: Any = {"prompt": "the cat", "device": "cpu", "as_json": True, "budget": 2.0}
    run_generate(student, quantize="int8", **options, **GREEDY)
    answer = json.loads(capsys.readouterr().out)["answers"]["student"]
    assert answer["num_tokens"] > 0


def test_a_dense_model_has_no_experts_to_quantise(teacher):
    with pytest.raises(UserError, match=r"^--quantize: got .*, a dense model, expected a student"):
        load_speaker(teacher, CPU, quantize="int8")


def test_eval_measures_the_quantised_student(student, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    options: Any = {"text": text, "device": "cpu", "max_tokens": 128}
    formats: Any = ("none", "int8", "nf4")
    results = {name: run_eval(student, quantize=name, **options) for name in formats}
    assert [result["experts_stored_as"] for result in results.values()] == [None, "int8", "nf4"]
    kl = {name: result["forward_kl"] for name, result in results.items()}
    # The teacher is not quantised, and fewer bits lose more of what the student computes.
    teachers = [result["teacher_perplexity"] for result in results.values()]
    assert teachers[1:] == pytest.approx(teachers[:1] * 2)
    assert abs(kl["int8"] - kl["none"]) < abs(kl["nf4"] - kl["none"])
    assert kl["int8"] != kl["none"]


def test_a_frontier_says_how_the_experts_are_held(student, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    options: Any = {"text": text, "device": "cpu", "max_tokens": 128}
    result = run_frontier(student, budgets=[4.0], out=tmp_path, quantize="int8", **options)
    assert result["experts_stored_as"] == "int8"
    assert "with experts in int8" in (tmp_path / "frontier.html").read_text()
