"""The verb `probe`."""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from tiny_onn.cli.arguments import (
    Checkpoint,
    Model,
    Results,
    Teacher,
    default_out,
    parse_layers,
    require,
    starting,
)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Hold every surprise against leave-one-out truth: which experts does a token need?

    Example: tiny-onn probe embedded --layers 4,15,26

    Costs as many forward passes of the text as there are experts, through the layers from each
    probed one up. What was measured is written to probe.json after every tenth of the documents, so
    that an interrupted probe keeps it (with "complete": false).
    """

    model: Model
    """A run folder (in the middle of training too), a student's folder, `embedded`, the folder of a
    dense model or a hub id; a dense model is converted with all experts on."""
    checkpoint: Checkpoint = "newest"
    """Which of a run's students: the newest, the best by held-out KL, or that of a step."""
    teacher: Teacher = None
    """The model that a student was converted from, if it has moved since."""
    layers: Annotated[
        str | None, arg(metavar="INT,INT", help_behavior_hint="(an early, a middle, a late one)")
    ] = None
    """Layers to probe, counted from 0."""
    loss: str = "auto"
    """The token's own loss: forward-kl (to the teacher), next-token, or auto: next-token for a
    dense model, whose conversion equals its teacher, else forward-kl."""
    text: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(held-out text)")] = None
    """Text to probe on, a file or a folder."""
    init: str = "slices"
    """Partition of a dense model: slices, importance or another of the setting experts.init."""
    num_experts: int = 32
    """Experts a layer of a dense model."""
    max_tokens: int = 1024
    """Tokens to probe at most."""
    document_tokens: int = 64
    """Tokens to read of each document at most."""
    fit_tokens: int = 8192
    """Tokens of other documents, on which the regressions from the token are fitted at most."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    out: Results = None
    """Folder for probe.json and probe.html."""
    json: bool = False
    """Print JSON and nothing else."""

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.config.checks import check_device, check_probe

        check_device(self.device, "--device")
        check_probe(self.loss, self.init)
        for name, value, least in (
            ("--max-tokens", self.max_tokens, 1),
            ("--document-tokens", self.document_tokens, 3),
            ("--fit-tokens", self.fit_tokens, 0),
            ("--num-experts", self.num_experts, 1),
        ):
            require(value >= least, name, value, f"an integer >= {least}")
        layers = parse_layers(self.layers)
        with starting():
            from tiny_onn.probe.probe import run_probe

        with contextlib.redirect_stdout(sys.stderr):
            result = run_probe(
                self.model,
                out=default_out("probe") if self.out is None else self.out,
                layers=layers,
                loss=self.loss,
                text=self.text,
                init=self.init,
                num_experts=self.num_experts,
                device=self.device,
                max_tokens=self.max_tokens,
                document_tokens=self.document_tokens,
                fit_tokens=self.fit_tokens,
                checkpoint=self.checkpoint,
                teacher=self.teacher,
            )
        if self.json:
            print(json.dumps(result, indent=2))
            return
        from rich.console import Console

        from tiny_onn.report.probe import console_tables

        for table in console_tables(result):
            Console().print(table)
