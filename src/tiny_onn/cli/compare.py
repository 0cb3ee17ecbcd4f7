"""The verb `compare`."""

import math
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from tiny_onn.cli.arguments import Json, Runs, require, require_runs


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Rank runs by held-out KL at equal compute, and show how their settings differ.

    Example: tiny-onn compare runs/a runs/b --markdown

    Compute is equal if tokens use the same mean number of experts. A run that was measured at
    several numbers (`tiny-onn eval RUN --frontier --out RUN`) is read at exactly the number of the
    other runs.
    """

    runs: Runs
    k: Annotated[
        float | None,
        arg(
            metavar="K",
            help="Mean number of active experts per token at which to compare. By default it is"
            " that of one of the runs' last evaluations: the one at which most runs can be read,"
            " and among several such the nearest to the first run's.",
            help_behavior_hint="(optional)",
        ),
    ] = None
    json: Json = False
    markdown: Annotated[bool, arg(help_behavior_hint="(default: off)")] = False
    """Print a Markdown table and nothing else."""

    def __call__(self) -> None:
        """Run the verb."""
        from tiny_onn.errors import UserError

        if self.json and self.markdown:
            raise UserError("--markdown: got --json too, expected one of them; leave one out")
        accepted = self.k is None or 0 < self.k < math.inf
        require(accepted, "--k", self.k or 0, "a number of experts above 0")
        require_runs(self.runs)
        from tiny_onn.studies.report import print_comparison, run_compare

        found = run_compare(self.runs, self.k)
        if self.json:
            print(found.as_json())
        elif self.markdown:
            print(found.markdown(), end="")
        else:
            print_comparison(found)
