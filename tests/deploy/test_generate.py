"""Answers from the command line: what is written, shown and refused, and what a seed decides."""

import io
import json
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from tiny import make_student, save_teacher
from tiny_onn.config.schema import RunConfig, TeacherConfig
from tiny_onn.deploy.answers import Token, load_speaker, load_teacher_speaker
from tiny_onn.deploy.generate import run_generate
from tiny_onn.deploy.showing import RoutingColours, print_token
from tiny_onn.errors import UserError
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.runs.folder import create_run_folder
from tiny_onn.teacher.load import load_dense

pytestmark = pytest.mark.usefixtures("quiet")
CPU = torch.device("cpu")
GREEDY: Any = {"max_new_tokens": 8, "temperature": 0.0, "seed": 0}


def generate(model, prompt="the cat", seed=0, temperature=1.0, **changes):
    options: Any = {"max_new_tokens": 8, "device": "cpu", **changes}
    return run_generate(model, prompt=prompt, temperature=temperature, seed=seed, **options)


def as_json(capsys, model, **options):
    capsys.readouterr()
    generate(model, as_json=True, **options)
    return json.loads(capsys.readouterr().out)


def test_the_seed_decides_the_text(teacher):
    texts = [generate(teacher, seed=seed) for seed in (2**40, 2**40, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_temperature_zero_takes_the_likeliest(teacher):
    assert len({generate(teacher, seed=seed, temperature=0.0) for seed in range(3)}) == 1


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_sampling_from_one_token_takes_the_likeliest(teacher, options):
    likeliest = generate(teacher, temperature=0.0)
    assert {generate(teacher, seed=seed, **options) for seed in range(3)} == {likeliest}


def test_a_repetition_penalty_changes_even_the_likeliest_text(teacher):
    plain = generate(teacher, temperature=0.0, max_new_tokens=32)
    assert generate(teacher, temperature=0.0, max_new_tokens=32, repetition_penalty=5.0) != plain


@pytest.mark.parametrize(("prompt", "said"), [("", "got an empty text"), ("a\udcff", "not UTF-8")])
def test_a_bad_prompt_is_refused(teacher, prompt, said):
    with pytest.raises(UserError, match=f"^--prompt: .*{said}"):
        generate(teacher, prompt=prompt)


def test_without_a_chat_template_the_text_is_printed_and_continued(teacher, capsys):
    text = generate(teacher)
    assert text.startswith("the cat")
    assert capsys.readouterr().out == f"{text}\n"


def test_a_chat_template_makes_the_prompt_a_message(student, capsys):
    written = as_json(capsys, student, temperature=0.0, show_routing=True)
    tokenizer = AutoTokenizer.from_pretrained(student)
    network = TinyOnnForCausalLM.from_pretrained(student)
    ids = tokenizer("[user]the cat\n[assistant]", return_tensors="pt", add_special_tokens=False)
    output = network.generate(**ids, max_new_tokens=8, do_sample=False)
    answer = written["answers"]["student"]
    assert written["chat"]
    assert [token["id"] for token in answer["tokens"]] == output[0].tolist()
    assert answer["num_prompt_tokens"] == ids["input_ids"].shape[1]
    system = as_json(capsys, student, temperature=0.0, system="be brief")
    assert system["answers"]["student"]["num_prompt_tokens"] > answer["num_prompt_tokens"]


def test_raw_continues_the_prompt_in_spite_of_a_chat_template(student, capsys):
    assert generate(student, raw=True).startswith("the cat")
    assert not as_json(capsys, student, raw=True)["chat"]


def test_a_system_message_needs_a_chat_that_takes_one(student, teacher):
    with pytest.raises(UserError, match=r"^--system: got --raw too"):
        generate(student, raw=True, system="x")
    with pytest.raises(UserError, match=r"^--system: got a tokenizer without a chat template"):
        generate(teacher, system="x")
    with pytest.raises(UserError, match=r"^--prompt: .*refuses the conversation \(no system"):
        generate(student, system="no")


def test_the_teacher_answers_beside_the_student_as_either_answers_alone(student, teacher, capsys):
    both = as_json(capsys, student, temperature=0.0, raw=True, with_teacher=True)["answers"]
    alone = as_json(capsys, student, temperature=0.0, raw=True)["answers"]["student"]
    dense = as_json(capsys, teacher, temperature=0.0)["answers"]["model"]
    assert both["student"]["text"] == alone["text"]
    assert both["teacher"]["text"] == dense["text"]
    assert both["teacher"]["mean_k"] is None
    generate(student, temperature=0.0, raw=True, with_teacher=True)
    printed = capsys.readouterr()
    assert "student" in printed.out
    assert "teacher" in printed.out
    assert "tokens/s" in printed.err


def test_the_number_of_experts_of_each_token_is_that_of_one_pass_over_the_text(student, capsys):
    answer = as_json(capsys, student, raw=True, show_routing=True)["answers"]["student"]
    tokens = answer["tokens"]
    assert [t["of_prompt"] for t in tokens].count(False) == answer["num_tokens"] == 8
    network = TinyOnnForCausalLM.from_pretrained(student).eval()
    active = []
    for bank in network.banks():
        bank.router.register_forward_hook(lambda _, __, routing: active.append(routing.active))
    with torch.no_grad():
        network(input_ids=torch.tensor([[token["id"] for token in tokens]]))
    expected = torch.stack(active).sum(-1).float().mean(0).tolist()
    # The last token is written and never read.
    assert [token["k"] for token in tokens] == [*expected[:-1], None]
    assert len(set(expected)) > 1
    assert answer["mean_k"] == pytest.approx(sum(expected[-8:-1]) / 7)


def test_a_budget_changes_how_many_experts_answer(student, capsys):
    few, many = (
        as_json(capsys, student, budget=budget)["answers"]["student"]["mean_k"]
        for budget in (2.0, 8.0)
    )
    assert few < many == 8.0


def test_numbers_of_experts_stand_in_brackets_where_there_is_no_terminal(student, capsys):
    generate(student, raw=True, show_routing=True)
    printed = capsys.readouterr()
    assert printed.out.startswith("the[")
    assert "[k] after a token: its number of active experts" in printed.err


@pytest.mark.parametrize("without", ["terminal", "colour"])
def test_a_token_is_coloured_only_where_there_is_a_terminal_with_colour(student, without):
    speaker = load_speaker(student, CPU)
    token = Token(id=3, text="word\x1b[2J\n", num_experts=6.0, of_prompt=False)

    def shown(**options):
        file = io.StringIO()
        console = Console(file=file, force_terminal=True, soft_wrap=True, **options)
        colours = RoutingColours.of(speaker, console)
        colours.explain(console)
        print_token(console, token, colours)
        return file.getvalue()

    coloured = shown(color_system="truecolor")
    assert "\x1b[30;48;2;" in coloured
    assert "[6.0]" not in coloured
    options = {"color_system": None} if without == "terminal" else {"no_color": True}
    plain = shown(**options)
    # What a terminal would obey is not passed on, whatever the model writes.
    assert plain == "word\N{REPLACEMENT CHARACTER}[2J[6.0]\n"


def test_colours_go_from_few_experts_to_many(student):
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor")
    colours = RoutingColours.of(load_speaker(student, CPU), console)
    assert colours.target_k == 4.0
    styles = [str(colours.style(k)) for k in (1.0, 3.5, 4.0, 4.3, 8.0)]
    assert len(set(styles)) == 5


@pytest.mark.parametrize("option", ["with_teacher", "show_routing"])
def test_a_dense_model_has_neither_teacher_nor_experts(teacher, option):
    name = f"--{option.replace('_', '-')}"
    with pytest.raises(UserError, match=f"^{name}: got .*, a dense model, expected a student"):
        run_generate(teacher, prompt="x", **GREEDY | {"device": "cpu", option: True})


def test_a_prompt_that_fills_the_context_is_refused_and_a_full_context_is_said(student, capsys):
    speaker = load_speaker(student, CPU)
    with pytest.raises(UserError, match=r"got 4096 tokens, expected fewer than .* 4096"):
        speaker.answer([5] * 4096, GREEDY)
    answer = speaker.answer([5] * 4094, GREEDY)
    assert len(answer.written) == 2
    assert "context of 4096 tokens is full" in capsys.readouterr().err


def test_an_answer_ends_at_the_models_end_token(student):
    speaker = load_speaker(student, CPU)
    written = speaker.answer([5, 6], GREEDY).written
    ended = written[1].id
    speaker.network.generation_config.eos_token_id = ended
    answer = speaker.answer([5, 6], GREEDY)
    assert [token.id for token in answer.written] == [written[0].id, ended]
    assert answer.finish == "stop"


def test_ctrl_c_ends_an_answer_and_keeps_what_was_written(student):
    speaker, seen = load_speaker(student, CPU), list[Token]()

    def stop(token):
        seen.append(token)
        if len(seen) == 5:
            raise KeyboardInterrupt

    answer = speaker.answer([5, 6], GREEDY | {"max_new_tokens": 50}, stop)
    assert answer.finish == "interrupted"
    assert 3 <= len(answer.written) < 50
    assert answer.tokens == seen


def test_a_student_answers_the_same_after_its_teacher_was_loaded(student):
    speaker = load_speaker(student, CPU)
    before = speaker.answer([5, 6, 7], GREEDY)
    assert load_teacher_speaker(speaker).answer([5, 6, 7], GREEDY).mean_k is None
    assert speaker.answer([5, 6, 7], GREEDY).tokens == before.tokens


def test_a_dense_model_answers_as_transformers_generates(teacher):
    speaker = load_speaker(teacher, CPU)
    ids = [5, 6, 7]
    written = speaker.answer(ids, GREEDY | {"temperature": 0.7, "seed": 3}).written
    torch.manual_seed(3)
    network: Any = speaker.network
    output = network.generate(
        torch.tensor([ids]), max_new_tokens=8, do_sample=True, temperature=0.7
    )
    assert [token.id for token in written] == output[0, 3:].tolist()


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere"])
def test_with_all_experts_a_student_writes_what_its_teacher_writes(family, tmp_path):
    teacher = str(save_teacher(tmp_path / "teacher", family))
    dense, tokenizer = load_dense(TeacherConfig(path=teacher, dtype="float32"), CPU)
    network = make_student(dense, selection="top_k", target_k=8.0)
    network.config.teacher = teacher
    network.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    student = load_speaker(str(tmp_path / "student"), CPU)
    # The prompt is longer than the sliding window of Gemma 2's layers.
    prompt = list(range(5, 25))
    ours, theirs = (
        [token.id for token in speaker.answer(prompt, GREEDY | {"max_new_tokens": 24}).tokens]
        for speaker in (student, load_teacher_speaker(student))
    )
    assert ours == theirs


def test_a_folder_without_a_model_and_a_run_without_a_student_are_named_by_their_argument(tmp_path):
    with pytest.raises(UserError, match=r"^MODEL: got .*: there is no config.json in it"):
        load_speaker(str(tmp_path), torch.device("cpu"))
    create_run_folder(tmp_path / "run", RunConfig(), argv=[])
    with pytest.raises(UserError, match=r"^MODEL: got .*run, .*a run that has saved no checkpoint"):
        load_speaker(str(tmp_path / "run"), torch.device("cpu"))
