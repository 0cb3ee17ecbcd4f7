"""The verb `eval` at several budgets: quality against FFN FLOPs from one student."""

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

# Shares of the experts.
SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)


def run_frontier(
    model: str, *, budgets: Sequence[float], out: Path, **options: Unpack[EvalOptions]
) -> dict[str, Any]:
    """Evaluate a student at several budgets; write `frontier.json` and `frontier.html`.

    Args:
        model: a run folder or a student's folder.
        budgets: mean numbers of active experts a token; none: shares of all, from 1 to 1/8.
        out: a folder for the results; made if missing.
        options: see `EvalOptions`.

    Raises:
        UserError: no such model or text, or a budget that it cannot run at.
    """
    loaded, held_out, source = load_for_eval(model, **options)
    student = loaded.student
    budgets = budgets or default_budgets(student)
    for budget in budgets:
        # All are checked before the first is measured.
        set_budget(student, budget)
    points = []
    for budget in budgets:
        with status(f"Evaluating with {budget:g} experts a token"):
            set_budget(student, budget)
            result = evaluate(student, held_out, loaded.config.loss)
        points.append({"budget": float(budget), **result.as_dict()})
    found = {
        "model": model,
        "step": loaded.step,
        "teacher": loaded.config.teacher.path,
        "text": source,
        "num_experts": student.config.num_experts,
        "points": points,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "frontier.json", found)
        (out / "frontier.html").write_text(html_page(found), encoding="utf-8")
        say(f"{out}: frontier.json and frontier.html")
    except OSError as error:
        raise UserError(
            f"--out: got {out}, expected a folder to write to ({error.strerror}); choose another"
        ) from error
    return found


def default_budgets(student: TinyOnnForCausalLM) -> list[float]:
    """All experts and falling shares of them, in whole numbers."""
    config = student.config
    num_experts, least = config.num_experts, config.routing_rule().num_shared + 1
    return sorted({float(max(least, round(num_experts * share))) for share in SHARES}, reverse=True)
