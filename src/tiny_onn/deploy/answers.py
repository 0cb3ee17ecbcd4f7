"""Text from a student or a dense model, token by token, with the experts that each token took."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NotRequired, TypedDict

import torch
from jaxtyping import Int
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from tiny_onn.config.schema import TeacherConfig
from tiny_onn.console import say
from tiny_onn.data.tokens import DocumentTokens
from tiny_onn.deploy.compiled_steps import check_compiled, check_controller, fixed_cache
from tiny_onn.errors import LoadErrors, UserError
from tiny_onn.model.backbone import backbone_of, generation_attention
from tiny_onn.model.experts import ExpertBank, recorded_routings
from tiny_onn.model.quantized_experts import QuantizeTo
from tiny_onn.model.router import Routing
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.routing.budgets import set_budget
from tiny_onn.runs.recorded_teacher import refuse_for_dense
from tiny_onn.runs.students import LoadedStudent, is_student, load_student, load_teacher_of
from tiny_onn.teacher.load import load_model
from tiny_onn.teacher.model_paths import find_model


class SamplingOptions(TypedDict):
    """The choice of each next token, and the length of an answer."""

    max_new_tokens: int
    """The maximum number of tokens to write."""
    temperature: float
    """The temperature of the sampling; 0 always takes the most probable token."""
    seed: int
    """The seed of the sampling."""
    top_p: NotRequired[float | None]
    """Share of the probability from which is sampled; None: as the model's own settings say."""
    top_k: NotRequired[int | None]
    """Number of tokens from which is sampled, 0 for all; None: as the model's own settings say."""
    repetition_penalty: NotRequired[float | None]
    """Divisor of the logits of tokens that were there before; None: the model's own settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """A token of a prompt or an answer."""

    id: int
    text: str
    """The text that this token completes; empty for special tokens, and for a token that ends
    inside a character."""
    num_experts: float | None
    """Number of experts that the token activated, as a mean over the layers; None for a dense
    model, and for the last token of an answer, which the model writes but does not read."""
    of_prompt: bool


@dataclass(kw_only=True, slots=True)
class Answer:
    """The text that a model wrote, and how it went."""

    tokens: list[Token] = field(default_factory=list)
    """The tokens of the prompt and of the answer."""
    finish: Literal["stop", "length", "interrupted"] = "stop"
    """Why the answer ends: at an end token, at the maximum length, or by Ctrl-C."""
    first_token_s: float = 0.0
    """Seconds from the prompt to the first token, in which the model reads the prompt."""
    next_tokens_s: float = 0.0
    """Seconds from the first token to the last."""

    @property
    def written(self) -> list[Token]:
        """The tokens that the model wrote."""
        return [token for token in self.tokens if not token.of_prompt]

    @property
    def text(self) -> str:
        """The text of the answer, without the prompt."""
        return "".join(token.text for token in self.written)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens written per second after the first one; None if there is only one."""
        num_next = len(self.written) - 1
        return num_next / self.next_tokens_s if num_next > 0 else None

    @property
    def mean_k(self) -> float | None:
        """Mean number of active experts of the tokens that were written and read again."""
        numbers = [token.num_experts for token in self.written if token.num_experts is not None]
        return sum(numbers) / len(numbers) if numbers else None

    def as_dict(self, *, with_tokens: bool) -> dict[str, Any]:
        """Return the answer for JSON; `with_tokens` adds every token with its experts."""
        tokens = [
            {"id": t.id, "text": t.text, "k": t.num_experts, "of_prompt": t.of_prompt}
            for t in self.tokens
        ]
        return {
            "text": self.text,
            "finish": self.finish,
            "num_prompt_tokens": len(self.tokens) - len(self.written),
            "num_tokens": len(self.written),
            "first_token_s": self.first_token_s,
            "tokens_per_s": self.tokens_per_s,
            "mean_k": self.mean_k,
        } | ({"tokens": tokens} if with_tokens else {})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Speaker:
    """A model that answers, under the name by which it is shown."""

    name: Literal["student", "teacher", "model"]
    source: str
    """The folder or hub id that the user named."""
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    loaded: LoadedStudent | None = None
    """The student and where it comes from; None for a dense model."""
    compiled: bool = False
    """True if the step that writes a token is compiled, and captured in a CUDA graph."""

    @property
    def has_chat_template(self) -> bool:
        """True if the tokenizer can render a conversation."""
        return bool(self.tokenizer.chat_template)

    def banks(self) -> list[ExpertBank]:
        """Return the expert banks of a student, none of a dense model."""
        network = self.network
        return network.banks() if isinstance(network, TinyOnnForCausalLM) else []

    def prompt_ids(self, text: str) -> list[int]:
        """Return the token ids of a text that the model continues.

        Raises:
            UserError: the tokenizer fails on the text.
        """
        return DocumentTokens(self.tokenizer).prompt(text)

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the token ids of a conversation, up to where the model's answer begins.

        Args:
            messages: the turns, each with its `role` (`system`, `user` or `assistant`) and
                `content`.

        Raises:
            UserError: the tokenizer's chat template refuses the conversation.
        """
        # The template's errors are jinja2's, which transformers imports only here too.
        from jinja2 import TemplateError  # noqa: PLC0415

        refused = (
            "--prompt: the tokenizer's chat template refuses the conversation ({}), expected one"
            " that it renders; leave --system out, or continue plain text with --raw"
        )
        try:
            with LoadErrors(refused.format):
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
                assert isinstance(text, str)
        except TemplateError as error:
            raise UserError(refused.format(error)) from error
        with LoadErrors("--prompt: the tokenizer failed on it ({}); change the text".format):
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def answer(
        self,
        prompt_ids: list[int],
        sampling: SamplingOptions,
        on_token: Callable[[Token], None] = lambda _: None,
    ) -> Answer:
        """Write an answer; Ctrl-C ends it early and keeps what was written.

        Args:
            prompt_ids: the token ids to continue.
            sampling: the choice of tokens.
            on_token: a function that receives every token, the prompt's too, in order, as soon as
                its number of experts is known.

        Raises:
            UserError: the prompt fills the model's context.
        """
        limit = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        room = sampling["max_new_tokens"] if limit is None else limit - len(prompt_ids)
        if room < 1:
            raise UserError(
                f"--prompt: got {len(prompt_ids)} tokens, expected fewer than the model's context"
                f" of {limit}; shorten the text"
            )
        num_new = min(room, sampling["max_new_tokens"])
        # The sampling of transformers takes no generator, so the global seed is set.
        torch.manual_seed(sampling["seed"])
        input_ids = torch.tensor([prompt_ids], device=self.network.device)
        answer, ends = Answer(), self._end_ids()
        cache = fixed_cache(self.network, len(prompt_ids) + num_new) if self.compiled else None

        def collect(token: Token) -> None:
            answer.tokens.append(token)
            on_token(token)

        banks = self.banks()
        with recorded_routings(banks) as routings:
            read = routings if banks else None
            stream = _Stream(self.tokenizer, read, len(banks), collect)
            try:
                self.network.generate(  # pyright: ignore[reportCallIssue]
                    input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    max_new_tokens=num_new,
                    streamer=stream,
                    pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                    eos_token_id=ends or None,
                    past_key_values=cache,
                    **_sampling_arguments(sampling),
                )
                written = answer.written
                ended = bool(written) and written[-1].id in ends
                answer.finish = "stop" if ended else "length"
            except KeyboardInterrupt:
                stream.end()
                answer.finish = "interrupted"
        answer.first_token_s, answer.next_tokens_s = stream.seconds()
        if answer.finish == "length" and num_new < sampling["max_new_tokens"]:
            say(f"the answer stops where the model's context of {limit} tokens is full")
        return answer

    def _end_ids(self) -> list[int]:
        """Return the ids of the tokens that end an answer: the model's and the tokenizer's."""
        ends = getattr(self.network.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        return sorted({e for e in (*ends, self.tokenizer.eos_token_id) if isinstance(e, int)})


class _Stream(BaseStreamer):
    """A streamer of transformers that hands over each token once it was read.

    Tokens arrive when they are chosen; the number of experts that one activates is known after the
    step that reads it.

    Args:
        tokenizer: the tokenizer.
        routings: the list that receives the routing of every layer's calls; None: a dense model.
        num_layers: the number of layers with experts.
        on_token: the function that receives the tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        routings: list[Routing] | None,
        num_layers: int,
        on_token: Callable[[Token], None],
    ) -> None:
        self._backend: Any = tokenizer.backend_tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._routings, self._num_layers, self._on_token = routings, num_layers, on_token
        self._waiting: list[int] = []
        self._numbers: list[float] = []
        self._num_prompt = 0
        self._times: list[float] = []

    def put(self, value: Int[Tensor, "..."]) -> None:
        """Take the prompt's token ids, in the first call, or the next token's."""
        first = not self._times
        self._times.append(time.perf_counter())
        routings, num_layers = self._routings, self._num_layers
        while routings and len(routings) >= num_layers:
            step = torch.stack(
                [routing.active.sum(-1).float() for routing in routings[:num_layers]]
            )
            del routings[:num_layers]
            self._numbers += step.mean(0).tolist()
        num_read = len(self._waiting) if routings is None else len(self._numbers)
        self._hand_over(min(num_read, len(self._waiting)))
        ids = value.flatten().tolist()
        self._waiting += ids
        self._num_prompt += len(ids) if first else 0

    def end(self) -> None:
        """Hand over the tokens that no step has read: the last one."""
        self._hand_over(len(self._waiting))

    def seconds(self) -> tuple[float, float]:
        """Return the seconds until the first token was there, and from then to the last."""
        start, *tokens = self._times or [0.0]
        return (tokens[0] - start, tokens[-1] - tokens[0]) if tokens else (0.0, 0.0)

    def _hand_over(self, count: int) -> None:
        for _ in range(count):
            token_id = self._waiting.pop(0)
            number = self._numbers.pop(0) if self._numbers else None
            text = self._decoder.step(self._backend, token_id) or ""
            of_prompt = self._num_prompt > 0
            self._num_prompt -= of_prompt
            self._on_token(Token(id=token_id, text=text, num_experts=number, of_prompt=of_prompt))


