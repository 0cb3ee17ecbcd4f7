"""The metrics of a run, with one JSON record per line."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

from tiny_onn.console import say
from tiny_onn.errors import UserError
from tiny_onn.runs.files import explain_write

METRICS_NAME = "metrics.jsonl"
# The errors of a disk without space, or beyond its quota.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class MetricsWriter:
    """A context manager that appends records to a JSON-lines file, unbuffered.

    A full disk does not stop a run: records then wait in memory, in order, until there is space.
    At the end of the context the disk has everything that was written.

    Args:
        path: the file.
        offset: the number of bytes to keep, 0 for a new run; records that a resumed run had
            written after its checkpoint are cut off.

    Raises:
        UserError: the file is shorter than `offset`, or cannot be written.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path = path
        with explain_write(path):
            self._file = path.open("ab", buffering=0)
            size = self._file.seek(0, os.SEEK_END)
            if size > offset:
                self._file.truncate(offset)
        if size < offset:
            self._file.close()
            raise UserError(
                f"{path}: got {size} bytes, expected at least the {offset} bytes that the"
                " checkpoint recorded; restore the file or start a new run"
            )
        self._offset = offset
        self._waiting = b""

    @property
    def offset(self) -> int:
        """The number of bytes written so far, waiting ones included, which a checkpoint stores."""
        return self._offset

    def write(self, record: Mapping[str, object]) -> None:
        """Append one record; if the disk is full, the record waits and a line reports that once.

        Raises:
            UserError: the file system refuses for another reason.
        """
        line = json.dumps(record).encode() + b"\n"
        self._offset += len(line)
        were_waiting = bool(self._waiting)
        self._waiting += line
        with explain_write(self._path):
            try:
                self._drain()
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                if not were_waiting:
                    say(f"{self._path}: {error.strerror}; records wait in memory for space")

    def sync(self) -> None:
        """Wait until the disk has everything written, so that a checkpoint may rely on it.

        Raises:
            UserError: the file system refuses.
        """
        with explain_write(self._path):
            self._drain()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync the file to disk and close it."""
        if self._file.closed:
            return
        with explain_write(self._path), self._file:
            self._drain()
            os.fsync(self._file.fileno())

    def _drain(self) -> None:
        # A full disk may take a part of a line; the rest of the line is written later.
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class MetricsTail:
    """A reader of a metrics file that another process writes: each poll returns what is new.

    A line that is not complete yet waits for its rest. A resumed run cuts records off that it had
    written after its checkpoint; then reading begins again.

    Args:
        path: the file, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._number, self._last = path, 0, 0, b""

    def poll(self) -> tuple[list[dict[str, object]], bool]:
        """Return the records since the last poll, and True if they are the first of the file.

        Raises:
            UserError: the file cannot be read, or a complete line is no record.
        """
        try:
            with self._path.open("rb") as file:
                # The last line that was read must still stand before the offset.
                file.seek(max(0, self._offset - len(self._last)))
                anew = self._offset == 0 or file.read(len(self._last)) != self._last
                file.seek(0 if anew else self._offset)
                text = file.read()
        except FileNotFoundError:
            return [], False
        except OSError as error:
            raise _unreadable(self._path, error) from error
        if anew:
            self._offset, self._number = 0, 0
        lines = text.split(b"\n")[:-1]
        records = [
            _record(self._path, line, self._number + number)
            for number, line in enumerate(lines, start=1)
        ]
        if lines:
            self._offset += sum(len(line) + 1 for line in lines)
            self._number += len(lines)
            self._last = lines[-1] + b"\n"
        return records, anew


def read_metrics(path: Path) -> list[dict[str, object]]:
    """Return the records of a metrics file in order.

    A last line without a line break is a write that was cut off, and is left out.

    Raises:
        UserError: the file is missing, or a complete line is no record.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise _unreadable(path, error) from error
    return [_record(path, line, number) for number, line in enumerate(lines, start=1)]


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot read it ({error.strerror}), expected the metrics of a run; check the path"
    )


def _record(path: Path, line: bytes, number: int) -> dict[str, object]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(
            f"{path}: got no JSON object in line {number}, expected one metric record per line;"
            " restore the file or delete the line"
        )
    return record
