"""Where text comes from: documents of the embedded corpus, of local files, of hub datasets.

Local text is read file by file in a fixed order; a hub dataset is streamed. Whatever is wrong with
a source is a `UserError` that names it.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tiny_onn.config import DataConfig
from tiny_onn.embedded import Document, embedded_documents, split_text
from tiny_onn.errors import UserError

HUB_PREFIX = "hf:"
# Documents of a hub stream that are shuffled among each other.
_SHUFFLE_BUFFER = 1_000


def read_documents(source: str, text_field: str) -> Iterator[Document]:
    """The documents of one embedded or local source in a fixed order, blank ones left out.

    Folders are searched recursively, hidden entries left out; `text_field` holds a row's text.

    Raises:
        UserError: If the source is missing, unreadable or without text.
    """
    if source == "embedded":
        yield from embedded_documents()
        return
    path = Path(source).expanduser()
    found = False
    try:
        if not path.exists():
            raise _bad(path, "no such file or folder; correct it, or write hf:name for hub data")
        for file in _folder_files(path, set()) if path.is_dir() else [path]:
            for document in _read_file(file, text_field):
                if document.text.strip():
                    found = True
                    yield document
    except OSError as error:
        where = error.filename or path
        raise _bad(where, f"cannot be read ({error.strerror or error}); check it") from error
    if not found:
        raise _bad(path, f"no text in it, expected a {_ENDINGS} file that holds some; add one")


def _bad(where: object, problem: str) -> UserError:
    return UserError(f"data.sources: {where}: {problem}")


def _folder_files(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Text files below `folder`, sorted; a folder reached twice through links is read once."""
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _folder_files(entry, seen)
        elif entry.suffix.lower() in _READERS:
            yield entry


def _read_file(path: Path, text_field: str) -> Iterator[Document]:
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise _bad(path, f"got ending {path.suffix!r}, expected {_ENDINGS}; convert or rename it")
    try:
        for index, text in enumerate(read(path, text_field)):
            yield Document(text, str(path), index)
    except UnicodeDecodeError as error:
        raise _bad(path, f"not UTF-8 ({error}); convert it to UTF-8") from error


def _read_txt(path: Path, text_field: str) -> Iterator[str]:
    """The whole file, or pieces cut at blank lines if it is longer than 64,000 characters."""
    yield from split_text(path.read_text(encoding="utf-8-sig"))


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path} line {number}"
            try:
                line = raw.decode("utf-8-sig")
                row = json.loads(line) if line.strip() else {text_field: ""}
            except (ValueError, RecursionError) as error:
                raise _bad(where, f"not JSON in UTF-8 ({error}); write one object") from error
            if not isinstance(row, dict):
                raise _bad(where, f"got {line.strip()[:20]!r}, expected a JSON object; write one")
            yield _field(row, text_field, where)


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    # Slow to import and needed for this format only; datasets depends on it.
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        with pq.ParquetFile(path) as file:
            # Raises if the column is missing.
            _field(dict.fromkeys(file.schema_arrow.names), text_field, path)
            batches = file.iter_batches(columns=[text_field])
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows):
                yield _field(row, text_field, f"{path} row {number}")
    except pa.ArrowException as error:
        raise _bad(path, f"not readable as parquet ({_one_line(error)}); write it anew") from error


_READERS = MappingProxyType({".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet})
_ENDINGS = ", ".join(_READERS)


def _field(row: dict[str, Any], text_field: str, where: object) -> str:
    """The row's text; null counts as blank."""
    if text_field not in row:
        names = ", ".join(itertools.islice(row, 20)) or "none"
        raise UserError(
            f"data.text_field: {where}: got {text_field!r}, expected one of: {names}; correct it"
        )
    value = row[text_field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"data.text_field: {where}: {text_field!r} holds {type(value).__name__}, expected text;"
            " name another field"
        )
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def hub_documents(
    source: str, config: DataConfig, order: tuple[int, int] | None
) -> Iterator[Document]:
    """A hub dataset, streamed: shuffled by `order` (seed, epoch), or as stored if that is None."""
    import datasets  # noqa: PLC0415 (2 s of imports, needed for hub data only)
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    name, *configs = source.removeprefix(HUB_PREFIX).split(":")
    if not name or len(configs) > 1:
        raise _bad(source, "expected hf:name or hf:name:config; correct it")
    try:
        dataset = datasets.load_dataset(name, *configs, split=config.split, streaming=True)
        assert isinstance(dataset, datasets.IterableDataset)
        if order is not None:
            dataset = dataset.shuffle(seed=order[0], buffer_size=_SHUFFLE_BUFFER)
            dataset.set_epoch(order[1])
        for index, row in enumerate(dataset):
            text = _field(row, config.text_field, f"{source} row {index}")
            if text.strip():
                yield Document(text, source, index)
    except ConnectionError as error:
        remedy = "connect, or name downloaded .jsonl or .parquet files instead"
        raise _bad(source, f"no network, or no answer ({_one_line(error)}); {remedy}") from error
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        remedy = "check the name, the config and data.split"
        raise _bad(source, f"{_one_line(error)}; {remedy}") from error
