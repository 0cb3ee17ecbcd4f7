"""The verb `distill`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from tiny_onn.cli.arguments import Out, Overrides, Preset, RunToml, default_out, starting
from tiny_onn.config.schema import RunConfig


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Convert a dense model and train its experts and gates to match it.

    Example: tiny-onn distill RUN.toml --set optim.expert_lr=1e-4 --out runs/mine

    To list all settings with their meanings and defaults, as a RUN.toml to start from, use
    the verb config: `tiny-onn config`.
    """

    run: RunToml = None
    preset: Preset = None
    overrides: Overrides = ()
    out: Out = None
    resume: Annotated[
        bool,
        arg(
            help="Resume the run in --out from its newest checkpoint. Without RUN.toml and --preset"
            " the run keeps its own settings; --set changes one that --allow-change names too.",
            help_behavior_hint="(default: off)",
        ),
    ] = False
    allow_change: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            name="allow-change",
            metavar="SECTION.KEY",
            help="A setting that a resumed run may change.",
        ),
    ] = ()
    track: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            metavar="NAME",
            help="Write the run's records to an experiment tracker too: tensorboard (into the run's"
            " folder), wandb, mlflow or trackio, each of which must be installed. A resumed run"
            " goes on in the trackers that it had. docs/watching.md says more.",
            help_behavior_hint="(default: none)",
        ),
    ] = ()
    profile: Annotated[
        bool,
        arg(
            help="Run six steps, show where the time of the last three goes, and write no"
            " checkpoint.",
            help_behavior_hint="(default: off)",
        ),
    ] = False

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.config.launcher import check_launcher, is_first, num_processes
        from tiny_onn.config.read import load_config

        check_launcher()
        self._check()
        from tiny_onn.runs.trackers import check_trackers

        check_trackers(self.track)
        if self.resume and self.out is not None:
            config = self._resumed(self.out)
        else:
            config = load_config(self.run, self.preset, self.overrides)
        name = self.run.stem if self.run is not None else str(self.preset)
        out = default_out(name) if self.out is None else self.out
        if self.profile:
            with starting():
                from tiny_onn.distill.profile import run_profile

            run_profile(config, out=out, argv=sys.argv)
            return
        # Several processes decide together, because a file may appear to some of them later.
        if self.resume and num_processes() == 1 and self._nothing_to_do(out, config):
            return
        with starting():
            from tiny_onn.console import say
            from tiny_onn.distill.loop import run_distill
            from tiny_onn.parallel import World
            from tiny_onn.runs.checkpoint import valid_checkpoints
            from tiny_onn.runs.folder import resume_command, was_begun_by

        with World.from_environment(config.train.device) as world:
            # A launcher starts the same command again after a process has failed. A run that it
            # found in the folder is not resumed unasked.
            begun = world.any_true(world.first and was_begun_by(world.launch, out))
            resume = self.resume or begun
            if world.any_true(world.first and resume and self._nothing_to_do(out, config)):
                return
            way_on = f"`{resume_command(out)}`"
            try:
                result = run_distill(
                    config,
                    out=out,
                    resume=resume,
                    allow_change=self.allow_change,
                    track=self.track,
                    argv=sys.argv,
                    world=world,
                )
            except KeyboardInterrupt:
                if is_first() and (out / "config.json").is_file():
                    saved = valid_checkpoints(out / "checkpoints")
                    what = "goes on from the last checkpoint" if saved else "starts the run again"
                    say(f"tiny-onn: {way_on} {what}")
                raise
        if result.interrupted and is_first():
            say(f"tiny-onn: the run is saved; resume it with {way_on}")
        if result.interrupted:
            raise KeyboardInterrupt
        if is_first():
            say(
                f"tiny-onn: the student is {out / 'student'}; `tiny-onn report {out}` shows the run"
            )

    @property
    def _named(self) -> bool:
        """True if the settings of a file or of a preset are to be used."""
        return self.run is not None or self.preset is not None

    def _check(self) -> None:
        """Refuse arguments that do not go together, or not with several processes."""
        from tiny_onn.config.launcher import num_processes
        from tiny_onn.errors import UserError

        if self.resume and self.out is None:
            raise UserError(
                "--resume: got no --out, expected the folder of the run to resume; add --out FOLDER"
            )
        if self.resume and self.profile:
            raise UserError(
                "--profile: got --resume, expected a new run folder; leave out --resume"
            )
        if self.allow_change and not self.resume:
            raise UserError(
                "--allow-change: got no --resume, expected a run to resume; add --resume"
            )
        if not self._named and not self.resume:
            raise UserError(
                "distill: got neither RUN.toml nor --preset, expected one; try --preset demo, or"
                " write a file with `tiny-onn config > RUN.toml`"
            )
        if (number := num_processes()) > 1 and (self.out is None or self.profile):
            got, remedy = (
                ("--profile", "profile one process, without a launcher")
                if self.profile
                else ("no --out", "add --out FOLDER, by which all of them name the run")
            )
            raise UserError(f"distill: got {got} with {number} processes; {remedy}")

    def _resumed(self, out: Path) -> "RunConfig":
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
            if self._named
            else override(began, self.overrides)
        )
        # The run checks the changes too; here a mistake is reported before torch is imported.
        after = with_absolute_paths(with_number_format_of(began, config))
        check_changes(with_absolute_paths(began), after, self.allow_change)
        return config

    def _nothing_to_do(self, out: Path, config: "RunConfig") -> bool:
        """Return True if the run has finished, and say so, with how to train it further."""
        from tiny_onn.console import say
        from tiny_onn.runs.folder import finished_tokens, resume_command

        tokens = finished_tokens(out, config)
        # A tracker that is named now gets the records of a finished run.
        if tokens is None or self.track:
            return False
        # The last step may have read more tokens than were asked for.
        least = tokens - config.train.blockwise_tokens
        longer = (
            f"to train it further, use `{resume_command(out)} --set train.tokens=N"
            f" --allow-change train.tokens` with N above {least:,}"
            if any((out / "checkpoints").glob("step-*"))
            else "it cannot be trained further, because its checkpoints are gone"
        )
        say(
            f"tiny-onn: the run has finished after {tokens:,} tokens, and its student is"
            f" {out / 'student'}; {longer}"
        )
        return True
