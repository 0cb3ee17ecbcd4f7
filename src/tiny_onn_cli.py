"""The command line: parse, call, print.

Every verb is a dataclass whose fields are its arguments. A verb imports what it calls only after
its arguments and settings are checked: torch and transformers take seconds to load, and help,
`config` and mistakes answer without them.
"""

# ruff: noqa: PLC0415

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional, UseAppendAction, arg

if TYPE_CHECKING:
    from tiny_onn.config.schema import RunConfig

_Run = Annotated[Positional[Path | None], arg(metavar="RUN.toml", help_behavior_hint="(optional)")]
_Preset = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(optional)")]
_Overrides = Annotated[
    UseAppendAction[tuple[str, ...]], arg(name="set", metavar="SECTION.KEY=VALUE")
]
_Out = Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(runs/NAME-TIME)")]
_Results = Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(runs/VERB-TIME)")]
_Budget = Annotated[str | None, arg(metavar="K,K", help_behavior_hint="(as trained)")]
_Model = Annotated[Positional[str], arg(metavar="MODEL")]
_Checkpoint = Annotated[str, arg(metavar="newest|best|STEP")]
_Runs = Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN")]
_Teacher = Annotated[
    str | None, arg(metavar="PATH_OR_HUB_ID", help_behavior_hint="(where it was recorded)")
]


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
        from tiny_onn.config.read import load_config

        # A mistake in the settings is told before torch is imported.
        load_config(None, "demo", self.overrides)
        with _starting():
            from tiny_onn.studies.demo import run_demo

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
        from tiny_onn.config.read import load_config

        tokens = () if self.tokens is None else (f"train.tokens={self.tokens}",)
        config = load_config(self.run, self.preset, (*self.overrides, *tokens))
        from rich.console import Console

        with _starting():
            from tiny_onn.planning.plan import DOCUMENT_TOKENS, EFFICIENCY, plan
            from tiny_onn.planning.render import render

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
    """Go on with the run in --out. Without RUN.toml or --preset its own settings hold, changed by
    --set."""
    allow_change: Annotated[
        UseAppendAction[tuple[str, ...]], arg(name="allow-change", metavar="SECTION.KEY")
    ] = ()
    """A setting that may differ from the run's when it goes on."""
    profile: bool = False
    """Run six steps, show where the time of the last three goes, and end without a checkpoint."""

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.config.read import load_config
        from tiny_onn.errors import UserError

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
        if self.resume and self.out is not None:
            config = self._resumed(self.out, named=named)
        else:
            config = load_config(self.run, self.preset, self.overrides)
        name = self.run.stem if self.run is not None else str(self.preset)
        out = _default_out(name) if self.out is None else self.out
        if self.profile:
            with _starting():
                from tiny_onn.distill.profile import run_profile

            run_profile(config, out=out, argv=sys.argv)
            return
        with _starting():
            from tiny_onn.distill.loop import run_distill

        result = run_distill(
            config, out=out, resume=self.resume, allow_change=self.allow_change, argv=sys.argv
        )
        if result.interrupted:
            print(
                f"tiny-onn: saved; go on with `tiny-onn distill --resume --out {out}`",
                file=sys.stderr,
            )
            raise KeyboardInterrupt

    def _resumed(self, out: Path, *, named: bool) -> "RunConfig":
        from tiny_onn.config.changes import (
            check_changes,
            with_absolute_paths,
            with_number_format_of,
        )
        from tiny_onn.config.read import load_config, override
        from tiny_onn.runs.folder import read_run_config

        began = read_run_config(out)
        config = (
            load_config(self.run, self.preset, self.overrides)
            if named
            else override(began, self.overrides)
        )
        # The run checks it too; here it is told before torch is imported.
        after = with_absolute_paths(with_number_format_of(began, config))
        check_changes(with_absolute_paths(began), after, self.allow_change)
        return config


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure a student's quality and cost against its teacher.

    Example: tiny-onn eval runs/mine --json > eval.json
    """

    model: _Model
    """A run folder, or the folder of a converted model."""
    checkpoint: _Checkpoint = "newest"
    """Which of a run's students: the newest, the best by held-out KL, or that of a step."""
    teacher: _Teacher = None
    """The model that the student was converted from, if it has moved since."""
    text: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(held-out text)")] = None
    """Text to measure on, a file or a folder."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    max_tokens: int = 8192
    """Tokens to read at most."""
    budget: _Budget = None
    """Mean active experts a token to run the student at; several, as 24,16,8, give a table."""
    frontier: bool = False
    """Measure at several budgets, from all experts to an eighth of them."""
    out: _Results = None
    """Folder for a frontier's JSON and picture."""
    json: bool = False
    """Print JSON and nothing else."""

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.config.checks import check_device

        check_device(self.device, "--device")
        _require(
            1 <= self.max_tokens < 2**31,
            "--max-tokens",
            self.max_tokens,
            "an integer from 1 to 2**31 - 1",
        )
        if self.frontier or self.budget is not None:
            self._frontier()
            return
        with _starting():
            from tiny_onn.evaluation.evaluate import run_eval

        # Standard output belongs to the result.
        with contextlib.redirect_stdout(sys.stderr):
            result = run_eval(
                self.model,
                text=self.text,
                device=self.device,
                max_tokens=self.max_tokens,
                checkpoint=self.checkpoint,
                teacher=self.teacher,
            )
        if self.json:
            print(json.dumps(result, indent=2))
        else:
            _print_table(result)

    def _frontier(self) -> None:
        from tiny_onn.config.checks import parse_budgets
        from tiny_onn.errors import UserError

        if self.frontier and self.budget is not None:
            raise UserError("--frontier: got --budget too, expected one of them; leave one out")
        budgets = () if self.budget is None else parse_budgets(self.budget)
        from rich.console import Console

        with _starting():
            from tiny_onn.evaluation.frontier import run_frontier
            from tiny_onn.report.frontier import frontier_table

        with contextlib.redirect_stdout(sys.stderr):
            result = run_frontier(
                self.model,
                budgets=budgets,
                text=self.text,
                device=self.device,
                max_tokens=self.max_tokens,
                out=_default_out("frontier") if self.out is None else self.out,
                checkpoint=self.checkpoint,
                teacher=self.teacher,
            )
        if self.json:
            print(json.dumps(result, indent=2))
        else:
            Console().print(frontier_table(result))


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Hold every surprise against leave-one-out truth: which experts does a token need?

    Example: tiny-onn probe embedded --layers 4,15,26

    Costs as many forward passes of the text as there are experts, through the layers from each
    probed one up. What was measured is written to probe.json after every tenth of the documents, so
    that an interrupted probe keeps it (with "complete": false).
    """

    model: _Model
    """A run folder (in the middle of training too), a student's folder, `embedded`, the folder of a
    dense model or a hub id; a dense model is converted with all experts on."""
    checkpoint: _Checkpoint = "newest"
    """Which of a run's students: the newest, the best by held-out KL, or that of a step."""
    teacher: _Teacher = None
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
    out: _Results = None
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
            _require(value >= least, name, value, f"an integer >= {least}")
        layers = _parse_layers(self.layers)
        with _starting():
            from tiny_onn.probe.probe import run_probe

        with contextlib.redirect_stdout(sys.stderr):
            result = run_probe(
                self.model,
                out=_default_out("probe") if self.out is None else self.out,
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


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML page that shows what runs did; it needs no network.

    Example: tiny-onn report runs/mine runs/static

    A held-out passage token by token, and which experts work together, need the student: it is
    loaded once, and the run's view.json keeps what was measured. Where it cannot be loaded, the
    page says so. Controls (router.selection = "static" or "random") are given beside their run.
    """

    runs: _Runs
    """Run folders, in the middle of training too, or folders of such as the demo makes."""
    teacher: _Teacher = None
    """The model that the students were converted from, if it has moved since."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    skip_models: bool = False
    """Load no models: the page shows what the runs recorded."""
    out: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(report.html in the runs' folder)")
    ] = None
    """The page."""

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.config.checks import check_device

        check_device(self.device, "--device")
        _require_runs(self.runs)
        with _starting():
            from tiny_onn.studies.report import run_report

        # Standard output belongs to the result.
        with contextlib.redirect_stdout(sys.stderr):
            page = run_report(
                self.runs,
                out=self.out,
                device=self.device,
                teacher=self.teacher,
                models=not self.skip_models,
            )
        print(page)


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Print runs by their held-out KL at equal compute, with what differs in their settings.

    Example: tiny-onn compare runs/a runs/b --markdown

    A run with a frontier.json (`tiny-onn eval RUN --frontier --out RUN`) is read at exactly the
    mean number of active experts of the others.
    """

    runs: _Runs
    """Run folders, or folders of such as the demo makes."""
    k: Annotated[
        float | None, arg(metavar="K", help_behavior_hint="(what most runs can be read at)")
    ] = None
    """Mean active experts a token to compare at."""
    json: bool = False
    """Print JSON and nothing else."""
    markdown: bool = False
    """Print a Markdown table and nothing else."""

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.errors import UserError

        _require_runs(self.runs)
        if self.json and self.markdown:
            raise UserError("--markdown: got --json too, expected one of them; leave one out")
        accepted = self.k is None or 0 < self.k < math.inf
        _require(accepted, "--k", self.k or 0, "a number of experts above 0")
        with _starting():
            from tiny_onn.studies.report import run_compare

        found = run_compare(self.runs, self.k)
        if self.json:
            print(found.as_json())
        elif self.markdown:
            print(found.markdown(), end="")
        else:
            from tiny_onn.studies.report import print_comparison

            print_comparison(found)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Write text with a student or a teacher.

    Example: tiny-onn generate runs/mine --prompt "The sea is"
    """

    model: _Model
    """A run folder, a model folder, `embedded`, or a hub id."""
    checkpoint: _Checkpoint = "newest"
    """Which of a run's students: the newest, the best by held-out KL, or that of a step."""
    teacher: _Teacher = None
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
        _require(1 <= tokens < 2**31, "--max-new-tokens", tokens, "an integer from 1 to 2**31 - 1")
        accepted = temperature == 0 or MIN_TEMPERATURE <= temperature < math.inf
        _require(accepted, "--temperature", temperature, f"0, or a number >= {MIN_TEMPERATURE}")
        _require(0 <= seed < 2**63, "--seed", seed, "an integer from 0 to 2**63 - 1")
        with _starting():
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
        from tiny_onn.config.read import load_config
        from tiny_onn.config.template import config_template

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
        from importlib.metadata import version

        print(f"tiny-onn {version('tiny-onn')}")
        return 0
    verb = tyro.cli(
        Demo | Plan | Distill | Eval | Probe | Report | Compare | Generate | Config,
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


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Show that something happens while torch is imported, which takes seconds, and set it up."""
    from tiny_onn.console import console, stage

    with stage("Starting") if console().is_terminal else contextlib.nullcontext():
        yield
        from tiny_onn.teacher.load import quiet_transformers

        quiet_transformers()


def _default_out(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _parse_layers(text: str | None) -> list[int]:
    from tiny_onn.errors import UserError

    parts = [] if text is None else text.split(",")
    for part in parts:
        if not (part.strip().isascii() and part.strip().isdigit()):
            raise UserError(f"--layers: got {text}, expected integers with commas; as 4,15,26")
    return [int(part) for part in parts]


def _require_runs(runs: Sequence[Path]) -> None:
    from tiny_onn.errors import UserError

    if not runs:
        raise UserError(
            "RUN: got none, expected the folder of a run or several; for example runs/mine"
        )


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
