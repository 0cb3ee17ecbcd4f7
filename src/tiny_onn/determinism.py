"""The same bits from the same settings on a GPU; a CPU gives them without being asked."""

import os

import torch


def ask_for_same_bits(device: torch.device | str) -> None:
    """Have torch and cuBLAS choose kernels whose results repeat, in this process from here on.

    Flash attention's backward pass, above all, adds up in no fixed order unless it is asked to.
    Call it before the GPU is first used: cuBLAS reads its environment then.
    """
    if torch.device(device).type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Strict: flash attention ignores the mode that only warns.
    torch.use_deterministic_algorithms(True)
    # Torch would fill what it allocates with NaN, a debugging aid that costs a pass over it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
