"""The run that two spawned processes are compared with."""

import pytest

from tiny_onn.distill.loop import run_distill


@pytest.fixture(scope="module")
def folder(spawned):
    """The folder of what the processes wrote; a module's `spawned` gives it and the settings."""
    return spawned[0]


@pytest.fixture(scope="module")
def whole(spawned):
    """The same run in one process, from beginning to end."""
    folder, config = spawned
    run_distill(config, out=folder / "one")
    return folder / "one"
