"""The settings as a TOML file that explains each of them."""

import inspect
import textwrap
from dataclasses import asdict

from tiny_onn.config.checks import to_toml
from tiny_onn.config.describe import field_docs, sections_of
from tiny_onn.config.read import preset_names
from tiny_onn.config.schema import RunConfig


def config_template(config: RunConfig | None = None) -> str:
    """Return documented TOML of every setting in `config`, or of the defaults if it is None."""
    values = asdict(RunConfig() if config is None else config)
    sections = sections_of()
    lines = [
        "# All settings with their values. A file needs only the settings that it changes. It may",
        f'# begin with a preset, as preset = "NAME"; the presets are {", ".join(preset_names())}.',
    ]
    current = ""
    for entry in field_docs():
        if entry.section != current:
            current = entry.section
            lines += ["", f"# {inspect.getdoc(sections[current])}", f"[{current}]"]
        lines += textwrap.wrap(
            entry.doc, 98, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
        )
        lines.append(f"{entry.field} = {to_toml(values[current][entry.field])}  # {entry.type}")
    return "\n".join(lines) + "\n"
