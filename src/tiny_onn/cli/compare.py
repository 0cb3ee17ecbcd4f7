"""The verb `compare`."""

import math
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from tiny_onn.cli.arguments import Runs, require, require_runs, starting


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Print runs by their held-out KL at equal compute, with what differs in their settings.

    Example: tiny-onn compare runs/a runs/b --markdown

    A run with a frontier.json (`tiny-onn eval RUN --frontier --out RUN`) is read at exactly the
    mean number of active experts of the others.
    """

    runs: Runs
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

        require_runs(self.runs)
        if self.json and self.markdown:
            raise UserError("--markdown: got --json too, expected one of them; leave one out")
        accepted = self.k is None or 0 < self.k < math.inf
        require(accepted, "--k", self.k or 0, "a number of experts above 0")
        with starting():
            from tiny_onn.studies.report import run_compare

        found = run_compare(self.runs, self.k)
        if self.json:
            print(found.as_json())
        elif self.markdown:
            print(found.markdown(), end="")
        else:
            from tiny_onn.studies.report import print_comparison

            print_comparison(found)
