"""A table and a page of a student's quality and compute at several budgets."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tiny_onn.report.charts import Line, line_plot, page


def frontier_table(frontier: Mapping[str, Any]) -> Table:
    """Return a table with one row per budget."""
    table = Table(title=f"{frontier['model']} on {frontier['text']}")
    for name in ("budget", "mean k", "FFN MFLOPs", "of dense", "KL", "agreement", "perplexity"):
        table.add_column(name, justify="right")
    for point in frontier["points"]:
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
    teacher = points[0]
    description = (
        f"{frontier['model']} on {teacher['num_tokens']:,} tokens of {frontier['text']}; the"
        f" teacher's perplexity is {teacher['teacher_perplexity']:.2f} at "
        f"{teacher['dense_ffn_flops'] / 1e6:.1f} FFN MFLOPs per token."
    )
    return page("One student at several budgets", [description], pictures)
