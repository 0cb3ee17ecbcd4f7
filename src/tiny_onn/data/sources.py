"""The sources of text, which are the embedded corpus, local files and hub datasets.

Local text is read file by file in a fixed order; a hub dataset is streamed. Every mistake in a
source raises a `UserError` that names the source.
"""

from collections.abc import Iterator
from pathlib import Path

from tiny_onn.config.schema import HUB_PREFIX, DataConfig
from tiny_onn.data.documents import Document
from tiny_onn.data.embedded_text import embedded_documents
from tiny_onn.data.fields import Chat, bad_source, row_text
from tiny_onn.data.readers import ENDINGS, is_text_file, read_texts
from tiny_onn.errors import UserError, reason_of

_OR_HUB = ", or write hf:name for hub data"
_SHUFFLE_BUFFER = 1_000
"""Documents of a hub stream that are shuffled among each other."""


def read_documents(source: str, text_field: str) -> Iterator[Document]:
    """Yield the documents of one embedded or local source in a fixed order, without blank ones.

    Folders are searched recursively, hidden entries left out.

    Args:
        source: `embedded`, a file or a folder.
        text_field: the field of a row that holds its text.

    Raises:
        UserError: the source is missing, unreadable or without text.
    """
    if source == "embedded":
        yield from embedded_documents()
        return
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:
        raise bad_source(source, f"{reason_of(error)}; write the folder in full") from error
    found = False
    try:
        if not path.exists():
            raise bad_source(path, f"no such file or folder; correct it{_OR_HUB}")
        for file in _text_files(path) if path.is_dir() else [path]:
            for index, text in enumerate(read_texts(file, text_field)):
                if text.strip():
                    found = True
                    document = Document(text, str(file), index, isinstance(text, Chat))
                    document.utf8()
                    yield document
    except OSError as error:
        where = error.filename or path
        raise bad_source(where, f"cannot be read ({error.strerror or error}); check it") from error
    if not found:
        raise bad_source(path, f"no text in it, expected a {ENDINGS} file that holds some; add one")


def reworded_for_text(problem: str) -> str:
    """Return a reader's message with --text in place of the settings that usually name text."""
    if problem.startswith("data.text_field: "):
        mistake = problem.removeprefix("data.text_field: ").rpartition("; ")[0]
        return (
            f"--text: {mistake}; eval reads the field that the run's settings name, so rename the"
            " field, or give the text as .txt"
        )
    mistake = problem.removeprefix("data.sources: ").replace(_OR_HUB, "")
    return problem if mistake == problem else f"--text: {mistake}"


def check_text(path: Path, text_field: str) -> None:
    """Read the first document of a file or folder that --text names.

    Args:
        path: the file or folder.
        text_field: the field of a row that holds its text.

    Raises:
        UserError: there is no such text, it cannot be read, or it is empty.
    """
    try:
        next(read_documents(str(path), text_field))
    except UserError as error:
        raise UserError(reworded_for_text(str(error))) from error


def _text_files(folder: Path) -> Iterator[Path]:
    """Yield the text files below `folder`, sorted; a folder reached twice by links is read once."""
    seen: set[tuple[int, int]] = set()
    # Folders can nest deeper than Python's calls, so that recursion could fail.
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        if not path.is_dir():
            if is_text_file(path):
                yield path
            continue
        status = path.stat()
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
            waiting += sorted(entries, reverse=True)


def hub_documents(
    source: str, config: DataConfig, order: tuple[int, int] | None
) -> Iterator[Document]:
    """Yield the documents of a hub dataset, streamed, without blank ones.

    Args:
        source: `hf:name`, `hf:name:config` or `hf:name@revision`.
        config: the settings that name the split and the field of text.
        order: seed and epoch of the shuffle; None yields the documents as stored.

    Raises:
        UserError: the dataset cannot be reached or read, or a row has no text.
    """
    import datasets  # noqa: PLC0415 (2 s of imports, needed for hub data only)
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    full, *configs = source.removeprefix(HUB_PREFIX).split(":")
    name, at, revision = full.partition("@")
    if not name or len(configs) > 1 or (at and not revision):
        expected = "expected hf:name or hf:name:config, the name as it is or name@revision"
        raise bad_source(source, f"{expected}; correct it")
    try:
        dataset = datasets.load_dataset(
            name, *configs, split=config.split, streaming=True, revision=revision or None
        )
        assert isinstance(dataset, datasets.IterableDataset)
        if order is not None:
            dataset = dataset.shuffle(seed=order[0], buffer_size=_SHUFFLE_BUFFER)
            dataset.set_epoch(order[1])
        for index, row in enumerate(dataset):
            text = row_text(row, config.text_field, f"{source} row {index}")
            if text.strip():
                yield Document(text, source, index, isinstance(text, Chat))
    except ConnectionError as error:
        remedy = "connect, or name downloaded .jsonl or .parquet files instead"
        raise bad_source(
            source, f"no network, or no answer ({reason_of(error)}); {remedy}"
        ) from error
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        remedy = "check the name, the config and data.split"
        raise bad_source(source, f"{reason_of(error)}; {remedy}") from error
