"""The verb `generate`: one prompt, answered by a student, by its teacher, or by both."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Unpack

from rich.console import Console
from rich.live import Live

from tiny_onn.config.checks import check_prompt
from tiny_onn.console import say
from tiny_onn.deploy.answers import (
    Answer,
    SamplingOptions,
    Speaker,
    Token,
    load_speaker,
    load_teacher_speaker,
    needs_student,
    opening,
)
from tiny_onn.deploy.showing import RoutingColours, columns, print_token, summary_line
from tiny_onn.device import pick_device
from tiny_onn.errors import UserError
from tiny_onn.model.quantized_experts import QuantizeTo


def run_generate(
    model: str,
    *,
    prompt: str,
    raw: bool = False,
    system: str | None = None,
    device: str = "auto",
    budget: float | None = None,
    checkpoint: str = "newest",
    teacher: str | None = None,
    quantize: QuantizeTo = "none",
    compiled: bool = False,
    with_teacher: bool = False,
    show_routing: bool = False,
    as_json: bool = False,
    **sampling: Unpack[SamplingOptions],
) -> str:
    """Print an answer token by token, and return the text that was printed.

    With a chat template the prompt is a user's message and the answer is printed alone; otherwise
    the model continues the prompt, and both are printed.

    Args:
        model: a run folder, a student's folder, `embedded`, a dense model's folder or hub id.
        prompt: the message or the text to continue.
        raw: whether the prompt is continued even if the tokenizer has a chat template.
        system: a system message before the prompt; None: none is given.
        device: the device to run on.
        budget: the mean number of active experts per token of a student; None: as in training.
        checkpoint: the choice among a run's students, see `load_student`.
        teacher: the place of the student's teacher, see `load_student`.
        quantize: the number format that holds the student's experts, or `none`.
        compiled: whether the step that writes a token is compiled; this needs a GPU.
        with_teacher: whether the teacher answers too, beside the student.
        show_routing: whether each token is shown with its number of active experts.
        as_json: whether one JSON object is printed in place of text.
        sampling: see `SamplingOptions`.

    Raises:
        UserError: there is no such model or checkpoint, the prompt is empty or too long, or an
            option needs a student or a chat template.
        KeyboardInterrupt: Ctrl-C ended the answer, which was printed as far as it was written.
    """
    check_prompt(prompt)
    first = load_speaker(
        model,
        pick_device(device),
        budget=budget,
        checkpoint=checkpoint,
        teacher=teacher,
        quantize=quantize,
        compiled=compiled,
    )
    for name, given in (("--with-teacher", with_teacher), ("--show-routing", show_routing)):
        if given and first.loaded is None:
            raise needs_student(name, model)
    speakers = [first, load_teacher_speaker(first)] if with_teacher else [first]
    chat = first.has_chat_template and not raw
    if system is not None and not chat:
        raise _without_chat(raw)
    prompt_ids = first.chat_ids(opening(system, prompt)) if chat else first.prompt_ids(prompt)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    colours = RoutingColours.of(first, console) if show_routing else None
    if as_json:
        answers = [speaker.answer(prompt_ids, sampling) for speaker in speakers]
        by_name = {
            speaker.name: answer.as_dict(with_tokens=show_routing)
            for speaker, answer in zip(speakers, answers, strict=True)
        }
        given = {"prompt": prompt, "chat": chat, "system": system, "budget": budget}
        result = {"model": model, **given, "sampling": sampling, "answers": by_name}
        print(json.dumps(result, indent=2))
    elif len(speakers) > 1:
        answers = _side_by_side(speakers, prompt_ids, sampling, console, colours)
    else:
        answers = [_streamed(first, prompt_ids, sampling, console, colours, with_prompt=not chat)]
    if any(answer.finish == "interrupted" for answer in answers):
        raise KeyboardInterrupt
    text = answers[0].text
    return text if chat else "".join(token.text for token in answers[0].tokens)


def _without_chat(raw: bool) -> UserError:
    """Return the refusal of a system message where there is no chat."""
    why = "--raw too" if raw else "a tokenizer without a chat template"
    return UserError(
        f"--system: got {why}, expected a chat, which alone has a system message; leave"
        f" {'one of them' if raw else '--system'} out"
    )


def _streamed(
    speaker: Speaker,
    prompt_ids: list[int],
    sampling: SamplingOptions,
    console: Console,
    colours: RoutingColours | None,
    *,
    with_prompt: bool,
) -> Answer:
    """Print an answer as it is written, and then a line about its speed on standard error."""
    if colours is not None:
        colours.explain(console)

    def show(token: Token) -> None:
        if with_prompt or not token.of_prompt:
            print_token(console, token, colours)

    answer = speaker.answer(prompt_ids, sampling, show)
    console.print()
    say(summary_line(answer))
    return answer


def _side_by_side(
    speakers: Sequence[Speaker],
    prompt_ids: list[int],
    sampling: SamplingOptions,
    console: Console,
    colours: RoutingColours | None,
) -> list[Answer]:
    """Print the answers in one column each, on a terminal as they are written."""
    answers: list[Answer] = []
    tokens: list[list[Token]] = [[] for _ in speakers]
    names = [speaker.name for speaker in speakers]
    if colours is not None:
        colours.explain(console)
    with ExitStack() as stack:
        # Without a terminal nothing is shown before the end.
        live = Live(console=console, transient=True) if console.is_terminal else None
        if live is not None:
            stack.enter_context(live)
        for speaker, written in zip(speakers, tokens, strict=True):

            def show(token: Token, written: list[Token] = written) -> None:
                if not token.of_prompt:
                    written.append(token)
                    if live is not None:
                        live.update(columns(names, tokens, colours))

            answers.append(speaker.answer(prompt_ids, sampling, show))
            if answers[-1].finish == "interrupted":
                break
    console.print(columns(names, tokens, colours))
    for name, answer in zip(names, answers, strict=False):
        say(f"{name}: {summary_line(answer)}")
    return answers
