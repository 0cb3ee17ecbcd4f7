"""A lock that lets one run at a time use a folder, and that ends with the process that holds it.

The lock is the operating system's (`flock`) on the file `lock` of the folder, so that a killed
process holds no lock, whatever the signal was. The text of the file only tells which process holds
the lock. The file is removed when the run ends; a file that is left behind belongs to a run that
was killed.

On a network file system the server decides: NFS since version 4 keeps runs on different hosts
apart, but a mount with `nolock` or `local_lock=flock` does not.
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil

from tiny_onn.console import say
from tiny_onn.errors import UserError

LOCK_NAME = "lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock within the context; a lock that a killed run left is taken over.

    Args:
        folder: the run folder, which is created if it is missing.

    Raises:
        UserError: another process holds the lock (the message names its pid, host and start), or
            the folder cannot be written.
    """
    path = folder / LOCK_NAME
    try:
        descriptor = _acquire(path)
    except BlockingIOError as error:
        raise UserError(
            f"{folder}: got a folder in use by {_holder(path)}, expected one run in it at a time;"
            " wait for that run, stop it, or choose another --out"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot lock it ({error.strerror}), expected a folder with permission and"
            " space on a file system with locks; choose another --out"
        ) from error
    try:
        yield
    finally:
        # The file is removed while the lock is held, so that a process which waits for this file
        # finds afterwards that it is no longer the folder's (`_is_current`).
        path.unlink(missing_ok=True)
        os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Return True if a run uses the folder, as far as that can be told without touching its lock.

    A lock of another host counts as held, because its process cannot be asked for.
    """
    holder = _pid_and_host(folder)
    return holder is not None and (
        holder[1] != socket.gethostname() or psutil.pid_exists(holder[0])
    )


def other_host(folder: Path) -> str | None:
    """Return the name of the host whose run holds the folder; None for this host and for no run."""
    holder = _pid_and_host(folder)
    return None if holder is None or holder[1] == socket.gethostname() else holder[1]


def _pid_and_host(folder: Path) -> tuple[int, str] | None:
    try:
        holder = json.loads((folder / LOCK_NAME).read_text(encoding="utf-8"))
        return int(holder["pid"]), str(holder["host"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


# The library `filelock` is not used, because up to its release 4.2.0 it empties the file that it
# locks, and nobody could tell which run left a lock behind.
def _acquire(path: Path) -> int:
    """Lock the file, write this process into it, and return its descriptor."""
    while True:
        # A run that was refused has removed its folder together with the lock.
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_current(descriptor, path):
                os.close(descriptor)
                continue
            if os.fstat(descriptor).st_size:
                say(f"{path}: this lock was left by {_holder(path)}, which has ended; taken over")
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(_own()).encode())
        except OSError:
            os.close(descriptor)
            raise
        return descriptor


def _is_current(descriptor: int, path: Path) -> bool:
    """Return True if the open file is still the one at `path`; holders remove theirs at the end."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _own() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since_utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _holder(path: Path) -> str:
    """Return the process that the lock's text names, in words."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since_utc']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "an unknown process"
