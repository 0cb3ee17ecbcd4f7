"""The manifest of a checkpoint: the sizes and SHA-256 hashes of its files."""

import json
from pathlib import Path

from tiny_onn.parallel import ALONE, World
from tiny_onn.runs.files import FileEntry, file_entry

STATE, MANIFEST = "state.json", "manifest.json"


def _entries(path: Path) -> dict[str, FileEntry]:
    """Return the size and SHA-256 of each file, or nothing if the manifest cannot be read."""
    try:
        entries = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        found = {name: FileEntry(e["bytes"], e["sha256"]) for name, e in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return found if STATE in found and len(found) > 1 else {}


def sizes_hold(path: Path) -> bool:
    """Return True if a checkpoint's files have the recorded sizes; read no hashes."""
    entries = _entries(path)
    files = [path / name for name in entries]
    return bool(entries) and all(
        file.is_file() and file.stat().st_size == entries[file.name].bytes for file in files
    )


def is_intact(path: Path, world: World = ALONE) -> bool:
    """Return True if all sizes, and the hashes of this process's share of the files, hold."""
    if not sizes_hold(path):
        return False
    return all(file_entry(path / n) == e for n, e in world.mine(sorted(_entries(path).items())))
