"""Every test runs on one thread, deterministically, with uninitialised memory that reads as NaN."""

import os
import signal

import pytest
import torch
from transformers.utils import logging

import shape_types

# Before the package is imported, which is when the hook wraps its functions.
shape_types.install()

# cuBLAS reads it when the GPU is first used; without it, its products may differ between runs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# A shell starts background jobs with Ctrl-C ignored, and programs that tests start inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path, config):
    """Leave files without a compiled test unread where only these run: importing all takes long."""
    if config.getoption("-m") != "compiled and not slow" or collection_path.suffix != ".py":
        return None
    return "mark.compiled" not in collection_path.read_text("utf-8") or None


def pytest_collection_modifyitems(config, items):
    """Deselect what needs a browser unless `-m` asks for it: few machines have one."""
    if "browser" in config.getoption("-m"):
        return
    left_out = [item for item in items if item.get_closest_marker("browser")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True, scope="session")
def deterministic():
    """Make an operation that cannot be repeated an error."""
    # Deterministic algorithms include filling new memory, by default. On a CPU the warning is the
    # error; on a GPU, attention is deterministic only where more than a warning is asked for.
    torch.use_deterministic_algorithms(True, warn_only=not torch.cuda.is_available())
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
