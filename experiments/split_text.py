"""The text of a study in parts: to learn from and choose on, to report on, and unseen sources.

A run keeps a part of what it reads out of training, and choices are made on that part: learning
rates, recipes, the best checkpoint. What is reported comes from documents that no run reads.
"""

import hashlib
import json
import lzma
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPORTED_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Parts:
    """The files of a study's text."""

    learn: Path
    """What runs read; each keeps its own held-out part of it to choose on."""
    report: Path
    """What final numbers are measured on, of the same sources."""
    unseen: Path | None
    """Text of the sources that were set apart; None if none were."""


def documents_of(path: Path) -> Iterator[dict[str, str]]:
    """The lines of a .jsonl or .jsonl.xz file with `text` and perhaps `source`."""
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
        learn=target / "learn.jsonl",
        report=target / "report.jsonl",
        unseen=target / "unseen.jsonl" if unseen_sources else None,
    )
    if target.is_dir():
        return parts
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    files = {
        name: (temporary / f"{name}.jsonl").open("w", encoding="utf-8")
        for name in ("learn", "report", "unseen")
    }
    for document in documents_of(path):
        digest = hashlib.sha256(document["text"].encode()).digest()
        part = "report" if is_reported(digest) else "learn"
        part = "unseen" if document.get("source") in unseen_sources else part
        files[part].write(json.dumps({"text": document["text"]}) + "\n")
    for file in files.values():
        file.close()
    try:
        temporary.rename(target)
    except OSError:
        # Another process was faster, and wrote the same.
        for file in temporary.iterdir():
            file.unlink()
        temporary.rmdir()
    return parts


def is_reported(digest: bytes) -> bool:
    """Whether a document of this SHA-256 is reported on."""
    return int.from_bytes(digest[:8], "big") >= (1 - REPORTED_SHARE) * 2**64
