"""The verb `generate`."""

import math
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from tiny_onn.cli.arguments import Checkpoint, Model, Teacher, require, starting

# Below it the logits overflow.
MIN_TEMPERATURE = 0.01


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Write text with a student or a teacher.

    Example: tiny-onn generate runs/mine --prompt "The sea is"
    """

    model: Model
    """A run folder, a model folder, `embedded`, or a hub id."""
    checkpoint: Checkpoint = "newest"
    """Which of a run's students: the newest, the best by held-out KL, or that of a step."""
    teacher: Teacher = None
    """The model that a student was converted from, if it has moved since; read only where a run
    has no finished student, or --checkpoint names an earlier one."""
    prompt: str
    """Text to go on from."""
    max_new_tokens: int = 128
    """Tokens to write at most."""
    temperature: float = 0.7
    """Randomness; 0 takes the likeliest token each time."""
    seed: int = 0
    """Seed of the sampling."""
    budget: Annotated[float | None, arg(metavar="K", help_behavior_hint="(as trained)")] = None
    """Mean active experts a token to run a student at."""

    def __call__(self) -> None:
        """Run the verb."""
        tokens, temperature, seed = self.max_new_tokens, self.temperature, self.seed
        require(1 <= tokens < 2**31, "--max-new-tokens", tokens, "an integer from 1 to 2**31 - 1")
        accepted = temperature == 0 or MIN_TEMPERATURE <= temperature < math.inf
        require(accepted, "--temperature", temperature, f"0, or a number >= {MIN_TEMPERATURE}")
        require(0 <= seed < 2**63, "--seed", seed, "an integer from 0 to 2**63 - 1")
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
