"""The environment variables by which a launcher, such as torchrun, tells a process its place."""

import os
import socket

from tiny_onn.errors import UserError


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


def was_restarted() -> bool:
    """Return True if torchrun started this process anew after another one had failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def launch_name() -> str | None:
    """Return a name of torchrun's launch, which a restart does not change; None without one.

    It is the launch's id, or its agent on this machine where the user gave no id.
    """
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return None
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name != "none":
        return name
    # Every command imports this module, and few run under torchrun.
    import psutil  # noqa: PLC0415

    agent = psutil.Process(os.getppid())
    return f"process {agent.pid} on {socket.gethostname()} since {agent.create_time()}"
