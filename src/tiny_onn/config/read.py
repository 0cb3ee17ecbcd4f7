"""Settings in and out: TOML, presets and `--set` to a checked `RunConfig`, and back to text.

The fields and type hints of `schema.py` say what can be read; `checks.py` says which values are
accepted.
"""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tiny_onn.config.checks import shown, to_toml, validate
from tiny_onn.config.describe import expected_value, sections_of
from tiny_onn.config.schema import RunConfig
from tiny_onn.errors import UserError

# `tiny-onn config` prints less than 20 KB; a file beyond this bound holds no settings.
# Settings that runs of earlier versions do not hold, with the value that changes nothing for them.
ADDED = MappingProxyType(
    {
        "smk.lesson_share": 1.0,
        "optim.lr_scale": "absolute",
        "train.stop_if_worse": False,
        "train.cuda_graphs": False,
        "data.settling_fraction": 0.0,
        "data.settling_tokens": 0,
        "smk.net_gain": False,
        "experts.token_scale": False,
        "experts.refit": False,
        "router.straight_through": "coupled",
        "train.shard": "none",
        "teacher.cache": "none",
        "optim.norm_lr": 0.0,
        "data.shuffle_tokens": 0,
        "data.eval_row_tokens": 0,
        "loss.label_coef": 0.0,
        "loss.states_scale": "layer",
    }
)
_MAX_TOML_BYTES = 2**16
# tomllib takes memory that grows with the square of a dotted key's length: 16 MB for 2048 dots.
_MAX_LINE_DOTS = 2048


def load_config(path: Path | None, preset: str | None, overrides: Sequence[str]) -> RunConfig:
    """Return the checked settings: the defaults, overridden by preset, TOML file, overrides.

    Args:
        path: a TOML file; it may name its preset with `preset = "NAME"` at the top.
        preset: a name from `preset_names`.
        overrides: `section.key=value`, the value as TOML or a bare word; the last one wins.

    Raises:
        UserError: a source cannot be read, or a setting is unknown, of a wrong type, out of range
            or in contradiction to another one.
    """
    try:
        table = {} if path is None else _parse_toml(_read_bounded(path), str(path))
    except OSError as error:
        raise UserError(
            f"{path}: cannot read it ({error.strerror}), expected a TOML file; `tiny-onn config`"
            " prints one"
        ) from error
    in_file = table.pop("preset", None)
    if in_file is not None and preset is not None and in_file != preset:
        raise UserError(
            f"preset: got {preset} from --preset and {shown(in_file)} from {path}, expected one"
            " preset; remove one of them"
        )
    name = preset if in_file is None else in_file
    config = RunConfig()
    if name is not None:
        config = _apply(config, _read_preset(name), f"preset {name}")
    return override(_apply(config, table, str(path)), overrides)


