"""A table and a page of a student's quality and compute at several budgets."""

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.text import Text

from tiny_onn.report.charts import Line, line_plot, page
from tiny_onn.report.comparing import mflops
from tiny_onn.report.evaluation import shown_between, shown_interval
from tiny_onn.report.exact_k import EQUAL_K
from tiny_onn.report.terminal import add_numbers, drop_empty_columns, narrow_table


def frontier_tables(frontier: Mapping[str, Any]) -> Group:
    """Return two tables with one row per budget, as deployed and at exactly that mean k."""
    deployed = narrow_table(Text(f"{frontier['model']} on {frontier['text']}, as deployed"))
    exactly = narrow_table(Text("At exactly k"))
    quality = ("KL", "95 %", "agree", "perplexity")
    # The breaks and the short name let the row fit into 80 characters.
    add_numbers(deployed, ("budget", "k", "FFN\nMFLOPs", "of\ndense", *quality))
    add_numbers(exactly, ("k", *quality))
    exact = {found["mean_k"]: found for found in frontier["exact"]}
    for point in frontier["points"]:
        budget = f"{point['budget']:g}"
        deployed.add_row(
            budget,
            f"{point['mean_k']:.2f}",
            mflops(point["ffn_flops"]),
            f"{point['ffn_flops'] / point['dense_ffn_flops']:.1%}",
            *_quality(point),
        )
        if (found := _exact_for(point["budget"], exact)) is not None:
            exactly.add_row(budget, *_quality(found))
    lines = [shown_between(found) for found in frontier["exact"] if len(found["between"]) > 1]
    tables = [table for table in (deployed, exactly) if table.row_count]
    for table in tables:
        drop_empty_columns(table)
    return Group(*tables, *(Text(line) for line in lines))


def _exact_for(budget: float, exact: Mapping[float, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    near = [k for k in exact if math.isclose(k, budget, rel_tol=EQUAL_K)]
    return exact[near[0]] if near else None


def _quality(numbers: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return (
        f"{numbers['forward_kl']:.4f}",
        shown_interval(numbers["intervals"]["forward_kl"], "{:.4f}"),
        f"{numbers['top1_agreement']:.1%}",
        f"{numbers['student_perplexity']:.2f}",
    )


def html_page(frontier: Mapping[str, Any]) -> str:
    """Return a self-contained page with KL and perplexity over FFN FLOPs."""
    points = frontier["points"]

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
    teacher, stored_as = points[0], frontier.get("experts_stored_as")
    held = "" if stored_as is None else f" with experts in {stored_as}"
    description = (
        f"{frontier['model']}{held} on {teacher['num_tokens']:,} tokens of {frontier['text']}; the"
        f" teacher's perplexity is {teacher['teacher_perplexity']:.2f} at "
        f"{teacher['dense_ffn_flops'] / 1e6:.1f} FFN MFLOPs per token."
    )
    return page("One student at several budgets", [description], pictures)
