"""The report: one HTML file with everything in it, which needs no network.

Charts are Vega-Lite specifications, drawn by the library's own JavaScript that
`vl_convert.javascript_bundle` hands out; `page.js` gives them the theme's colours and adds what no
chart is: the scrubbing of heatmaps and the token view. The page has no time stamp and no random id,
so that a run's page has the same bytes each time.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from tiny_onn.report import curves, heatmaps, sentences, tables
from tiny_onn.report.run_data import Run
from tiny_onn.report.theme import THEMES, vega_config

FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A chart with what a reader needs to read it.

    Attributes:
        key: names the chart in the page.
        title: what one sees.
        caption: how to read it, and what healthy looks like.
        frames: what each frame of a scrubbed chart is called; none: it is not scrubbed.
    """

    key: str
    title: str
    caption: str
    frames: Sequence[str] = ()


@dataclass(kw_only=True, slots=True)
class Charts:
    """The specifications of a page by key, filled as its figures are made."""

    specs: dict[str, Any] = field(default_factory=dict)

    def add(
        self,
        key: str,
        spec: dict[str, Any] | None,
        title: str,
        caption: str,
        frames: Sequence[str] = (),
    ) -> list[Figure]:
        """The figure of a specification; none of what could not be drawn."""
        if spec is None:
            return []
        self.specs[key] = spec
        return [Figure(key=key, title=title, caption=caption, frames=frames)]


def report_page(runs: Sequence[Run]) -> str:
    """The page about these runs as HTML.

    Args:
        runs: at least one, names distinct.
    """
    charts = Charts()
    training, frontier = _training(charts, runs), _frontier(charts, runs)
    cells = heatmaps.MAX_CELLS // len(runs)
    details = [_details(charts, number, run, cells) for number, run in enumerate(runs)]
    views = {f"tokens-{n}": run.view for n, run in enumerate(runs) if run.view is not None}
    passages = {
        key: {"num_experts": view["num_experts"], **view["passage"]} for key, view in views.items()
    }
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = code
    return environment.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        runs=runs,
        details=details,
        training=training,
        frontier=frontier,
        headline=tables.headline(runs),
        against=sentences.against_controls(runs),
        differences=tables.differences(runs),
        settings=tables.settings(runs),
        provenance=tables.provenance(runs),
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup((FOLDER / "page.js").read_text(encoding="utf-8")),
        library=Markup(library()),
        data=script_json(
            {
                "charts": charts.specs,
                "passages": passages,
                "themes": {theme: vega_config(theme) for theme in THEMES},
            }
        ),
    )


def code(text: str) -> Markup:
    """Escaped text whose parts between backticks are set as code."""
    parts = [escape(part) for part in text.split("`")]
    whole = len(parts) % 2 == 1
    marks = (Markup("<code>"), Markup("</code>")) if whole else (Markup("`"), Markup("`"))
    found = parts[0]
    for number, part in enumerate(parts[1:]):
        found += marks[number % 2] + part
    return found


@cache
def library() -> str:
    """Vega, Vega-Lite and vega-embed as one script that sets `window.vegaEmbed`.

    Raises:
        AssertionError: It could not stand inside a script element.
    """
    text = vl_convert.javascript_bundle()  # pyright: ignore[reportCallIssue] - its stub asks for more
    assert "</script" not in text.lower()
    return text


def script_json(value: object) -> Markup:
    """JSON that can stand inside a script element; numbers that are not finite become null."""
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    escapes = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})
    return Markup(text.translate(escapes))


