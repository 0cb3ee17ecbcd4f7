"""The verb `demo`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from tiny_onn.cli.arguments import default_out, starting


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Convert and distill the embedded teacher on embedded text, and compare it with two controls.

    Example: tiny-onn demo

    The demo needs no network and takes its settings from the preset demo.
    """

    out: Annotated[
        Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: runs/demo-TIME)")
    ] = None
    """Folder to write the runs to."""
    overrides: Annotated[
        UseAppendAction[tuple[str, ...]], arg(name="set", metavar="SECTION.KEY=VALUE")
    ] = ()
    """Value of one setting, which overrides the preset."""

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.config.read import load_config

        # A mistake in the settings is reported before torch is imported, which takes seconds.
        load_config(None, "demo", self.overrides)
        with starting():
            from tiny_onn.studies.demo import run_demo

        run_demo(default_out("demo") if self.out is None else self.out, self.overrides)
