"""The verb `eval` at several budgets: one student's quality as a function of its FFN FLOPs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from tiny_onn.console import say
from tiny_onn.errors import UserError
from tiny_onn.evaluation.evaluate import SEED, Bench, EvalOptions, load_for_eval
from tiny_onn.evaluation.exact import at_exactly
from tiny_onn.evaluation.measure import Measured
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.report.frontier import html_page
from tiny_onn.runs.files import write_json

# The default budgets, as shares of the number of experts.
SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)


def run_frontier(
    model: str, *, budgets: Sequence[float], out: Path | None, **options: Unpack[EvalOptions]
) -> dict[str, Any]:
    """Evaluate a student at several budgets.

    Args:
        model: a run folder or a student's folder.
        budgets: mean numbers of active experts per token; empty: `default_budgets`.
        out: the folder for `frontier.json` and `frontier.html`, which is created if it is missing;
            None: nothing is written.
        options: see `EvalOptions`.

    Raises:
        UserError: there is no such model or text, or the student cannot run at a budget.
    """
    bench = load_for_eval(model, **options)
    frontier = {"model": model, **measure_frontier(bench, budgets)}
    if out is not None:
        write_frontier(frontier, out)
    return frontier


def measure_frontier(
    bench: Bench, budgets: Sequence[float] = (), exact: Sequence[float] | None = None
) -> dict[str, Any]:
    """Evaluate a student at several budgets, and read its numbers at exactly these mean k.

    Args:
        bench: the student and the text.
        budgets: mean numbers of active experts per token; empty: `default_budgets`.
        exact: the mean k to read the student at; None: those of the budgets.

    Returns:
        The numbers of `Bench.facts`; `points`, one for each budget, with `intervals`; `beside`, the
        further points that were measured to have some around each exact k; and `exact`, the numbers
        at exactly these k, see `exact.at_exactly`, without those that no points lie around.

    Raises:
        UserError: the text cannot be read, or the student cannot run at a budget.
    """
    student = bench.loaded.student
    wanted = [float(k) for k in budgets or default_budgets(student)]
    measured = bench.measure([*wanted])
    asked = wanted if exact is None else [float(k) for k in exact]
    beside = bench.surround(measured, asked)
    found = [at_exactly([*measured, *beside], k, SEED) for k in asked]
    return {
        **bench.facts(),
        "num_experts": student.config.num_experts,
        "points": [_point(point) for point in measured],
        "beside": [_point(point) for point in beside],
        "exact": [numbers for numbers in found if numbers is not None],
    }


def write_frontier(frontier: Mapping[str, Any], out: Path) -> None:
    """Write `frontier.json` and `frontier.html`.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "frontier.json", frontier)
        (out / "frontier.html").write_text(html_page(frontier), encoding="utf-8")
        say(f"{out}: frontier.json and frontier.html")
    except OSError as error:
        raise UserError(
            f"--out: got {out}, expected a folder to write to ({error.strerror}); choose another"
        ) from error


def _point(measured: Measured) -> dict[str, Any]:
    intervals = measured.intervals(SEED)
    return {"budget": measured.budget, **measured.numbers(), "intervals": intervals}


def default_budgets(student: TinyOnnForCausalLM) -> list[float]:
    """Return the number of all experts and falling shares of it (`SHARES`), in whole numbers."""
    config = student.config
    num_experts, least = config.num_experts, config.routing_rule().num_shared + 1
    return sorted({float(max(least, round(num_experts * share))) for share in SHARES}, reverse=True)
