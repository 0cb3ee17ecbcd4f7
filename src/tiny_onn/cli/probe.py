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
    ComputeDevice,
    Json,
    Model,
    Teacher,
    default_out,
    parse_layers,
    require,
    require_model,
    starting,
)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Measure which experts each token needs, by leaving each one out, and test every surprise.

    Example: tiny-onn probe embedded --layers 4,15,26

    For each probed layer, the layers from it upward run once per expert on the whole text. After
    every tenth of the documents the results are written to probe.json, so that an interrupted probe
    keeps them (with "complete": false).
    """

    model: Annotated[
        Model,
        arg(
            help="The folder of a run (which may still train), a student or a dense model;"
            " `embedded`; or a hub id. A dense model is converted with all experts active.",
        ),
    ]
    checkpoint: Checkpoint = "newest"
    teacher: Teacher = None
    layers: Annotated[
        str | None,
        arg(
            metavar="INT,INT",
            help_behavior_hint="(default: an early, a middle and a late layer)",
        ),
    ] = None
    """Layers to probe, counted from 0."""
    loss: Annotated[
        str,
        arg(
            metavar="auto|forward-kl|next-token",
            help="Loss of a single token: its forward KL to the teacher, or its next-token"
            " loss. auto takes next-token for a dense model, because its conversion equals its"
            " teacher, and forward-kl for a student.",
        ),
    ] = "auto"
    text: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(default: held-out text)")
    ] = None
    """A file, or a folder of files, with text to probe on."""
    init: str = "slices"
    """Partition of a dense model into experts, a value of the setting experts.init."""
    num_experts: int = 32
    """Number of experts per layer that a dense model is cut into."""
    max_tokens: int = 1024
    """Maximum number of tokens to probe."""
    document_tokens: int = 64
    """Maximum number of tokens to read of each document."""
    fit_tokens: int = 8192
    """Maximum number of tokens of other documents, to fit the regressions on."""
    device: ComputeDevice = "auto"
    out: Annotated[
        Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: runs/probe-TIME)")
    ] = None
    """Folder for probe.json and probe.html."""
    json: Json = False

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
        require_model(self.model)
        out = default_out("probe") if self.out is None else self.out
        with starting():
            from tiny_onn.console import say
            from tiny_onn.probe.probe import run_probe

        with contextlib.redirect_stdout(sys.stderr):
            result = run_probe(
                self.model,
                out=out,
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
        else:
            from rich.console import Console

            from tiny_onn.report.probe import console_tables

            for table in console_tables(result):
                Console().print(table)
        say(f"{out}: probe.json and probe.html")
