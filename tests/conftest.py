"""Every test runs on one thread, deterministically, with uninitialised memory that reads as NaN."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def deterministic():
    """An operation that cannot be repeated warns, and warnings are errors here."""
    # Deterministic algorithms include filling new memory, by default.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Tensors this small only lose by being shared between threads.
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)
