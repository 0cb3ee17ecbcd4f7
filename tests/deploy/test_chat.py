"""A conversation in the terminal: commands, turns, and what Ctrl-C does."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from tiny_onn.deploy.chat import run_chat
from tiny_onn.errors import UserError

pytestmark = pytest.mark.usefixtures("quiet")
SAMPLING = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0}


@pytest.fixture
def chat(monkeypatch, capsys):
    """Talk with a model: give lines, get the answers and what was said beside them."""

    def talk(model, *lines, **options):
        typed = iter(lines)

        def read(_):
            try:
                line = next(typed)
            except StopIteration as error:
                raise EOFError from error
            if line is KeyboardInterrupt:
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr("builtins.input", read)
        run_chat(model, device="cpu", **SAMPLING | options)
        printed = capsys.readouterr()
        return printed.out, printed.err

    return talk


def answers(said):
    return [line for line in said.splitlines() if line.startswith(("[student", "[teacher"))]


def test_a_message_is_answered_and_the_conversation_goes_on(chat, student):
    alone, _ = chat(student, "the dog")
    again, said = chat(student, "the dog", "the dog")
    assert again.startswith(alone)
    # The second answer continues another text, which holds the first message and its answer.
    assert again != alone * 2
    assert len(answers(said)) == 2


def test_reset_forgets_the_conversation(chat, student):
    alone, _ = chat(student, "the dog")
    again, said = chat(student, "the dog", "/reset", "the dog")
    assert again == alone * 2
    assert "the conversation is forgotten" in said


def test_quit_leaves_and_nothing_after_it_is_read(chat, student):
    out, _ = chat(student, "", "/quit", "the dog")
    assert out == ""


def test_the_teacher_answers_the_last_message_and_is_not_remembered(chat, student, teacher):
    out, said = chat(student, "the dog", "/teacher", "a fox")
    kinds = [line.partition(":")[0] for line in answers(said)]
    assert kinds == ["[student", "[teacher", "[student"]
    without, _ = chat(student, "the dog", "a fox")
    first, last = without.split("\n", 1)
    assert out.startswith(first)
    assert out.endswith(last)
    _, said = chat(student, "/teacher")
    assert "/teacher: got no message yet" in said


def test_the_budget_changes_on_the_way(chat, student):
    _, said = chat(student, "/budget 2", "the dog", "/budget 8", "the dog", "/budget", "/budget 9")
    numbers = [float(line.split(" experts")[0].split()[-1]) for line in answers(said)]
    assert numbers[0] < numbers[1] == 8.0
    assert "/budget: got none, expected a number" in said
    assert "got 9, expected 1 to 8" in said


def test_an_unknown_command_is_said_and_the_chat_goes_on(chat, student):
    out, said = chat(student, "/nothing", "/help", "the dog")
    assert "/nothing: no such command; /help lists them" in said
    assert "/budget N" in said
    assert out


def test_ctrl_c_at_the_prompt_says_how_to_leave(chat, student):
    out, said = chat(student, KeyboardInterrupt, "the dog")
    assert "/quit or Ctrl-D leaves" in said
    assert len(answers(said)) == 1
    assert out


def test_a_dense_model_chats_and_has_neither_budget_nor_teacher(chat, teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "dense")
    (tmp_path / "dense" / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    out, said = chat(str(tmp_path / "dense"), "the dog", "/budget 4", "/teacher")
    assert out
    for command in ("/budget", "/teacher"):
        assert f"{command}: got {tmp_path / 'dense'}, a dense model, expected a student" in said


def test_a_model_without_a_chat_template_is_refused(chat, teacher):
    with pytest.raises(UserError, match=r"^MODEL: got .* no chat template"):
        chat(teacher, "x")


def test_ctrl_c_stops_the_answer_and_not_the_program(student):
    """The real program, interrupted in its answer, answers the next message and leaves."""
    options = ["--max-new-tokens", "20000", "--temperature", "0", "--device", "cpu"]
    # A penalty far above 1 and no end token in reach: the answer is long.
    command = [sys.executable, "-m", "tiny_onn.cli", "chat", student, *options]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write("the dog\n")
        program.stdin.flush()
        assert program.stdout.read(1)
        program.send_signal(signal.SIGINT)
        _, said = program.communicate("/quit\n", timeout=120)
    assert program.returncode == 0, said
    assert "stopped]" in said
