"""Arguments of the verbs that write text, and where a prompt comes from."""

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from tiny_onn.cli.arguments import (
    Checkpoint,
    ComputeDevice,
    Model,
    Quantize,
    Teacher,
    require,
    require_model,
    require_text_and_budgets,
)
from tiny_onn.errors import UserError

if TYPE_CHECKING:
    from tiny_onn.deploy.answers import SamplingOptions

# Logits divided by a lower temperature overflow.
MIN_TEMPERATURE = 0.01
OF_THE_MODEL = "(default: the model's own)"


@dataclass(frozen=True, kw_only=True)
class Writing:
    """The model that writes, and the way in which it chooses tokens."""

    model: Model
    """The folder of a run, a student or a dense model; `embedded`; or a hub id."""
    checkpoint: Checkpoint = "newest"
    teacher: Teacher = None
    device: ComputeDevice = "auto"
    quantize: Quantize = "none"
    compile: Annotated[
        bool,
        arg(
            help="Compile the step that writes a token, on a GPU: the first answer waits for the"
            " compiler, and later tokens come faster.",
            help_behavior_hint="(default: off)",
        ),
    ] = False
    budget: Annotated[
        float | None,
        arg(
            metavar="K",
            help="Mean number of active experts per token to run a student at.",
            help_behavior_hint="(default: the number in training)",
        ),
    ] = None
    system: Annotated[
        str | None, arg(metavar="TEXT", help_behavior_hint="(default: the chat template's own)")
    ] = None
    """System message of the conversation."""
    max_new_tokens: int = 128
    """Maximum number of tokens to write."""
    temperature: float = 0.7
    """Randomness of the choice of tokens; 0 always takes the most probable token."""
    top_p: Annotated[
        float | None,
        arg(
            metavar="P",
            help="Choose among the most probable tokens that together have this probability.",
            help_behavior_hint=OF_THE_MODEL,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        arg(
            metavar="N",
            help="Choose among this many of the most probable tokens; 0: among all of them.",
            help_behavior_hint="(default: the model's own, or 50)",
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        arg(
            metavar="R",
            help="Penalty on tokens that were there before; 1 is none, 1.1 is mild.",
            help_behavior_hint=OF_THE_MODEL,
        ),
    ] = None
    seed: int = 0
    """Seed of the sampling."""

    def sampling(self) -> "SamplingOptions":
        """Return the options of the sampling.

        Raises:
            UserError: an option is out of its range.
        """
        tokens, temperature, seed = self.max_new_tokens, self.temperature, self.seed
        top_p, top_k, penalty = self.top_p, self.top_k, self.repetition_penalty
        require(1 <= tokens < 2**31, "--max-new-tokens", tokens, "an integer from 1 to 2**31 - 1")
        accepted = temperature == 0 or MIN_TEMPERATURE <= temperature < math.inf
        require(accepted, "--temperature", temperature, f"0, or a number >= {MIN_TEMPERATURE}")
        require(0 <= seed < 2**63, "--seed", seed, "an integer from 0 to 2**63 - 1")
        if top_p is not None:
            require(0 < top_p <= 1, "--top-p", top_p, "a number above 0 and up to 1")
        if top_k is not None:
            require(0 <= top_k < 2**31, "--top-k", top_k, "an integer from 0 to 2**31 - 1")
        if penalty is not None:
            expected = "a number above 0"
            require(0 < penalty < math.inf, "--repetition-penalty", penalty, expected)
        return {
            "max_new_tokens": tokens,
            "temperature": temperature,
            "seed": seed,
            "top_p": top_p,
            "top_k": top_k,
            "repetition_penalty": penalty,
        }

    def check_model(self) -> None:
        """Refuse a device that has no such name, and a model or budget that cannot be had.

        Raises:
            UserError: the device, the model or the budget is refused.
        """
        from tiny_onn.config.checks import check_device

        check_device(self.device, "--device")
        require_model(self.model)
        budgets = () if self.budget is None else (self.budget,)
        require_text_and_budgets(self.model, None, budgets)


def prompt_or_input(prompt: str | None) -> str:
    """Return the prompt, or what standard input holds if there is none, without its last line end.

    Raises:
        UserError: there is no prompt and standard input is a terminal, or it holds no UTF-8.
    """
    if prompt not in (None, "-"):
        return prompt
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError(
            "--prompt: got none, expected a text; give one, or send it to standard input, as in"
            " `tiny-onn generate runs/mine < prompt.txt`; `tiny-onn chat` is a conversation"
        )
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt: got standard input with a byte that is not UTF-8 at {error.start}, expected"
            " text; convert the file to UTF-8"
        ) from error
