"""The metrics of a run, one JSON record a line."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

from tiny_onn.console import say
from tiny_onn.errors import UserError
from tiny_onn.runs.files import explain_write

METRICS_NAME = "metrics.jsonl"


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class MetricsWriter:
    """Appends records to a JSON-lines file, each with the system before `write` returns.

    A full disk does not stop a run: records then wait in memory, in order, for space. A context
    manager; closing it also waits until the disk has what was written.

    Args:
        path: The file.
        offset: Bytes of it to keep, 0 for a new run; what a resumed run had written after its
            checkpoint is cut off.

    Raises:
        UserError: The file is shorter than `offset`, or cannot be written.
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
                f"{path}: got {size} bytes, expected at least the {offset} of the checkpoint;"
                " restore the file or start a new run"
            )
        self._offset = offset
        self._waiting = b""

    @property
    def offset(self) -> int:
        """Bytes written so far, waiting ones included: what a checkpoint stores to resume from."""
        return self._offset

    def write(self, record: Mapping[str, object]) -> None:
        """Append one record; if the disk is full it waits, which is said once.

        Raises:
            UserError: The file system refuses for another reason.
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
        """Return once the disk has everything written, so that a checkpoint may count on it.

        Raises:
            UserError: The file system refuses.
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
        # What a full disk took of a line stays; the rest follows it.
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, object]]:
    """Return the records of a metrics file in order.

    A last line without its line break is a write that was cut off, and is left out.

    Raises:
        UserError: The file is missing, or a whole line of it is no record.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise UserError(
            f"{path}: cannot read it ({error.strerror}), expected the metrics of a run; check the"
            " path"
        ) from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(
                f"{path}: line {number} is no JSON object, expected one metric record per line;"
                " restore the file or delete the line"
            )
        records.append(record)
    return records
