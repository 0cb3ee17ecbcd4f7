"""The meaning of every setting, read from the docstrings under the fields."""

from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import docstring_parser

from tiny_onn.config.checks import RANGES, to_toml
from tiny_onn.config.schema import RunConfig


class FieldDoc(NamedTuple):
    """A setting: its section and key, its accepted values in words, its default, its meaning."""

    section: str
    field: str
    type: str
    default: str
    doc: str


def field_docs() -> Iterator[FieldDoc]:
    """Yield every setting with the docstring under its field in `schema.py`."""
    ranges = {name: expected for expected, _, names in RANGES for name in names.split()}
    defaults = asdict(RunConfig())
    for section, cls in sections_of().items():
        docs = docstrings_of(cls)
        for key, hint in get_type_hints(cls).items():
            yield FieldDoc(
                section=section,
                field=key,
                type=ranges.get(f"{section}.{key}", expected_value(hint)),
                default=to_toml(defaults[section][key]),
                doc=docs[key],
            )


def docstrings_of(cls: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass and of its bases, each in one line."""
    return {
        field.arg_name: " ".join((field.description or "").split())
        for base in reversed(cls.__mro__)
        if is_dataclass(base)
        for field in docstring_parser.parse_from_object(base).params
    }


def sections_of() -> dict[str, type]:
    """Return the dataclass of each section by the section's name."""
    hints = get_type_hints(RunConfig)
    assert all(is_dataclass(cls) for cls in hints.values())
    return hints


def expected_value(hint: object) -> str:
    """Return the values that a field's type accepts, in words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(to_toml(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return 'a non-empty list of strings, as ["a", "b"]'
    words: dict[object, str] = {bool: "true or false", int: "a 64-bit integer", float: "a number"}
    return words.get(hint, "a non-empty string in one line")
