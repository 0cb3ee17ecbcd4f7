"""A run's folder on a file system that all processes of the run share, some of them later."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from tiny_onn.errors import UserError
from tiny_onn.parallel import World

# A network file system may show a new file to another machine after some seconds.
SHOWN_AFTER_S = 30.0


def shown_to_all(world: World, sees: Callable[[], bool]) -> bool:
    """Wait until every process sees a file, and return False if one of them never does.

    Args:
        world: The processes, all of which make this call.
        sees: Returns True once this process sees the file.
    """
    until = time.monotonic() + SHOWN_AFTER_S
    while not (seen := sees()) and time.monotonic() < until:
        time.sleep(0.1)
    return not world.any_true(not seen)


def check_shared(file: Path, world: World) -> None:
    """Refuse a run folder that not every process sees.

    Args:
        file: A file in the folder that the first process has just written, with its own text.
        world: The processes, all of which make this call.

    Raises:
        UserError: A process sees no such file, or another one.
    """
    if world.size == 1:
        return
    expected = world.of_first(_digest(file))
    if not shown_to_all(world, lambda: _digest(file) == expected):
        raise UserError(
            f"{file.parent}: got a folder that only some of {world.size} processes see, expected"
            " one on a file system that all of them share; choose another --out"
        )


def _digest(file: Path) -> int:
    """Return a number that depends on a file's text, or 0 if there is no such file."""
    try:
        return int.from_bytes(hashlib.blake2b(file.read_bytes(), digest_size=7).digest())
    except OSError:
        return 0
