"""The command line: parse, call, print.

Every verb is a dataclass whose fields are its arguments. This module lies beside the package, whose
import registers the model with transformers and takes seconds: help and malformed command lines
answer before it.
"""

# ruff: noqa: PLC0415

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, UseAppendAction, arg

_Run = Annotated[Positional[Path | None], arg(metavar="RUN.toml", help_behavior_hint="(optional)")]
_Preset = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(optional)")]
_Overrides = Annotated[
    UseAppendAction[tuple[str, ...]], arg(name="set", metavar="SECTION.KEY=VALUE")
]
_Out = Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(runs/NAME-TIME)")]
_Model = Annotated[Positional[str], arg(metavar="MODEL")]


# Below it the logits overflow.
MIN_TEMPERATURE = 0.01


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Convert the embedded teacher, distill it on embedded text and compare with two controls.

    Example: tiny-onn demo
    """

    out: _Out = None
    """Run folder."""
    overrides: _Overrides = ()
    """One setting, over the preset demo."""

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.demo import run_demo

        run_demo(_default_out("demo") if self.out is None else self.out, self.overrides)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Count parameters, FLOPs, memory and time of a run before it starts.

    Example: tiny-onn plan --preset model-card --device "RTX 3060"

    The teacher is the setting teacher.path; of a hub id only config.json is read, and Qwen3-0.6B,
    Qwen3-1.7B, SmolLM2-135M and Llama-3.2-1B come with the package.
    """

    run: _Run = None
    """Settings of the run."""
    preset: _Preset = None
    """Settings to start from; with RUN.toml, the file's win."""
    overrides: _Overrides = ()
    """One setting, over preset and file."""
    device: str = "auto"
    """auto, cpu, RTX 3060, RTX 4060 Ti, RTX 4090, RTX 5090, A100, H100, or a GPU's
    MEMORY_GIB,TFLOPS,GB_PER_S."""
    tokens: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(train.tokens)")] = None
    """Training tokens to tell the time for."""
    efficiency: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint="(0.3)")] = None
    """Share of the device's peak rate that a step reaches."""
    document_tokens: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(2048)")] = None
    """Tokens of a document, the mean over tokens."""
    json: bool = False
    """Print JSON and nothing else."""

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.settings import load_config

        tokens = () if self.tokens is None else (f"train.tokens={self.tokens}",)
        config = load_config(self.run, self.preset, (*self.overrides, *tokens))
        from rich.console import Console

        from tiny_onn.plan import DOCUMENT_TOKENS, EFFICIENCY, plan, render
        from tiny_onn.teacher import quiet_transformers

        quiet_transformers()
        planned = plan(
            config,
            config.teacher.path,
            self.device,
            efficiency=EFFICIENCY if self.efficiency is None else self.efficiency,
            document_tokens=(
                DOCUMENT_TOKENS if self.document_tokens is None else self.document_tokens
            ),
        )
        if self.json:
            print(json.dumps(planned.as_dict(), indent=2))
        else:
            Console().print(render(planned))


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Convert a dense model and train its experts and gates to match it.

    Example: tiny-onn distill RUN.toml --set optim.expert_lr=1e-4 --out runs/mine

    The settings are not repeated here: `tiny-onn config` prints each with its meaning and default,
    as a RUN.toml to start from.
    """

    run: _Run = None
    """Settings of the run."""
    preset: _Preset = None
    """Settings to start from; with RUN.toml, the file's win."""
    overrides: _Overrides = ()
    """One setting, over preset and file."""
    out: _Out = None
    """Run folder."""
    resume: bool = False
    """Go on with the run in --out, with its own settings but for --set if none are given."""
    allow_change: Annotated[
        UseAppendAction[tuple[str, ...]], arg(name="allow-change", metavar="SECTION.KEY")
    ] = ()
    """A setting that may differ from the run's when it goes on."""
    profile: bool = False
    """Run six steps, show where the time of the last three goes, and end without a checkpoint."""

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.errors import UserError
        from tiny_onn.settings import load_config, override

        named = self.run is not None or self.preset is not None
        if self.resume and self.out is None:
            raise UserError("--resume: got no --out, expected the folder of the run; add --out")
        if self.resume and self.profile:
            raise UserError(
                "--profile: got --resume, expected a new run folder; leave out --resume"
            )
        if self.allow_change and not self.resume:
            raise UserError(
                "--allow-change: got no --resume, expected a run that goes on; add --resume"
            )
        if not named and not self.resume:
            raise UserError(
                "distill: got neither RUN.toml nor --preset, expected one; try --preset demo, or"
                " write a file with `tiny-onn config > RUN.toml`"
            )
        if named:
            config = load_config(self.run, self.preset, self.overrides)
        else:
            from tiny_onn.run_folder import read_run_config

            assert self.out is not None
            config = override(read_run_config(self.out), self.overrides)
        name = self.run.stem if self.run is not None else str(self.preset)
        out = _default_out(name) if self.out is None else self.out
        if self.profile:
            from tiny_onn.profile import run_profile

            run_profile(config, out=out, argv=sys.argv)
            return
        from tiny_onn.train import run_distill

        result = run_distill(
            config, out=out, resume=self.resume, allow_change=self.allow_change, argv=sys.argv
        )
        if result.interrupted:
            raise KeyboardInterrupt


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure a student's quality and cost against its teacher.

    Example: tiny-onn eval runs/mine --json > eval.json
    """

    model: _Model
    """A run folder, or the folder of a converted model."""
    text: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(held-out text)")] = None
    """Text to measure on."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    max_tokens: int = 8192
    """Tokens to read at most."""
    json: bool = False
    """Print JSON and nothing else."""

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.checks import check_device

        check_device(self.device, "--device")
        _require(
            1 <= self.max_tokens < 2**31,
            "--max-tokens",
            self.max_tokens,
            "an integer from 1 to 2**31 - 1",
        )
        from tiny_onn.evaluate import run_eval

        # Standard output belongs to the result.
        with contextlib.redirect_stdout(sys.stderr):
            result = run_eval(
                self.model, text=self.text, device=self.device, max_tokens=self.max_tokens
            )
        if self.json:
            print(json.dumps(result, indent=2))
        else:
            _print_table(result)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Write text with a student or a teacher.

    Example: tiny-onn generate runs/mine --prompt "The sea is"
    """

    model: _Model
    """A run folder, a model folder, `embedded`, or a hub id."""
    prompt: str
    """Text to go on from."""
    max_new_tokens: int = 128
    """Tokens to write at most."""
    temperature: float = 0.7
    """Randomness; 0 takes the likeliest token each time."""
    seed: int = 0
    """Seed of the sampling."""

    def __call__(self) -> None:
        """Run the verb."""
        tokens, temperature, seed = self.max_new_tokens, self.temperature, self.seed
        _require(1 <= tokens < 2**31, "--max-new-tokens", tokens, "an integer from 1 to 2**31 - 1")
        accepted = temperature == 0 or MIN_TEMPERATURE <= temperature < math.inf
        _require(accepted, "--temperature", temperature, f"0, or a number >= {MIN_TEMPERATURE}")
        _require(0 <= seed < 2**63, "--seed", seed, "an integer from 0 to 2**63 - 1")
        from tiny_onn.generate import run_generate

        run_generate(
            self.model,
            prompt=self.prompt,
            max_new_tokens=tokens,
            temperature=temperature,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Print every setting with its meaning, as a TOML file that `distill` reads.

    Example: tiny-onn config --preset model-card > RUN.toml
    """

    run: _Run = None
    """Settings to complete and check."""
    preset: _Preset = None
    """Settings to start from; with RUN.toml, the file's win."""
    overrides: _Overrides = ()
    """One setting, over preset and file."""

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.settings import config_template, load_config

        print(config_template(load_config(self.run, self.preset, self.overrides)), end="")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for a user's mistake, 130 for Ctrl-C.

    Args:
        argv: The arguments, without the program's name; by default the process's own.

    Raises:
        SystemExit: From the parser, after help (0) or a malformed command line (2).
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments == ["--version"]:
        print(f"tiny-onn {version('tiny-onn')}")
        return 0
    verb = tyro.cli(
        Demo | Plan | Distill | Eval | Generate | Config,
        prog="tiny-onn",
        description="Turn a dense language model into many ultra-light experts, by"
        " distillation.\n\nExample: tiny-onn demo",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        return _run(verb)
    except KeyboardInterrupt:
        print("tiny-onn: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has left (`tiny-onn config | head`); keep the interpreter's own flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(verb: Callable[[], None]) -> int:
    from tiny_onn.errors import UserError, reason_line

    try:
        verb()
        sys.stdout.flush()
    except UserError as error:
        print(f"tiny-onn: error: {reason_line(error)}", file=sys.stderr)
        return 2
    return 0


def _default_out(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _require(accepted: bool, name: str, value: int | float, expected: str) -> None:
    from tiny_onn.errors import UserError

    if not accepted:
        raise UserError(f"{name}: got {value}, expected {expected}; leave it out for the default")


def _print_table(result: Mapping[str, object], prefix: str = "") -> None:
    for key, value in result.items():
        if isinstance(value, Mapping):
            _print_table(value, f"{prefix}{key}.")
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{prefix + key:40} {shown}")


if __name__ == "__main__":
    sys.exit(main())
