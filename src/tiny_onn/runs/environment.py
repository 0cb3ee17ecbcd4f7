"""The environment that a run computes in: versions, device, processes, commit and command line."""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tiny_onn.config.launcher import num_processes


def environment(device: str, argv: Sequence[str], launch: str | None) -> dict[str, object]:
    """Return what tells later in which environment a run computed.

    Args:
        device: the device in the run's settings.
        argv: the command line.
        launch: the name of torchrun's launch; None: there is none.
    """
    # Mistakes are reported by importers of this module, and shall not wait for torch.
    import torch  # noqa: PLC0415

    from tiny_onn.device import device_name, pick_device  # noqa: PLC0415

    commit, dirty = _git_state()
    return {
        "tiny_onn": own_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "platform": platform.platform(),
        "device": device_name(pick_device(device)),
        "processes": num_processes(),
        **({} if launch is None else {"launch": launch}),
        "cpu_count": os.cpu_count(),
        "git_commit": commit,
        "git_dirty": dirty,
        "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(argv),
    }


def own_version() -> str:
    """Return the version of this package, which a checkout on `PYTHONPATH` does not tell."""
    try:
        return version("tiny-onn")
    except PackageNotFoundError:
        return "(not installed)"


def _git_state() -> tuple[str | None, bool | None]:
    """Return the commit of the checkout that tracks this file, and whether it has changes."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(here.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside another project's repository, which does not track the copy.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None, None
    changes = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD"), None if changes is None else changes != ""