def override(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Return the checked settings with each `section.key=value` of `overrides` in place.

    Raises:
        UserError: an override is malformed, or the settings are refused as by `load_config`.
    """
    for text in overrides:
        config = _apply(config, _parse_override(text), "--set")
    validate(config)
    return config


def preset_names() -> tuple[str, ...]:
    """Return the names of the presets that come with the package, sorted."""
    folder = files("tiny_onn.config") / "presets"
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir()))


def resolved_json(config: RunConfig) -> str:
    """Return every setting as JSON, indented, ASCII, in the order of the fields."""
    return json.dumps(asdict(config), indent=2) + "\n"


def config_from_json(text: str, source: str = "config.json") -> RunConfig:
    """Return the checked settings that `resolved_json` wrote.

    Raises:
        UserError: the text is no such JSON, or a setting is missing. A default does not take its
            place, since defaults may have changed between versions; what a later version added has
            the value of `ADDED`, by which a run goes on as it began.
    """
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{source}: got malformed JSON ({error}), expected the settings of a run;"
            " start the run again from its TOML"
        ) from error
    if not isinstance(table, dict):
        raise UserError(f"{source}: got {shown(table)}, expected an object; restore the file")
    for name, value in ADDED.items():
        section, key = name.split(".")
        if isinstance(table.get(section), dict):
            table[section].setdefault(key, value)
    config = _apply(RunConfig(), table, source)
    for section, keys in asdict(config).items():
        for key in keys:
            if key not in table.get(section, ()):
                raise UserError(
                    f"{source}: got no {section}.{key}, expected every setting; if another version"
                    " of tiny-onn made the run, add the setting to the file"
                )
    validate(config)
    return config


def config_diff(before: RunConfig, after: RunConfig) -> list[str]:
    """Return `section.key: before -> after` for each setting that differs."""
    old, new = asdict(before), asdict(after)
    return [
        f"{section}.{key}: {to_toml(value)} -> {to_toml(new[section][key])}"
        for section, keys in old.items()
        for key, value in keys.items()
        if value != new[section][key]
    ]


def _read_preset(name: object) -> dict[str, Any]:
    if name not in preset_names():
        expected = ", ".join(preset_names())
        raise UserError(f"preset: got {shown(name)}, expected one of {expected}")
    file = files("tiny_onn.config") / "presets" / f"{name}.toml"
    return _parse_toml(file.read_bytes(), f"preset {name}")


def _read_bounded(path: Path) -> bytes:
    """Return a file's bytes, of which at most `_MAX_TOML_BYTES` and one more are read."""
    with path.open("rb") as file:
        content = file.read(_MAX_TOML_BYTES + 1)
    if len(content) > _MAX_TOML_BYTES:
        raise UserError(
            f"{path}: got more than {_MAX_TOML_BYTES // 1024} KiB, expected a TOML file of"
            " settings; `tiny-onn config` prints one"
        )
    return content


def _parse_toml(text: bytes, source: str) -> dict[str, Any]:
    try:
        # Editors may begin a file with a byte order mark.
        return _loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        is_utf8 = b"\0" not in text and not isinstance(error, UnicodeDecodeError)
        remedy = "mend it there" if is_utf8 else "save it as UTF-8; it may be UTF-16"
        raise UserError(
            f"{source}: got malformed TOML ({error}), expected settings as `tiny-onn config` prints"
            f" them; {remedy}"
        ) from error


def _loads(text: str) -> dict[str, Any]:
    """Return the table that a TOML text holds.

    Raises:
        ValueError: the text is no TOML, or has a line whose parsing would take too much memory.
        RecursionError: the text is nested too deeply.
    """
    if (dots := max((line.count(".") for line in text.splitlines()), default=0)) > _MAX_LINE_DOTS:
        raise ValueError(f"a line with {dots} dots, at most {_MAX_LINE_DOTS} are read; break it")
    return tomllib.loads(text)


def _parse_override(text: str) -> dict[str, Any]:
    """Return `{section: {key: value}}` of one `section.key=value`."""
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise UserError(
            f"--set: got {shown(text)}, expected SECTION.KEY=VALUE; for example"
            " --set router.target_k=8"
        )
    value = value.strip()
    try:
        parsed = _loads(f"value = {value}")
    except (ValueError, RecursionError) as error:
        # A value that begins with a quote or a bracket is meant as TOML, and not as a bare word.
        if value.startswith(("'", '"', "[", "{")):
            raise UserError(
                f"--set: {name[:80]}: got malformed TOML ({error}), expected a value; put the whole"
                " SECTION.KEY=VALUE in single quotes for the shell"
            ) from error
        parsed = {"value": value}
    if parsed.keys() != {"value"}:
        raise UserError(f"--set: {name[:80]}: got several lines, expected one value; repeat --set")
    return {section: {key: parsed["value"]}}


def _apply(config: RunConfig, table: Mapping[str, Any], source: str) -> RunConfig:
    """Return `config` with the raw values of `table`, which has a table for each section."""
    sections = sections_of()
    changed: dict[str, Any] = {}
    for section, values in table.items():
        if section not in sections:
            raise UserError(f"{source}: {_unknown(section, None)}")
        if not isinstance(values, dict):
            raise UserError(
                f"{source}: {section}: got {shown(values)}, expected a table; write [{section}]"
            )
        hints = get_type_hints(sections[section])
        for key in values:
            if key not in hints:
                raise UserError(f"{source}: {_unknown(section, key)}")
        checked = {
            key: coerce(value, hints[key], f"{source}: {section}.{key}")
            for key, value in values.items()
        }
        changed[section] = replace(getattr(config, section), **checked)
    return replace(config, **changed)


def _unknown(section: str, key: str | None) -> str:
    """Return the message for a name that is no setting, with the most similar setting."""
    sections = sections_of()
    names = [f"{name}.{item.name}" for name, cls in sections.items() for item in fields(cls)]
    name = section if key is None else f"{section}.{key}"
    known = list(sections) if key is None else names
    near = [n for n in names if n.endswith(f".{key or section}")] or difflib.get_close_matches(
        name, known, n=1
    )
    remedy = f"did you mean {near[0]}?" if near else "`tiny-onn config` lists all settings"
    kind = "section" if key is None else "setting"
    return f"got unknown {kind} {shown(name)}, expected a {kind} of tiny-onn; {remedy}"


def coerce(value: object, hint: object, where: str) -> object:
    """Return a raw value of TOML or JSON as a field's type.

    Args:
        value: the value as the file has it.
        hint: the field's type: `bool`, `int`, `float`, `str`, a `Literal` or a tuple of these.
        where: the field's name, with which the message starts.

    Raises:
        UserError: the value is of another type.
    """
    origin = get_origin(hint)
    accepted = False
    if origin is Literal:
        accepted = isinstance(value, str) and value in get_args(hint)
    elif origin is tuple:
        if isinstance(value, list) and value:
            inner = get_args(hint)[0]
            return tuple(coerce(item, inner, f"{where}[{i}]") for i, item in enumerate(value))
    elif hint is float:
        # This refuses nan, inf and integers that no float can hold.
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1023:
            return float(value)
    elif hint is int:
        # TOML's integers have 64 bits, but Python's reader accepts longer ones.
        accepted = type(value) is int and -(2**63) <= value < 2**63
    elif hint is str:
        accepted = isinstance(value, str) and value != "" and value.isprintable()
    else:
        assert hint is bool, f"{where}: no reader for fields of type {hint}"
        accepted = isinstance(value, bool)
    if not accepted:
        remedy = "put it in quotes" if hint is str else "`tiny-onn config` shows its form"
        raise UserError(f"{where}: got {shown(value)}, expected {expected_value(hint)}; {remedy}")
    return value


def with_router(config: RunConfig, **changes: object) -> RunConfig:
    """Return the settings with changes to the router, as a recipe's controls need them."""
    return replace(config, router=replace(config.router, **changes))  # pyright: ignore[reportArgumentType]


def with_expert_lr(config: RunConfig, expert_lr: float) -> RunConfig:
    """Return the settings with another learning rate of the experts."""
    return replace(config, optim=replace(config.optim, expert_lr=expert_lr))
