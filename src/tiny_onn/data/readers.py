"""Readers of the texts in .txt, .jsonl and .parquet files, packed by gzip or zstd too.

Files may come from anyone. Beside the texts themselves, which the caller keeps or drops one by one,
reading takes at most `WORKING_BYTES`, whatever the file holds: text is decoded in blocks, a line of
.jsonl is at most `LINE_BYTES` long, a parquet column is decoded some rows at a time, and a file
that unpacks to far more than its size (a bomb) is refused. Parquet has no limit for one value: a
value of more than 80 MiB takes six times its size. Only regular files are opened, and a file that
changes meanwhile is refused. Every mistake in a file raises a `UserError` that names the file.
"""

import codecs
import gzip
import io
import itertools
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeVar

from tiny_onn.data.documents import split_text
from tiny_onn.data.fields import bad_source, fields_read, row_text
from tiny_onn.errors import UserError, reason_of

Part = TypeVar("Part", str, bytes)
WORKING_BYTES = 512 * 2**20
"""Memory that reading takes beside the texts it has yielded (see reliability/fuzz_inputs.py)."""
LINE_BYTES = 8 * 2**20
"""Length of the longest line of .jsonl; JSON takes up to 34 times its size when parsed."""
BOMB_RATIO = 100
"""Text that a file may hold per byte of its size; prose compresses to a third or less."""
BOMB_BYTES = 64 * 2**20
"""Text that any file may hold, however small it is."""
_BLOCK_BYTES = 2**18
_PIECE_CHARS = 64_000
_PARQUET_ROWS = 64


def is_text_file(path: Path) -> bool:
    """Return True if the name ends in one of `ENDINGS`."""
    return _reader_name(path) is not None


def read_texts(path: Path, text_field: str) -> Iterator[str]:
    """Yield the texts of a file in order, blank ones included; a chat is a `fields.Chat`.

    Args:
        path: the file.
        text_field: the field or column of a row that holds its text.

    Raises:
        UserError: something is wrong with the file.
        OSError: the file cannot be opened or read.
    """
    name = _reader_name(path)
    if name is None:
        raise bad_source(
            path, f"got ending {path.suffix!r}, expected {ENDINGS}; convert or rename it"
        )
    read, unpack = _READERS[name]
    with _open_regular(path) as file:
        before = os.fstat(file.fileno())
        allowed = max(BOMB_BYTES, BOMB_RATIO * before.st_size)
        try:
            if read is None:
                yield from _limited(_parquet_texts(file, path, text_field, allowed), allowed, path)
            else:
                blocks = _limited(_unpacked(file, path, unpack), allowed, path)
                yield from read(blocks, path, text_field)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _damaged(path, unpack, error) from error
        except UnicodeDecodeError as error:
            raise bad_source(path, f"not UTF-8 ({error.reason}); convert it to UTF-8") from error
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise bad_source(path, "changed while it was read; wait until its writer is done")


