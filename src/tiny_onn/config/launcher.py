"""The environment variables by which a launcher, such as torchrun, tells a process its place."""

import os

from tiny_onn.errors import UserError

# The ways of accelerate to cut a model or a row, which a program of its own has to ask for.
FOREIGN_WAYS = tuple(
    f"ACCELERATE_USE_{way}" for way in ("PARALLELISM_CONFIG", "FSDP", "DEEPSPEED", "MEGATRON_LM")
)


def check_launcher() -> None:
    """Refuse a launcher's settings that `distill` would not follow.

    Raises:
        UserError: accelerate was asked to cut models or rows over the processes.
    """
    for name in FOREIGN_WAYS:
        if (got := os.environ.get(name, "false").lower()) not in ("false", "0"):
            raise UserError(
                f"{name}: got {got} from accelerate, expected none of its ways to cut a model or a"
                " row over GPUs, because distill divides its work itself (train.shard), and a row"
                " lies on one GPU; choose plain multi-GPU in `accelerate config`, or use torchrun"
            )


def launcher_number(name: str, default: int | None = None) -> int:
    """Return a variable of the launcher.

    Args:
        name: the variable's name.
        default: its value where no launcher has set it; None: it must be set.

    Raises:
        UserError: the variable is no number, or is missing.
    """
    text = os.environ.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdigit()):
        raise UserError(
            f"{name}: got {text or 'nothing'} in the environment, expected the number that a"
            " launcher sets; start several processes with torchrun, or one without WORLD_SIZE"
        )
    return int(text)


def num_processes() -> int:
    """Return the number of processes that the launcher started, 1 without a launcher.

    Raises:
        UserError: the variable WORLD_SIZE is no number.
    """
    return launcher_number("WORLD_SIZE", 1)


def is_first() -> bool:
    """Return True in the process that prints for all."""
    return os.environ.get("RANK", "0") == "0"


def under_torchrun() -> bool:
    """Return True if torchrun, which starts processes anew when one has failed, started this."""
    return "TORCHELASTIC_RESTART_COUNT" in os.environ
