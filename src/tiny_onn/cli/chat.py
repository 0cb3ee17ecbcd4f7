"""The verb `chat`."""

from dataclasses import dataclass

from tiny_onn.cli.arguments import starting
from tiny_onn.cli.sampling import Writing


@dataclass(frozen=True, kw_only=True)
class Chat(Writing):
    """Talk with a student or a dense model.

    Ctrl-C stops an answer, /help lists the commands, /quit or Ctrl-D leaves.

    Example: tiny-onn chat runs/mine
    """

    def __call__(self) -> None:
        """Run the verb."""
        sampling = self.sampling()
        self.check_model()
        with starting():
            from tiny_onn.deploy.chat import run_chat

        run_chat(
            self.model,
            system=self.system,
            device=self.device,
            budget=self.budget,
            checkpoint=self.checkpoint,
            teacher=self.teacher,
            quantize=self.quantize,
            compiled=self.compile,
            **sampling,
        )
