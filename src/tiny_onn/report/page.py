"""The report: one HTML file that contains everything it needs, so that it needs no network.

Charts are Vega-Lite specifications, drawn by the library's own JavaScript from
`vl_convert.javascript_bundle`. `page.js` gives them the theme's colours, and adds the scrubbing of
heatmaps and the token view, which are not charts. The page has no time stamp and no random id, so
that a run's page has the same bytes each time.
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
    """A chart with its title and its caption.

    Attributes:
        key: the name of the chart in the page.
        title: the title above the chart.
        caption: the text on how to read the chart, and on how a healthy run looks in it.
        frames: the names of the frames of a scrubbed chart; empty: the chart has one frame.
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
        """Return the figure of a specification in a list, which is empty without one."""
        if spec is None:
            return []
        self.specs[key] = spec
        return [Figure(key=key, title=title, caption=caption, frames=frames)]


def report_page(runs: Sequence[Run]) -> str:
    """Return the page about these runs as HTML.

    Args:
        runs: the runs, at least one, with distinct names.
    """
    charts = Charts()
    training, frontier = _training(charts, runs), _frontier(charts, runs)
    cells = heatmaps.MAX_CELLS // len(runs)
    details = [_details(charts, number, run, cells) for number, run in enumerate(runs)]
    views = {f"tokens-{n}": run.view for n, run in enumerate(runs) if run.view is not None}
    passages = {
        key: {"num_experts": view["num_experts"], **view["passage"]} for key, view in views.items()
    }
    return (
        environment()
        .get_template("page.html")
        .render(
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
    )


def environment() -> Environment:
    """Return the templates of this folder, which escape all text."""
    found = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["code"] = code
    return found


def code(text: str) -> Markup:
    """Return escaped text in which the parts between backticks are set as code."""
    parts = [escape(part) for part in text.split("`")]
    whole = len(parts) % 2 == 1
    marks = (Markup("<code>"), Markup("</code>")) if whole else (Markup("`"), Markup("`"))
    marked = parts[0]
    for number, part in enumerate(parts[1:]):
        marked += marks[number % 2] + part
    return marked


@cache
def library() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script that sets `window.vegaEmbed`.

    Raises:
        AssertionError: the script cannot stand inside a script element.
    """
    text = vl_convert.javascript_bundle()  # pyright: ignore[reportCallIssue] - its stub asks for more
    assert "</script" not in text.lower()
    return text


def script_json(value: object) -> Markup:
    """Return JSON that can stand inside a script element; non-finite numbers become null."""
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
    """Draw the curves over training, of all runs together."""
    if not any(run.steps for run in runs):
        return []
    losses, kls, states, blocks = (
        {run.name: curves.curve(run.of_kind(kind), name) for run in runs}
        for kind, name in (
            ("step", "loss"),
            ("step", "forward_kl"),
            ("step", "states_error"),
            ("blockwise", "loss"),
        )
    )
    return [
        *charts.add(
            "kl",
            curves.kl_spec(runs),
            "How far the student is from its teacher",
            "The solid line is the KL of each training step on its own text, and the dots are the"
            " KL on held-out text. In a healthy run the KL falls steeply at first and then slowly,"
            " and the dots follow the line. Dots that rise while the line falls mean overfitting.",
        ),
        *charts.add(
            "k",
            curves.k_spec(runs),
            "How many experts a token gets",
            "The line is the mean over layers and tokens, the band spans the means of the layers,"
            " and the dashed line is the target. A healthy run stays near its target. Layers may"
            " differ from each other if they share one budget.",
        ),
        *charts.add(
            "loss",
            curves.line_spec("loss, nats", losses) if losses != kls else None,
            "The loss that training minimises",
            "The line is the distillation loss of each step, in nats per token, which another"
            " divergence or temperature makes unequal to the KL. It should fall without jumps.",
        ),
        *charts.add(
            "states",
            curves.line_spec("unexplained variance", states, format="~%")
            if any(states.values())
            else None,
            "How well hidden states are matched",
            "The line is the share of the variance of the teacher's hidden states that the"
            " student's hidden states leave unexplained, averaged over the layers. It is a part of"
            " this run's loss, and should fall.",
        ),
        *charts.add(
            "blocks",
            curves.line_spec("share of the output's power", blocks, format="~%")
            if any(blocks.values())
            else None,
            "The error of the blockwise stage",
            "The line is the error of single layers, averaged over the layers, while every layer"
            " learns its teacher's MLP by itself. It should fall and then flatten, and the stage"
            " may end there.",
        ),
        *charts.add(
            "lr",
            curves.rates_spec(runs),
            "How fast experts and gates learn",
            "The lines are the learning rates that the schedule set. They rise in the warm-up, and"
            " fall to zero at the end of a run that finished.",
        ),
    ]


def _frontier(charts: Charts, runs: Sequence[Run]) -> list[Figure]:
    """Draw quality as a function of compute, of all runs together."""
    return charts.add(
        "frontier",
        curves.frontier_spec(runs),
        "Quality at every cost",
        "Each point is one budget. Points further left are cheaper, and lower points are closer to"
        " the teacher. Training a gate was worth it if its line lies below the points of the"
        " controls. A run with one point was measured at its own budget only; `tiny-onn eval RUN"
        " --frontier --out RUN` measures more.",
    )


def _details(charts: Charts, number: int, run: Run, cells: int) -> dict[str, Any]:
    """Return the texts and figures about a single run."""
    load, k = heatmaps.load_frames(run, cells), heatmaps.k_frames(run, cells)
    routing = []
    if load is not None and k is not None:
        routing += charts.add(
            f"load-{number}",
            load.spec,
            "Which experts are used",
            "A row is a layer, a column is an expert, and the colour is the share of the tokens"
            " that used the expert. Healthy layers are uneven but mixed. A row with nothing but 0 %"
            " and 100 % gives all tokens the same experts. A cell at 0 % is an expert that no token"
            " uses.",
            load.labels,
        )
        routing += charts.add(
            f"histogram-{number}",
            k.spec,
            "How many experts tokens get, by layer",
            "A row is a layer, a column is a number of active experts, and the colour is the share"
            " of the tokens with that number. A single column means that every token costs the"
            " same. A budget that follows the token spreads over several columns.",
            k.labels,
        )
    if run.view is not None:
        pairs = heatmaps.coactivation_frames(run.view)
        routing += charts.add(
            f"pairs-{number}",
            pairs.spec,
            "Which experts work together",
            "The colour is the correlation, over held-out tokens, between the activity of two"
            " experts of one layer. The diagonal is 1. Strong colours off the diagonal are experts"
            " that tokens use together, or instead of each other. In a table without such colours"
            " experts are chosen independently.",
            pairs.labels,
        )
    gate = [
        *charts.add(
            f"agreement-{number}",
            curves.agreement_spec(run),
            "Does the gate choose what it is taught?",
            "The line of the gate is the share of tokens whose first choice is their target. It"
            " means something only above both other lines. A gate that knows which experts are"
            " popular, and nothing about the token, reaches the agreement with another token's"
            " target.",
        ),
        *charts.add(
            f"layers-{number}",
            curves.layer_agreement_spec(run),
            "Does the gate of each layer choose what it is taught?",
            "Dots are the agreement of each layer's gate with its targets in the newest record, and"
            " ticks are its agreement with the targets of other tokens. A dot at or below its tick"
            " is a gate that knows nothing about the token.",
        ),
        *charts.add(
            f"surprise-{number}",
            heatmaps.surprise_spec(run),
            "The surprise of each expert",
            "The colour is the mean surprise of each expert over the tokens of the newest record"
            " that holds it, in the units of the setting smk.surprise. A table with one value"
            " everywhere teaches nothing. A single strong row hides the other layers.",
        ),
    ]
    return {
        "key": f"run-{number}",
        "run": run,
        "kind": sentences.kind_of(run),
        "status": sentences.status_of(run),
        "health": sentences.health_of(run),
        "state": sentences.state_of(run),
        "learning": sentences.learning_of(run),
        "routing_text": sentences.routing_of(run),
        "gate_text": sentences.gate_of(run),
        "routing": routing,
        "gate": gate,
        "tokens": f"tokens-{number}" if run.view is not None else "",
    }
