"""The text of a study in parts: to learn from and choose on, to report on, and unseen sources.

A run keeps a part of what it reads out of training, and choices are made on that part: learning
rates, recipes, the best checkpoint. What is reported comes from documents that no run reads.
"""

import hashlib
import json
import lzma
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

REPORTED_SHARE = 0.05


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
    """
    if path.is_dir():
        for file in sorted(path.glob("*.jsonl")):
            yield from ({"source": file.stem} | document for document in documents_of(file))
        return
    reader = lzma.open if path.suffix == ".xz" else open
    with reader(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def split(path: Path, folder: Path, unseen_sources: Sequence[str] = ()) -> Parts:
    """Write the parts of a text into a folder, unless they are there.

    A document's part depends on its source and on its text alone. The reported share is taken from
    the other end of the hash than the share that a run keeps out of training.
    """
    names = hashlib.sha256(json.dumps([path.name, sorted(unseen_sources)]).encode()).hexdigest()
    target = folder / f"text-{names[:8]}"
    parts = Parts(
        folder=target,
        learn=target / "learn",
        report=target / "report.jsonl",
        unseen=target / "unseen.jsonl" if unseen_sources else None,
    )
    if target.is_dir():
        return parts
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    (temporary / "learn").mkdir(parents=True)
    with ExitStack() as files:
        opened: dict[str, TextIO] = {}
        for document in documents_of(path):
            digest = hashlib.sha256(document["text"].encode()).digest()
            source = document.get("source", "")
            words = "".join(c if c.isalnum() else "-" for c in source) or "text"
            part = "report" if is_reported(digest) else f"learn/{words}"
            part = "unseen" if source in unseen_sources else part
            if part not in opened:
                file = (temporary / f"{part}.jsonl").open("w", encoding="utf-8")
                opened[part] = files.enter_context(file)
            opened[part].write(json.dumps({"text": document["text"]}) + "\n")
    try:
        temporary.rename(target)
    except OSError:
        # Another process was faster, and wrote the same.
        shutil.rmtree(temporary)
    return parts


def tiny_text(folder: Path) -> Path:
    """A file of 400 short documents in the folder, for runs that only show that they work."""
    path = folder / "text.jsonl"
    lines = [f"{n}. The {n % 7} foxes jump over {n % 5} lazy dogs. " * 8 for n in range(400)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    return path


def is_reported(digest: bytes) -> bool:
    """Whether a document of this SHA-256 is reported on."""
    return int.from_bytes(digest[:8], "big") >= (1 - REPORTED_SHARE) * 2**64
