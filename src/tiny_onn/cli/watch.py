"""The verb `watch`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from tiny_onn.cli.arguments import require


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Follow a run in the terminal: curves, the load of experts, and the verdict on its health.

    Example: tiny-onn watch runs/mine

    The run may train in another process, or not have begun yet, or have ended. It is only read.
    """

    run: Annotated[
        Positional[Path], arg(metavar="RUN", help="The folder of a run, which may not exist yet.")
    ]
    interval: Annotated[
        float, arg(metavar="SECONDS", help="Seconds between two looks at the run's files.")
    ] = 2.0
    once: Annotated[bool, arg(help_behavior_hint="(default: off)")] = False
    """Show the run as it is now, and end."""

    def __call__(self) -> None:
        """Run the verb."""
        accepted = 0 < self.interval < math.inf
        require(accepted, "--interval", self.interval, "a number of seconds above 0")
        from tiny_onn.studies.watch import run_watch

        run_watch(self.run, interval_s=self.interval, once=self.once)