def _open_regular(path: Path) -> BinaryIO:
    """Open a file, and refuse a pipe or device, which could block for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise bad_source(path, "got a pipe or a device, expected a regular file; copy it into one")
    return os.fdopen(descriptor, "rb")


def _limited(parts: Iterable[Part], allowed: int, path: Path) -> Iterator[Part]:
    """Yield the parts; refuse more than `allowed` characters or bytes of them together."""
    total = 0
    for part in parts:
        total += len(part)
        if total > allowed:
            raise _bomb(path, allowed)
        yield part


def _bomb(path: Path, allowed: int) -> UserError:
    return bad_source(
        path,
        f"holds more than {allowed / 2**20:.0f} MiB of text, expected at most {BOMB_RATIO} times"
        " its size on disk; if it is no mistake, unpack it into plain files",
    )


def _unpacked(file: BinaryIO, path: Path, packing: str) -> Iterator[bytes]:
    """Yield the unpacked content of a file in blocks."""
    if packing == ".gz":
        # Closing a GzipFile leaves `file` open.
        with gzip.GzipFile(fileobj=file) as plain:
            yield from _blocks(plain)
    elif packing == ".zst":
        # Importing pyarrow, on which datasets depends, is slow, and only this packing needs it.
        import pyarrow as pa  # noqa: PLC0415

        if os.fstat(file.fileno()).st_size:
            # pyarrow may close its file at any time, so that it gets a descriptor of its own.
            own = os.fdopen(os.dup(file.fileno()), "rb")
            try:
                yield from _blocks(pa.CompressedInputStream(pa.PythonFile(own, mode="r"), "zstd"))
            except OSError as error:
                raise _damaged(path, packing, error) from error
    else:
        yield from _blocks(file)


def _blocks(file: Any) -> Iterator[bytes]:  # noqa: ANN401 - pyarrow's files are no BinaryIO
    while block := file.read(_BLOCK_BYTES):
        yield block


def _txt_texts(blocks: Iterable[bytes], path: Path, _: str) -> Iterator[str]:
    """Yield the whole file, or the pieces of `split_text` if it is longer than one piece."""
    decoder = io.IncrementalNewlineDecoder(
        codecs.getincrementaldecoder("utf-8-sig")(), translate=True
    )
    held, chars, num_bytes = "", 0, 0
    for block in itertools.chain(blocks, (b"",)):
        num_bytes += len(block)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            position = num_bytes - len(error.object) + error.start
            raise bad_source(
                path, f"not UTF-8 ({error.reason}, position {position}); convert it to UTF-8"
            ) from error
        if (found := text.find("\0")) != -1:
            raise bad_source(
                path,
                f"holds a NUL at character {chars + found}, expected text; it is binary or UTF-16,"
                " convert it to UTF-8",
            )
        chars += len(text)
        held += text
        if len(held) > _PIECE_CHARS:
            *pieces, held = split_text(held, _PIECE_CHARS)
            yield from pieces
    if held:
        yield held


def _jsonl_texts(blocks: Iterable[bytes], path: Path, text_field: str) -> Iterator[str]:
    for number, raw in _lines(blocks, path):
        where = f"{path} line {number}"
        try:
            row = json.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise bad_source(
                where, f"not JSON in UTF-8 ({reason_of(error)}); write one object"
            ) from error
        if not isinstance(row, dict):
            got = raw.strip()[:20].decode("utf-8", "replace")
            raise bad_source(where, f"got {got!r}, expected a JSON object; write one")
        yield row_text(row, text_field, where)


def _lines(blocks: Iterable[bytes], path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield lines with their numbers, without blank ones; the last one may lack its newline."""
    held: list[bytes] = []
    number, length = 1, 0
    for block in itertools.chain(blocks, (b"\n",)):
        if not held and not block.strip():
            # Files of a hundred million blank lines must not take long.
            number += block.count(b"\n")
            continue
        first, *others = block.split(b"\n")
        for part, ended in [(first, False), *((other, True) for other in others)]:
            if ended:
                if (line := b"".join(held)).strip():
                    yield number, line
                held, number, length = [], number + 1, 0
            if part:
                held.append(part)
                length += len(part)
            if length > LINE_BYTES:
                raise bad_source(
                    f"{path} line {number}",
                    f"got more than {LINE_BYTES // 2**20} MiB, expected one document; split it",
                )