def _finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _training(charts: Charts, runs: Sequence[Run]) -> list[Figure]:
    """Curves over training, of all runs together."""
    if not any(run.steps for run in runs):
        return []
    losses, states, blocks = (
        {run.name: curves.curve(run.of_kind(kind), name) for run in runs}
        for kind, name in (("step", "loss"), ("step", "states_error"), ("blockwise", "loss"))
    )
    return [
        *charts.add(
            "kl",
            curves.kl_spec(runs),
            "How far the student is from its teacher",
            "The solid line is the KL of each training step on its own text, dots are held-out"
            " text. A healthy run falls steeply at first and then slowly, and the dots follow the"
            " line; dots that rise while the line falls mean overfitting.",
        ),
        *charts.add(
            "k",
            curves.k_spec(runs),
            "How many experts a token gets",
            "The line is the mean over layers and tokens, the band spans the layers' means, the"
            " dashed line is the target. A healthy run stays near its target; layers may differ"
            " where the budget is shared by all of them.",
        ),
        *charts.add(
            "loss",
            curves.line_spec("loss, nats", losses),
            "What is minimised",
            "The distillation loss of each step, in nats a token. It is the KL above unless"
            " another divergence or temperature is set. It should fall without jumps.",
        ),
        *charts.add(
            "states",
            curves.line_spec("unexplained variance", states, format="~%")
            if any(states.values())
            else None,
            "How well hidden states are matched",
            "The share of the teacher's hidden states' variance that the student's leave"
            " unexplained, mean over layers. It is part of the gradient here, and should fall.",
        ),
        *charts.add(
            "blocks",
            curves.line_spec("share of the output's power", blocks, format="~%")
            if any(blocks.values())
            else None,
            "What the blockwise stage leaves",
            "The error of each layer alone, mean over layers, while every layer learns its"
            " teacher's MLP by itself. It should fall and then flatten; the stage may end there.",
        ),
        *charts.add(
            "lr",
            curves.rates_spec(runs),
            "How fast experts and gates learn",
            "The learning rates as the schedule set them: they rise in the warm-up and fall to zero"
            " at the end of a run that finished.",
        ),
    ]


def _frontier(charts: Charts, runs: Sequence[Run]) -> list[Figure]:
    """Quality against compute, of all runs together."""
    return charts.add(
        "frontier",
        curves.frontier_spec(runs),
        "What compute buys",
        "Each point is one budget: to the left is cheaper, lower is closer to the teacher. A"
        " trained gate is worth its name if its line lies below the points of the controls. A run"
        " with one point was measured at its own budget only; `tiny-onn eval RUN --frontier --out"
        " RUN` measures more.",
    )


def _details(charts: Charts, number: int, run: Run, cells: int) -> dict[str, Any]:
    """What the page says and draws about one run alone."""
    load, k = heatmaps.load_frames(run, cells), heatmaps.k_frames(run, cells)
    routing = []
    if load is not None and k is not None:
        routing += charts.add(
            f"load-{number}",
            load.spec,
            "Which experts are used",
            "A row is a layer, a column an expert; the colour is the share of the tokens that used"
            " it. Healthy layers are uneven but mixed. A"
            " row that knows only 0 % and 100 % gives all tokens the same experts; a cell at 0 % is"
            " an expert that nobody uses.",
            load.labels,
        )
        routing += charts.add(
            f"histogram-{number}",
            k.spec,
            "How many experts tokens get, by layer",
            "A row is a layer, a column a number of active experts; the colour is the share of the"
            " tokens with so many. A single column means that every token costs the same. A budget"
            " that follows the token spreads over several.",
            k.labels,
        )
    if run.view is not None:
        pairs = heatmaps.coactivation_frames(run.view)
        routing += charts.add(
            f"pairs-{number}",
            pairs.spec,
            "Which experts work together",
            "The colour is the correlation, over held-out tokens, of two experts of one layer being"
            " active. The diagonal is 1. Blocks of strong colour off the diagonal are teams and"
            " rivals; a table without any is a layer whose experts are chosen one by one.",
            pairs.labels,
        )
    gate = [
        *charts.add(
            f"agreement-{number}",
            curves.agreement_spec(run),
            "Does the gate choose what it is taught?",
            "The share of tokens whose first choice is their target. It means something only above"
            " both other lines: agreement with another token's target is what a gate reaches that"
            " knows which experts are popular and nothing of the token.",
        ),
        *charts.add(
            f"layers-{number}",
            curves.layer_agreement_spec(run),
            "The same by layer",
            "Dots are the agreement of each layer's gate in the newest record, ticks are what it"
            " reaches with another token's targets. A dot at or below its tick is a gate that knows"
            " nothing of the token.",
        ),
        *charts.add(
            f"surprise-{number}",
            heatmaps.surprise_spec(run),
            "Where surprise is",
            "The mean surprise of each expert over the tokens of the newest record that holds it,"
            " in the units of the objective. A table that is the same everywhere teaches nothing; a"
            " single loud row drowns the other layers.",
        ),
    ]
    return {
        "key": f"run-{number}",
        "run": run,
        "kind": sentences.kind_of(run),
        "health": sentences.health_of(run),
        "state": sentences.state_of(run),
        "learning": sentences.learning_of(run),
        "routing_text": sentences.routing_of(run),
        "gate_text": sentences.gate_of(run),
        "routing": routing,
        "gate": gate,
        "tokens": f"tokens-{number}" if run.view is not None else "",
    }
