"""The page that explains every field of a run's records."""

import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tiny_onn.config.describe import docstrings_of
from tiny_onn.runs.records import (
    BlocksRecord,
    BlockwiseRecord,
    EvaluationRecord,
    LayersRecord,
    SmkRecord,
    StepRecord,
    field_names,
)

INTRODUCTION = (
    "`metrics.jsonl` in a run's folder holds one JSON object per line: a `start` evaluation, steps,"
    " `eval` evaluations between them and an `end` evaluation; with a blockwise stage, its steps"
    " and the `blocks` records before and after it. Records of kind `skipped` and `spike` name the"
    " documents of steps whose update was not finite or whose loss jumped. A number that is not"
    " finite is written as `NaN` or `Infinity`. *Counted* tokens are all but padding and the first"
    " token of each document; E is the number of experts. Floats under `layers` have six"
    " significant digits."
)
COMMAND = "This page is generated: `python -m docs.tools`."


def metrics_docs() -> str:
    """Return `docs/metrics.md`: every field of every record, from its dataclass's docstrings."""
    lines = ["# The metrics of a run", "", *textwrap.wrap(INTRODUCTION, 100), "", COMMAND]
    for title, cls in (
        ("Steps", StepRecord),
        ("Steps of the blockwise stage", BlockwiseRecord),
        ("Blocks", BlocksRecord),
        ("Evaluations", EvaluationRecord),
        ("`smk`", SmkRecord),
        ("`layers`", LayersRecord),
    ):
        text = textwrap.fill(" ".join((inspect.getdoc(cls) or "").split()), 100)
        lines += ["", f"## {title}", "", text, "", "| field | type | meaning |", "|---|---|---|"]
        lines += [f"| `{name}` | {kind} | {meaning} |" for name, kind, meaning in _fields(cls)]
    return "\n".join(lines) + "\n"


def _fields(cls: type) -> Iterator[tuple[str, str, str]]:
    """Yield the name, type and docstring of a record's fields, in the order of the record."""
    docs, hints = docstrings_of(cls), get_type_hints(cls)
    for name in field_names(cls):
        yield name, _kind(hints[name]), docs[name].replace("|", "\\|")


def _kind(hint: Any) -> str:  # noqa: ANN401 - a type hint
    """Return a type hint in the words of JSON."""
    arguments, origin = get_args(hint), get_origin(hint)
    if origin is list:
        return "list of lists of numbers" if get_origin(arguments[0]) is list else "list of numbers"
    if origin is dict:
        return "object of numbers"
    if origin is Literal:
        return " or ".join(f"`{word}`" for word in arguments)
    if arguments:
        return " or ".join(_kind(argument) for argument in arguments)
    words = {int: "integer", float: "number", type(None): "null"}
    return words.get(hint, "object")
