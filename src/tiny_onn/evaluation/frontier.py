"""The verb `eval` at several budgets: one student's quality as a function of its FFN FLOPs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from tiny_onn.console import say, status
from tiny_onn.errors import UserError
from tiny_onn.evaluation.compare import evaluate
from tiny_onn.evaluation.evaluate import EvalOptions, load_for_eval
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.report.frontier import html_page
from tiny_onn.routing.budgets import set_budget
from tiny_onn.runs.files import write_json

# The default budgets, as shares of the number of experts.
SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)


def run_frontier(
    model: str, *, budgets: Sequence[float], out: Path, **options: Unpack[EvalOptions]
) -> dict[str, Any]:
    """Evaluate a student at several budgets, and write `frontier.json` and `frontier.html`.

    Args:
        model: a run folder or a student's folder.
        budgets: mean numbers of active experts per token; empty: `default_budgets`.
        out: the folder for the results, which is created if it is missing.
        options: see `EvalOptions`.

    Raises:
        UserError: there is no such model or text, or the student cannot run at a budget.
    """
    loaded, held_out, source = load_for_eval(model, **options)
    student = loaded.student
    budgets = budgets or default_budgets(student)
    for budget in budgets:
        # All budgets are checked before the first one is measured, which takes long.
        set_budget(student, budget)
    points = []
    for budget in budgets:
        with status(f"Evaluating with {budget:g} experts per token"):
            set_budget(student, budget)
            result = evaluate(student, held_out, loaded.config.loss)
        points.append({"budget": float(budget), **result.as_dict()})
    frontier = {
        "model": model,
        "step": loaded.step,
        "teacher": loaded.config.teacher.path,
        "text": source,
        "num_experts": student.config.num_experts,
        "points": points,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "frontier.json", frontier)
        (out / "frontier.html").write_text(html_page(frontier), encoding="utf-8")
        say(f"{out}: frontier.json and frontier.html")
    except OSError as error:
        raise UserError(
            f"--out: got {out}, expected a folder to write to ({error.strerror}); choose another"
        ) from error
    return frontier


def default_budgets(student: TinyOnnForCausalLM) -> list[float]:
    """Return the number of all experts and falling shares of it (`SHARES`), in whole numbers."""
    config = student.config
    num_experts, least = config.num_experts, config.routing_rule().num_shared + 1
    return sorted({float(max(least, round(num_experts * share))) for share in SHARES}, reverse=True)