def _sampling_arguments(sampling: SamplingOptions) -> dict[str, Any]:
    """Return transformers' arguments; what is not given is left to the model's own settings."""
    given = {
        name: sampling.get(name)
        for name in ("repetition_penalty", "top_p", "top_k")
        if sampling.get(name) is not None
    }
    if sampling["temperature"] == 0:
        penalty = {n: v for n, v in given.items() if n == "repetition_penalty"}
        return {"do_sample": False, **penalty}
    return {"do_sample": True, "temperature": sampling["temperature"], **given}


def load_speaker(
    model: str,
    device: torch.device,
    *,
    budget: float | None = None,
    checkpoint: str = "newest",
    teacher: str | None = None,
    quantize: QuantizeTo = "none",
    compiled: bool = False,
) -> Speaker:
    """Load a model that answers.

    Args:
        model: a run folder, a student's folder, `embedded`, a dense model's folder or hub id.
        device: the device to run on.
        budget: the mean number of active experts per token of a student; None: as in training.
        checkpoint: the choice among a run's students, see `load_student`.
        teacher: the place of the student's teacher, see `load_student`.
        quantize: the number format that holds the student's experts, or `none`.
        compiled: whether the step that writes a token is compiled; this needs a GPU.

    Raises:
        UserError: there is no such model or checkpoint, an option needs a student, the experts
            cannot be quantised, or the step cannot be compiled.
    """
    if compiled:
        check_compiled(device, quantize)
    shared: dict[str, Any] = {"source": model, "compiled": compiled}
    if is_student(model):
        loaded = load_student(model, device, checkpoint, teacher, quantize=quantize)
        if budget is not None:
            set_budget(loaded.student, budget)
        if compiled:
            check_controller(loaded.student)
        loaded.student.round_experts()
        network, tokenizer = loaded.student, loaded.tokenizer
        return Speaker(
            name="student", network=network, tokenizer=tokenizer, loaded=loaded, **shared
        )
    refuse_for_dense(model, teacher)
    for name, given in (
        ("--budget", budget is not None),
        ("--checkpoint", checkpoint != "newest"),
        ("--quantize", quantize != "none"),
    ):
        if given:
            raise needs_student(name, model)
    if model != "embedded":
        find_model(model, "MODEL")
    dense, tokenizer = load_model(replace(TeacherConfig(), path=model), device)
    # Generation keeps a cache, which the attention for packed rows of training does not handle.
    dense.set_attn_implementation(generation_attention(dense))
    return Speaker(name="model", network=dense, tokenizer=tokenizer, **shared)


def load_teacher_speaker(speaker: Speaker) -> Speaker:
    """Load the teacher of a student, to answer the same prompts; equal tensors are shared.

    Raises:
        UserError: the teacher cannot be had, or it is another model.
    """
    assert speaker.loaded is not None
    dense = load_teacher_of(speaker.loaded, speaker.network.device)
    teacher = replace(speaker, name="teacher", network=dense, loaded=None)
    # Loading the teacher leaves both with the attention for packed rows, which has no cache.
    for network in (speaker.network, dense):
        network.set_attn_implementation(generation_attention(backbone_of(network)))
    return teacher


def opening(system: str | None, message: str | None = None) -> list[dict[str, str]]:
    """Return the first turns of a conversation: a system message and a user's, if there are."""
    turns = (("system", system), ("user", message))
    return [{"role": role, "content": text} for role, text in turns if text is not None]


def needs_student(name: str, model: str) -> UserError:
    """Return the refusal of an option or command that a dense model does not have."""
    return UserError(f"{name}: got {model}, a dense model, expected a student; leave {name} out")
