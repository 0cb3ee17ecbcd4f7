"""Every test runs on one thread, deterministically, with uninitialised memory that reads as NaN."""

import pytest
import torch
from transformers.utils import logging


def pytest_collection_modifyitems(config, items):
    """Deselect what needs a browser unless `-m` asks for it: few machines have one."""
    if "browser" in config.getoption("-m"):
        return
    left_out = [item for item in items if item.get_closest_marker("browser")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True, scope="session")
def deterministic():
    """An operation that cannot be repeated warns, and warnings are errors here."""
    # Deterministic algorithms include filling new memory, by default.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Tensors this small only lose by being shared between threads.
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def quiet():
    """Silence transformers for a module, as a run does, and leave it as loud as it was."""
    # The hook that checks shapes must come before the package, and this file before the hook.
    from tiny_onn.teacher.load import quiet_transformers  # noqa: PLC0415

    quiet_transformers()
    yield
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    logging.set_tqdm_hook(None)
