"""The verb `generate`."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from tiny_onn.cli.arguments import Json, starting
from tiny_onn.cli.sampling import Writing, prompt_or_input

Off = arg(help_behavior_hint="(default: off)")


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """The prompt, and the way in which its answer is shown; help lists them first."""

    prompt: Annotated[
        str | None,
        arg(
            metavar="TEXT",
            help="Message to answer, or text to continue.",
            help_behavior_hint="(default: standard input)",
        ),
    ] = None
    raw: Annotated[bool, Off] = False
    """Continue the prompt, even if the tokenizer has a chat template."""
    with_teacher: Annotated[bool, Off] = False
    """Let the student's teacher answer too, and show both side by side."""
    show_routing: Annotated[
        bool,
        arg(
            help="Colour each token by its number of active experts, or print the number after it"
            " where there is no terminal.",
            help_behavior_hint="(default: off)",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class Generate(Writing, Prompted):
    """Answer a prompt with a student or a dense model.

    A model whose tokenizer has a chat template answers the prompt as a message. Others, and all
    with --raw, continue it.

    Example: tiny-onn generate runs/mine --prompt "What is a list?"
    """

    json: Json = False

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.config.checks import check_prompt

        sampling = self.sampling()
        prompt = prompt_or_input(self.prompt)
        check_prompt(prompt)
        self.check_model()
        with starting():
            from tiny_onn.deploy.generate import run_generate

        run_generate(
            self.model,
            prompt=prompt,
            raw=self.raw,
            system=self.system,
            device=self.device,
            budget=self.budget,
            checkpoint=self.checkpoint,
            teacher=self.teacher,
            quantize=self.quantize,
            compiled=self.compile,
            with_teacher=self.with_teacher,
            show_routing=self.show_routing,
            as_json=self.json,
            **sampling,
        )
