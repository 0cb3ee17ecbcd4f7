"""Files and folders that appear in their place whole or not at all, whatever stops the machine."""

import os
import shutil
from pathlib import Path


def publish(finished: Path, target: Path, *, over_folder: bool = False) -> None:
    """Rename a finished file or folder into its place, once the disk has all of it.

    Args:
        finished: on the file system of `target`, under a name that nobody reads.
        target: its place. A file that is there is replaced.
        over_folder: whether a folder that is there is removed first; else it must be empty.

    Raises:
        OSError: the file system refuses.
    """
    contents = finished.rglob("*") if finished.is_dir() else ()
    for path in (*contents, finished):
        _sync(path)
    if over_folder:
        shutil.rmtree(target, ignore_errors=True)
    finished.replace(target)
    # The new name itself is kept in the folder.
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
