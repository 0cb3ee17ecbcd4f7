"""The verb `chat`: a conversation in the terminal, with the student or its teacher answering."""

import contextlib
import sys
from typing import Unpack

from rich.console import Console

from tiny_onn.console import say
from tiny_onn.deploy.answers import (
    SamplingOptions,
    Speaker,
    Token,
    load_speaker,
    load_teacher_speaker,
    needs_student,
    opening,
)
from tiny_onn.deploy.showing import print_token, summary_line
from tiny_onn.device import pick_device
from tiny_onn.errors import UserError, reason_line
from tiny_onn.model.quantized_experts import QuantizeTo
from tiny_onn.routing.budgets import set_budget

HELP = """/reset     forget the conversation
/budget N  use N experts per token, on average
/teacher   let the teacher answer the last message too; the conversation keeps the student's answer
/quit      leave, as Ctrl-D does
Ctrl-C stops an answer; what was written stays in the conversation."""


def run_chat(
    model: str,
    *,
    system: str | None = None,
    device: str = "auto",
    budget: float | None = None,
    checkpoint: str = "newest",
    teacher: str | None = None,
    quantize: QuantizeTo = "none",
    compiled: bool = False,
    **sampling: Unpack[SamplingOptions],
) -> None:
    """Read messages and answer them until `/quit` or the end of the input.

    Args:
        model: a run folder, a student's folder, `embedded`, a dense model's folder or hub id.
        system: a system message before the conversation; None: none is given.
        device: the device to run on.
        budget: the mean number of active experts per token of a student; None: as in training.
        checkpoint: the choice among a run's students, see `load_student`.
        teacher: the place of the student's teacher, see `load_student`.
        quantize: the number format that holds the student's experts, or `none`.
        compiled: whether the step that writes a token is compiled; this needs a GPU.
        sampling: see `SamplingOptions`; each answer of a conversation begins with the same seed.

    Raises:
        UserError: there is no such model or checkpoint, or its tokenizer has no chat template.
    """
    speaker = load_speaker(
        model,
        pick_device(device),
        budget=budget,
        checkpoint=checkpoint,
        teacher=teacher,
        quantize=quantize,
        compiled=compiled,
    )
    if not speaker.has_chat_template:
        raise UserError(
            f"MODEL: got {model}, whose tokenizer has no chat template, expected one that chats;"
            " `tiny-onn generate` continues a text"
        )
    conversation = Conversation(speaker, system, sampling)
    # Importing readline gives `input` a history and line editing; Windows has none.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415
    if sys.stdin.isatty():
        say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
    while (line := _read_line()) not in (None, "/quit"):
        try:
            if line.startswith("/"):
                conversation.obey(*line.split(maxsplit=1))
            elif line:
                conversation.answer(line)
        except UserError as error:
            say(reason_line(error))


class Conversation:
    """The turns of a conversation, and who answers.

    Args:
        speaker: the model that answers.
        system: a system message before the turns; None: none is given.
        sampling: the choice of tokens.
    """

    def __init__(self, speaker: Speaker, system: str | None, sampling: SamplingOptions) -> None:
        self._speaker, self._sampling = speaker, sampling
        self._teacher: Speaker | None = None
        self._start = opening(system)
        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.reset()

    def obey(self, command: str, value: str = "") -> None:
        """Carry out a command.

        Raises:
            UserError: there is no such command, or it needs another value or a student.
        """
        match command:
            case "/help":
                say(HELP)
            case "/reset":
                self.reset()
                say("the conversation is forgotten")
            case "/budget":
                self.set_budget(value)
            case "/teacher":
                self.answer_by_teacher()
            case _:
                raise UserError(f"{command}: no such command; /help lists them")

    def reset(self) -> None:
        """Forget all turns but the system message."""
        self._turns = list(self._start)
        self._last_prompt: list[int] = []

    def set_budget(self, value: str) -> None:
        """Let the student use another mean number of experts.

        Raises:
            UserError: the value is no number, the student cannot use it, or there is no student.
        """
        if self._speaker.loaded is None:
            raise needs_student("/budget", self._speaker.source)
        try:
            budget = float(value)
        except ValueError as error:
            raise UserError(
                f"/budget: got {value or 'none'}, expected a number of experts, as in /budget 8"
            ) from error
        set_budget(self._speaker.loaded.student, budget)
        say(f"{budget:g} experts per token on average")

    def answer(self, message: str) -> None:
        """Print an answer to the message, and keep both.

        Raises:
            UserError: the template refuses the conversation, or it fills the model's context.
        """
        turns = [*self._turns, {"role": "user", "content": message}]
        prompt = self._speaker.chat_ids(turns)
        text = self._stream(self._speaker, prompt)
        self._turns = [*turns, {"role": "assistant", "content": text}]
        self._last_prompt = prompt

    def answer_by_teacher(self) -> None:
        """Print the teacher's answer to the last message, which is not kept.

        Raises:
            UserError: there was no message yet, there is no student, or no teacher to be had.
        """
        if self._speaker.loaded is None:
            raise needs_student("/teacher", self._speaker.source)
        if not self._last_prompt:
            raise UserError("/teacher: got no message yet, expected one to answer; write it first")
        if self._teacher is None:
            self._teacher = load_teacher_speaker(self._speaker)
        self._stream(self._teacher, self._last_prompt)

    def _stream(self, speaker: Speaker, prompt: list[int]) -> str:
        def show(token: Token) -> None:
            if not token.of_prompt:
                print_token(self._console, token, None)

        answer = speaker.answer(prompt, self._sampling, show)
        self._console.print()
        stopped = ", stopped" if answer.finish == "interrupted" else ""
        say(f"[{speaker.name}: {summary_line(answer)}{stopped}]")
        return answer.text


def _read_line() -> str | None:
    """Return the next line that is typed; None at the end of the input."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                print()
            return None
        except KeyboardInterrupt:
            print()
            say("/quit or Ctrl-D leaves")
