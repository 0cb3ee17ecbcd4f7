"""A table and a page of a student's quality and compute at several budgets."""

import math
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tiny_onn.report.charts import Line, line_plot, page
from tiny_onn.report.comparing import mflops
from tiny_onn.report.evaluation import shown_between, shown_interval
from tiny_onn.report.exact_k import EQUAL_K


def frontier_table(frontier: Mapping[str, Any]) -> Group:
    """Return a table with one row per budget, as deployed and at exactly that mean k."""
    table = Table(title=Text(f"{frontier['model']} on {frontier['text']}"), box=SIMPLE_HEAD)
    table.add_column("budget", justify="right")
    for name in (
        *("k", "FFN MFLOPs", "of dense", "KL", "95 %", "agreement", "perplexity"),
        *("KL at exactly k", "95 %", "agreement", "perplexity"),
    ):
        table.add_column(name, justify="right", overflow="fold")
    exact = {found["mean_k"]: found for found in frontier["exact"]}
    for point in frontier["points"]:
        table.add_row(
            f"{point['budget']:g}",
            f"{point['mean_k']:.2f}",
            mflops(point["ffn_flops"]),
            f"{point['ffn_flops'] / point['dense_ffn_flops']:.1%}",
            *_quality(point),
            *_quality(_exact_for(point["budget"], exact)),
        )
    lines = [shown_between(found) for found in frontier["exact"] if len(found["between"]) > 1]
    return Group(table, *(Text(line) for line in lines))


def _exact_for(budget: float, exact: Mapping[float, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    near = [k for k in exact if math.isclose(k, budget, rel_tol=EQUAL_K)]
    return exact[near[0]] if near else None


def _quality(numbers: Mapping[str, Any] | None) -> tuple[str, str, str, str]:
    if numbers is None:
        return ("", "", "", "")
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