def _parquet_texts(file: BinaryIO, path: Path, text_field: str, allowed: int) -> Iterator[str]:
    """Yield the texts of a table, reading only the columns of the text or of the chats."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        with pq.ParquetFile(file) as table:
            schema, metadata = table.schema_arrow, table.metadata
        columns = _checked_columns(schema, path, text_field)
        leaves = _leaves(metadata, columns)
        if sum(leaves.values()) > allowed:
            raise _bomb(path, allowed)
        # Dictionaries stay packed, so that a few bytes of indices do not become gigabytes. The
        # dictionaries of an extension type cannot stay packed; their rows are read one by one.
        packed = not any(isinstance(schema.field(c).type, pa.BaseExtensionType) for c in columns)
        with pq.ParquetFile(file, metadata=metadata, read_dictionary=list(leaves)) as table:
            number = itertools.count()
            for batch in table.iter_batches(_PARQUET_ROWS if packed else 1, columns=columns):
                for values in zip(*(batch.column(name) for name in columns), strict=True):
                    where = f"{path} row {next(number)}"
                    row = {
                        name: _plain(value, [LINE_BYTES], where)
                        for name, value in zip(columns, values, strict=True)
                    }
                    yield row_text(row, text_field, where)
    except (pa.ArrowException, OverflowError) as error:
        raise _damaged(path, ".parquet", error) from error


def _leaves(metadata: Any, columns: list[str]) -> dict[str, int]:  # noqa: ANN401
    """Return by leaf the unpacked bytes that the file declares, repetitions left out.

    The leaves are those of the named columns.
    """
    found: dict[str, int] = {}
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    for index in range(metadata.num_columns):
        leaf = metadata.schema.column(index).path
        if any(leaf == name or leaf.startswith(f"{name}.") for name in columns):
            found[leaf] = sum(group.column(index).total_uncompressed_size for group in groups)
    return found


def _plain(value: Any, left: list[int], where: str) -> Any:  # noqa: ANN401
    """Return a value of a table as a Python value; refuse one with more than `left[0]` characters.

    Items of lists count as characters; `left[0]` is lowered in place.
    """
    import pyarrow as pa  # noqa: PLC0415

    if isinstance(value, pa.ListScalar) and value.is_valid:
        items = []
        for item in value:
            items.append(_plain(item, left, where))
            left[0] -= 1 + (len(items[-1]) if isinstance(items[-1], str) else 0)
            if left[0] < 0:
                raise bad_source(
                    where, f"got more than {LINE_BYTES // 2**20} MiB, expected one chat; split it"
                )
        return items
    if isinstance(value, pa.StructScalar) and value.is_valid:
        fields = {}
        for name, item in value.items():
            fields[name] = _plain(item, left, where)
            left[0] -= len(fields[name]) if isinstance(fields[name], str) else 1
        return fields
    return value.as_py()


def _checked_columns(schema: Any, path: Path, text_field: str) -> list[str]:  # noqa: ANN401
    """Return the columns to read; refuse a table where one is missing, double or no text."""
    columns = fields_read(schema.names, text_field, path)
    for name in columns:
        if (number := schema.names.count(name)) > 1:
            raise bad_source(
                path, f"got {number} columns named {name!r}, expected one; rename the others"
            )
        kind = schema.field(name).type
        # The messages in a list are checked row by row.
        if name == text_field and not (_is_text(kind) or _is_list(kind)):
            raise UserError(
                f"data.text_field: {path}: {name!r} holds {str(kind)[:80]}, expected text; name"
                " another column, or cast it to string"
            )
    return columns


def _is_text(kind: Any) -> bool:  # noqa: ANN401
    """Return True if an Arrow type is text, however it is stored, or only nulls."""
    import pyarrow as pa  # noqa: PLC0415

    while isinstance(kind, pa.BaseExtensionType) or pa.types.is_dictionary(kind):
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind.storage_type
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(kind) for check in (*checks, pa.types.is_null))


def _is_list(kind: Any) -> bool:  # noqa: ANN401
    import pyarrow as pa  # noqa: PLC0415

    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _damaged(path: Path, packing: str, error: Exception) -> UserError:
    kind = {".gz": "gzip", ".zst": "zstd"}.get(packing, "parquet")
    return bad_source(path, f"not readable as {kind} ({reason_of(error)}); write it anew")


# Endings of names map to the reader of the file's bytes and its packing. Parquet has no such reader
# because it needs the file itself.
_READERS = MappingProxyType(
    {
        f"{ending}{packing}": (read, packing)
        for ending, read in ((".txt", _txt_texts), (".jsonl", _jsonl_texts))
        for packing in ("", ".gz", ".zst")
    }
    | {".parquet": (None, "")}
)
ENDINGS = ".txt, .jsonl, .parquet (.txt and .jsonl also with .gz or .zst)"


def _reader_name(path: Path) -> str | None:
    name = path.name.lower()
    return next((ending for ending in _READERS if name.endswith(ending)), None)
