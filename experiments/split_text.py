"""The text of a study in parts: to learn from and choose on, to report on, and unseen sources.

A run keeps a part of what it reads out of training, and choices are made on that part: learning
rates, recipes, the best checkpoint. What is reported comes from documents that no run reads.
"""

import hashlib
import json
import lzma
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tiny_onn.errors import UserError, reason_line, reason_of
from tiny_onn.runs.files import file_entry

REPORTED_SHARE = 0.05
FORMS = "expected JSON lines in UTF-8, also packed by xz, or a folder of .jsonl files; correct it"


@dataclass(frozen=True, slots=True)
class Parts:
    """The files of a study's text."""

    folder: Path
    """The folder of all of them."""
    learn: Path
    """What runs read, a file for each source; each keeps a part of it to choose on."""
    report: Path
    """What final numbers are measured on, of the same sources."""
    unseen: Path | None
    """Text of the sources that were set apart; None if none were."""


def documents_of(path: Path) -> Iterator[dict[str, str]]:
    """The lines of a .jsonl or .jsonl.xz file with `text` and perhaps `source`.

    A folder has a .jsonl file for each source, as `documentation.py` writes it.

    Raises:
        UserError: The path cannot be read, or a line is no document.
    """
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise UserError(f"--text: {path}: got a folder without a .jsonl file; {FORMS}")
        for file in files:
            yield from ({"source": file.stem} | document for document in documents_of(file))
        return
    reader, number = lzma.open if path.suffix == ".xz" else open, 0
    try:
        with reader(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):  # noqa: B007 - the error says it
                yield _document(line)
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise UserError(f"--text: {path}: got {reason_of(error)}; {FORMS}") from error
    except (ValueError, RecursionError) as error:
        where = f"--text: {path} line {number}"
        raise UserError(f"{where}: {reason_line(error)}; mend or remove the line") from error


def write_documents(path: Path, texts: Sequence[str]) -> None:
    """Write the documents of a source into its file, which has its name, for `documents_of`."""
    lines = (json.dumps({"text": text, "source": path.stem}) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")


def _document(line: str) -> dict[str, str]:
    """The document of a line; a `ValueError` says what is wrong with it."""
    document = json.loads(line)
    if not isinstance(document, dict):
        raise ValueError(f"got {line.strip()[:20]!r}, expected an object with 'text'")
    if "text" not in document:
        names = ", ".join(name[:40] for name in [*document][:20]) or "nothing"
        raise ValueError(f"got {names}, expected 'text' and perhaps 'source'")
    for name in ("text", "source"):
        if not isinstance(value := document.get(name, ""), str):
            raise ValueError(f"got {name!r} of type {type(value).__name__}, expected a string")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name!r} holds a lone surrogate, expected valid Unicode") from None
    return document


def split(
    path: Path,
    folder: Path,
    unseen_sources: Sequence[str] = (),
    *,
    unseen_option: str = "--unseen-sources",
) -> Parts:
    """Write the parts of a text into a folder, unless those of the same files are there.

    A document's part depends on its source and on its text alone. The reported share is taken from
    the other end of the hash than the share that a run keeps out of training.

    Args:
        path: The text, as `documents_of` reads it.
        folder: The folder in which the folder of the parts is or will be.
        unseen_sources: Sources that are set apart.
        unseen_option: The option that names these sources, for the error.

    Raises:
        UserError: The text is unfit, a source is in no document, or a part gets no text.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    try:
        read = [(file.name, file_entry(file).sha256) for file in files]
    except OSError as error:
        raise UserError(f"--text: {path}: got {reason_of(error)}; {FORMS}") from error
    names = hashlib.sha256(json.dumps([read, sorted(unseen_sources)]).encode()).hexdigest()
    target = folder / f"text-{names[:8]}"
    parts = Parts(
        folder=target,
        learn=target / "learn",
        report=target / "report.jsonl",
        unseen=target / "unseen.jsonl" if unseen_sources else None,
    )
    if target.is_dir():
        return parts
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        written = Path(temporary) / target.name
        (written / "learn").mkdir(parents=True)
        sources = _write_parts(path, written, unseen_sources)
        if missing := sorted({*unseen_sources} - sources):
            found = sorted(sources - {""})
            others = f" and {len(found) - 20} others" if len(found) > 20 else ""
            raise UserError(
                f"{unseen_option}: got {', '.join(missing)}, expected sources in {path}, which are"
                f" {', '.join(found[:20]) or 'none'}{others}; correct the names"
            )
        for part, use in (("learn/*", "learn from"), ("report.jsonl", "report on")):
            if not any(written.glob(part)):
                raise UserError(
                    f"--text: {path}: got no text to {use}, expected a hundred documents or more"
                    " beside those of unseen sources; add some"
                )
        # Another process may be faster, and writes the same.
        with suppress(OSError):
            written.rename(target)
    return parts


def _write_parts(path: Path, folder: Path, unseen_sources: Sequence[str]) -> set[str]:
    """Write the documents that are not blank into the files of their parts; the sources of all."""
    with ExitStack() as files:
        opened: dict[str, TextIO] = {}
        sources: set[str] = set()
        for document in documents_of(path):
            if not (text := document["text"]).strip():
                continue
            sources.add(source := document.get("source", ""))
            words = "".join(c if c.isalnum() else "-" for c in source[:50]) or "text"
            reported = is_reported(hashlib.sha256(text.encode()).digest())
            part = "report" if reported else f"learn/{words}"
            part = "unseen" if source in unseen_sources else part
            if part not in opened:
                file = (folder / f"{part}.jsonl").open("w", encoding="utf-8")
                opened[part] = files.enter_context(file)
            opened[part].write(json.dumps({"text": text}) + "\n")
    return sources


def tiny_text(folder: Path) -> Path:
    """A file of 400 short documents in the folder, for runs that only show that they work."""
    path = folder / "text.jsonl"
    lines = [f"{n}. The {n % 7} foxes jump over {n % 5} lazy dogs. " * 8 for n in range(400)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    return path


def is_reported(digest: bytes) -> bool:
    """Whether a document of this SHA-256 is reported on."""
    return int.from_bytes(digest[:8], "big") >= (1 - REPORTED_SHARE) * 2**64
