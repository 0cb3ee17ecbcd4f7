"""The verb `generate`."""

import math
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from tiny_onn.cli.arguments import Checkpoint, Model, Teacher, require, require_model, starting

# Logits divided by a lower temperature overflow.
MIN_TEMPERATURE = 0.01


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a text with a student or a dense model.

    Example: tiny-onn generate runs/mine --prompt "The sea is"
    """

    model: Model
    """The folder of a run, a student or a dense model; `embedded`; or a hub id."""
    checkpoint: Checkpoint = "newest"
    teacher: Teacher = None
    prompt: str
    """Text to continue."""
    max_new_tokens: int = 128
    """Maximum number of tokens to write."""
    temperature: float = 0.7
    """Randomness of the choice of tokens; 0 always takes the most probable token."""
    seed: int = 0
    """Seed of the sampling."""
    budget: Annotated[
        float | None,
        arg(
            metavar="K",
            help="Mean number of active experts per token to run a student at.",
            help_behavior_hint="(default: the number in training)",
        ),
    ] = None

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.config.checks import check_prompt

        tokens, temperature, seed = self.max_new_tokens, self.temperature, self.seed
        require(1 <= tokens < 2**31, "--max-new-tokens", tokens, "an integer from 1 to 2**31 - 1")
        accepted = temperature == 0 or MIN_TEMPERATURE <= temperature < math.inf
        require(accepted, "--temperature", temperature, f"0, or a number >= {MIN_TEMPERATURE}")
        require(0 <= seed < 2**63, "--seed", seed, "an integer from 0 to 2**63 - 1")
        check_prompt(self.prompt)
        require_model(self.model)
        with starting():
            from tiny_onn.deploy.generate import run_generate

        run_generate(
            self.model,
            prompt=self.prompt,
            max_new_tokens=tokens,
            temperature=temperature,
            seed=seed,
            budget=self.budget,
            checkpoint=self.checkpoint,
            teacher=self.teacher,
        )
