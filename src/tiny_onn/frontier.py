"""The verb `eval` at several budgets: quality against FFN FLOPs from one student."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from rich.table import Table

from tiny_onn.budgets import set_budget
from tiny_onn.charts import Line, line_plot, page
from tiny_onn.console import say, stage
from tiny_onn.errors import UserError
from tiny_onn.evaluate import EvalOptions, evaluate, load_for_eval
from tiny_onn.modeling import TinyOnnForCausalLM
from tiny_onn.run_folder import write_json

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
        with stage(f"Evaluating with {budget:g} experts a token"):
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


def frontier_table(found: Mapping[str, Any]) -> Table:
    """One row per budget."""
    table = Table(title=f"{found['model']} on {found['text']}")
    for name in ("budget", "mean k", "FFN MFLOPs", "of dense", "KL", "agreement", "perplexity"):
        table.add_column(name, justify="right")
    for point in found["points"]:
        table.add_row(
            f"{point['budget']:g}",
            f"{point['mean_k']:.2f}",
            f"{point['ffn_flops'] / 1e6:.1f}",
            f"{point['ffn_flops'] / point['dense_ffn_flops']:.1%}",
            f"{point['forward_kl']:.4f}",
            f"{point['top1_agreement']:.1%}",
            f"{point['student_perplexity']:.2f}",
        )
    return table


def html_page(found: Mapping[str, Any]) -> str:
    """A self-contained page: KL and perplexity against FFN FLOPs."""
    points = found["points"]

    def line(name: str) -> Line:
        return Line(
            "student",
            [(p["ffn_flops"] / 1e6, p[name], f"k = {p['mean_k']:.1f}") for p in points],
        )

    cost = "FFN MFLOPs per token"
    pictures = [
        line_plot("Distance to the teacher", cost, "KL, nats", [line("forward_kl")]),
        line_plot("Perplexity", cost, "perplexity", [line("student_perplexity")]),
    ]
    teacher = points[0]
    about = (
        f"{found['model']} on {teacher['num_tokens']:,} tokens of {found['text']}; the teacher's "
        f"perplexity is {teacher['teacher_perplexity']:.2f} at "
        f"{teacher['dense_ffn_flops'] / 1e6:.1f} FFN MFLOPs per token."
    )
    return page("One student at several budgets", [about], pictures)
