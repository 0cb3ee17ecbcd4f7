"""Files that are written whole or not at all, and their hashes."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tiny_onn.errors import UserError, reason_line
from tiny_onn.publish import publish


class FileEntry(NamedTuple):
    """The size and hash of a file, as the manifest of a checkpoint stores them."""

    bytes: int
    sha256: str


def file_entry(file: Path) -> FileEntry:
    """Return the size and hash of a file.

    Raises:
        OSError: the file cannot be read.
    """
    with file.open("rb") as opened:
        return FileEntry(file.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest())


def refusal(error: BaseException) -> str:
    """Return why the file system refused, in words, from the error or from its cause."""
    error = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
    return str(getattr(error, "strerror", None) or error)


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file of the run, or None if there is no such file.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot read it ({reason_line(error)}), expected a JSON object that the run"
            " wrote; restore the file or remove it"
        ) from error
    if not isinstance(found, dict):
        raise UserError(
            f"{path}: got {type(found).__name__}, expected a JSON object that the run wrote;"
            " restore the file or remove it"
        )
    return found


def write_json(path: Path, obj: object) -> None:
    """Replace the file `path` by `obj` as indented JSON, wholly or not at all.

    Raises:
        UserError: the file system refuses (no space, no permission).
    """
    write_atomically(path, json.dumps(obj, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace the file by the text, wholly or not at all.

    Raises:
        UserError: the file system refuses (no space, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explain_write(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            publish(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


@contextlib.contextmanager
def explain_write(path: Path) -> Iterator[None]:
    """Turn the file system's refusals into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot write it ({error.strerror}), expected a folder with permission and"
            " space; free some space or choose another --out"
        ) from error
