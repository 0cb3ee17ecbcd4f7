"""The verb `export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from tiny_onn.cli.arguments import (
    Checkpoint,
    Model,
    Teacher,
    require,
    require_place,
    require_student,
    require_text_and_budgets,
    starting,
)

TARGETS = ("transformers", "vllm", "gguf", "dense")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a student for programs that do not know this package, and say what that loses.

    Example: tiny-onn export runs/mine --to gguf --out mine-gguf
    """

    model: Model
    """The folder of a run or of a student."""
    to: Annotated[
        str,
        arg(
            metavar="|".join(TARGETS),
            help="The programs to write for: transformers (a folder with its own code), vllm (the"
            " same for vLLM's transformers backend), gguf (llama.cpp) or dense (the teacher's own"
            " architecture).",
        ),
    ]
    out: Annotated[Path, arg(metavar="FOLDER")]
    """Folder to write, which must not exist."""
    keep: Annotated[
        int | None,
        arg(
            metavar="K",
            help="With --to dense, the number of experts that every layer keeps for all tokens.",
            help_behavior_hint="(default: all)",
        ),
    ] = None
    fixed_k: Annotated[
        bool,
        arg(
            help="With --to gguf, give every token the same number of experts, which is faster and"
            " less like the student.",
            help_behavior_hint="(default: off)",
        ),
    ] = False
    budget: Annotated[
        float | None,
        arg(
            metavar="K",
            help="Mean number of active experts per token of the exported student.",
            help_behavior_hint="(default: the number in training)",
        ),
    ] = None
    text: Annotated[
        Path | None,
        arg(metavar="FILE", help_behavior_hint="(default: the run's training text)"),
    ] = None
    """A file, or a folder of files, with text for what an export has to measure."""
    checkpoint: Checkpoint = "newest"
    teacher: Teacher = None

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.errors import UserError, printable

        if self.to not in TARGETS:
            raise UserError(
                f"--to: got {printable(self.to)}, expected one of {', '.join(TARGETS)}; choose one"
            )
        if self.keep is not None and self.to != "dense":
            raise UserError(
                f"--keep: got {self.keep} with --to {self.to}, expected --to dense; leave --keep"
                " out, or use --budget"
            )
        if self.fixed_k and self.to != "gguf":
            raise UserError(
                f"--fixed-k: got --to {self.to}, expected --to gguf; leave --fixed-k out"
            )
        if self.keep is not None:
            require(self.keep >= 1, "--keep", self.keep, "an integer >= 1")
        require_student(self.model)
        budgets = () if self.budget is None else (self.budget,)
        require_text_and_budgets(self.model, self.text, budgets)
        require_place(self.out, "--out")
        with starting():
            from tiny_onn.deploy.export import run_export

        run_export(
            self.model,
            to=self.to,
            out=self.out,
            keep=self.keep,
            fixed_k=self.fixed_k,
            budget=self.budget,
            text=self.text,
            checkpoint=self.checkpoint,
            teacher=self.teacher,
        )
