"""Draw KL against training tokens from the records of `experiments/arms.py`."""

import itertools
from collections.abc import Sequence
from typing import Any

from experiments.arms_law import law_of
from experiments.arms_table import RECIPES, best_runs, has_diverged

ARMS = {
    "smk": "SMK: the gate learns",
    "frozen ridge gate": "frozen ridge gate: it does not",
    "half-width": "half-width: pruned, no experts",
    "static choice": "static choice: same experts for all",
    "model card's rule": "model card's rule",
}
SHAPES = ("circle", "triangle-up")
DASHES = ([1, 0], [4, 4])


def tokens_chart(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Draw a dot for each run's end, and a line for the law of arms with several lengths.

    Args:
        records: the study's records with the target of half of the experts.
    """
    dots, lines = [], []
    for (base, name), (recipe, how) in itertools.product(ARMS.items(), RECIPES.items()):
        arm, labels = base + recipe, {"arm": name, "recipe": how}
        for tokens in sorted({r["tokens"] for r in records if r["arm"] == arm}):
            dots += [
                {**labels, "tokens": tokens, "kl": digits(run["report"]["kl_at_k"])}
                for run in best_runs(records, tokens, arm)
                if not has_diverged(run, records)
            ]
        law = law_of(records, arm)
        if law is not None:
            lengths = [tokens for tokens, _ in law.points]
            ends = (min(lengths), max(lengths))
            lines += [{**labels, "tokens": t, "kl": digits(law.at(t))} for t in ends]
    shown = [name for name in ARMS.values() if any(dot["arm"] == name for dot in dots)]
    ticks = sorted({dot["tokens"] for dot in dots})
    values = [row["kl"] for row in dots]
    encoding = {
        "x": {
            "field": "tokens",
            "type": "quantitative",
            "title": "training tokens, each run with its whole schedule",
            "scale": {"type": "log", "domain": [ticks[0] / 1.3, ticks[-1] * 1.3]},
            "axis": {
                "values": ticks,
                "labelExpr": "format(datum.value / 1e6, '.2~r') + 'M'",
                "labelOverlap": False,
                "tickCount": 40,
            },
        },
        "y": {
            "field": "kl",
            "type": "quantitative",
            "title": "KL to the teacher at k = 16, nats",
            "scale": {"type": "log", "domain": [min(0.05, *values), max(0.5, *values)]},
            "axis": {
                "values": [0.05, 0.1, 0.2, 0.3, 0.5, 1, 2],
                "labelOverlap": False,
                "tickCount": 40,
            },
        },
        "color": {
            "field": "arm",
            "type": "nominal",
            "scale": {"domain": shown},
            "legend": {"title": None, "labelLimit": 260},
        },
    }
    of_recipe = {"field": "recipe", "type": "nominal", "legend": {"title": None}}
    shape = {**of_recipe, "scale": {"domain": [*RECIPES.values()], "range": SHAPES}}
    dash = {**of_recipe, "scale": {"domain": [*RECIPES.values()], "range": DASHES}}
    return {
        "width": 380,
        "height": 260,
        "layer": [
            {
                "data": {"values": lines},
                "mark": {"type": "line", "strokeWidth": 1.5},
                "encoding": {**encoding, "strokeDash": dash},
            },
            {
                "data": {"values": dots},
                "mark": {"type": "point", "filled": True, "size": 50, "opacity": 0.85},
                "encoding": {**encoding, "shape": shape},
            },
        ],
    }


def digits(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")
