"""Publishing of files and folders, which appear whole or not at all whatever stops the machine."""

import os
import shutil
from pathlib import Path


def publish(finished: Path, target: Path, *, over_folder: bool = False) -> None:
    """Rename a finished file or folder into its place once all of it is on the disk.

    Args:
        finished: the file or folder, on the file system of `target`, under a name that nobody
            reads.
        target: the place. A file that exists there is replaced.
        over_folder: True removes a folder that exists there; otherwise it must be empty.

    Raises:
        OSError: the file system refuses.
    """
    contents = finished.rglob("*") if finished.is_dir() else ()
    for path in (*contents, finished):
        _sync(path)
    if over_folder:
        shutil.rmtree(target, ignore_errors=True)
    finished.replace(target)
    let_others_read(target)
    # The new name is stored in the parent folder, which must be on the disk too.
    _sync(target.parent)


def let_others_read(path: Path) -> None:
    """Let whoever may use a folder use the safetensors files in it; `path` is a file or a folder.

    The library lets nobody but the owner read what it writes (safetensors 0.8, its issue 782).
    """
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.suffix == ".safetensors":
            file.chmod(file.parent.stat().st_mode & 0o666)


def nearest_existing(path: Path) -> Path:
    """Return the path itself if it exists, or else the nearest of its parents that does."""
    # Path.exists raises an error for a name that is too long, os.path.exists returns False.
    return next(p for p in (path, *path.parents) if os.path.exists(p))  # noqa: PTH110


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
