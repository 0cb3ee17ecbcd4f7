"""A run's folder on disk: what it was made from, where it ran, and what it measured.

    config.json        every setting, resolved
    environment.json   versions, device, command line; environment-N.json for the N-th resumption
    metrics.jsonl      one JSON object per line, in the order of writing

Checkpoints and models lie in the same folder and belong to `checkpoint.py`. JSON is written as
Python does: a number that is not finite comes out as NaN or Infinity, so that a diverged run can be
read.
"""

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tiny_onn.config.changes import check_changes, with_absolute_paths
from tiny_onn.config.read import config_from_json, resolved_json
from tiny_onn.config.schema import RunConfig
from tiny_onn.errors import UserError
from tiny_onn.runs.files import explain_write, write_atomically, write_json
from tiny_onn.runs.lock import LOCK_NAME
from tiny_onn.runs.metrics import METRICS_NAME, read_metrics

# Kinds of records that a run writes before its first step.
_UNTRAINED = ("start", "blocks")
_ENVIRONMENT = re.compile(r"environment(-\d+)?\.json")


def create_run_folder(path: Path, config: RunConfig, *, argv: Sequence[str]) -> None:
    """Create `path` with `config.json` and `environment.json`.

    `path` may exist if it is empty, or if it is what a run left that failed before its first step:
    such a run is started anew.

    Args:
        path: The folder; missing parents are made.
        config: The resolved settings.
        argv: The command line.

    Raises:
        UserError: Something is in it already, or it cannot be written.
    """
    with explain_write(path):
        path.mkdir(parents=True, exist_ok=True)
        early = list(path.iterdir())
        if not all(_may_go(entry) for entry in early):
            raise UserError(
                f"{path}: got a folder that is not empty, expected a new one; add --resume to go"
                " on with its run, or choose another --out"
            )
        for entry in early:
            if entry.is_dir():
                entry.rmdir()
            elif entry.name != LOCK_NAME:
                entry.unlink()
    write_json(path / "environment.json", _environment(config.train.device, argv))
    # Last, so that a folder with settings is a whole one.
    keep_settings(path, config)


def _may_go(entry: Path) -> bool:
    """Whether a file or folder is of a run, and holds nothing that the run's training made."""
    if entry.name == "checkpoints":
        return entry.is_dir() and not any(entry.iterdir())
    if entry.is_dir():
        return False
    if entry.name == METRICS_NAME:
        # A line that was cut off may be a step's.
        whole = entry.read_bytes().endswith(b"\n") or not entry.stat().st_size
        return whole and all(
            record.get("kind") in _UNTRAINED and record.get("step", 0) == 0
            for record in read_metrics(entry)
        )
    names = ("config.json", "conversion.json", LOCK_NAME)
    return entry.name in names or _ENVIRONMENT.fullmatch(entry.name) is not None


def resume_run_folder(
    path: Path, config: RunConfig, *, argv: Sequence[str], allow_change: Sequence[str] = ()
) -> None:
    """Check that `path` holds a run of the same settings and record where it goes on.

    The settings stay as they were until `keep_settings`: the run may yet refuse the changes.

    Args:
        path: The folder.
        config: The settings to go on with, paths absolute.
        argv: The command line.
        allow_change: Names of the settings that may differ; `environment-N.json` gets the
            differences.

    Raises:
        UserError: It holds no run, or one of other settings, or cannot be written.
    """
    before = with_absolute_paths(read_run_config(path))
    changes = check_changes(before, config, allow_change)
    number = 1
    while (path / f"environment-{number}.json").exists():
        number += 1
    environment = {**_environment(config.train.device, argv), "changes": changes}
    write_json(path / f"environment-{number}.json", environment)


def keep_settings(path: Path, config: RunConfig) -> None:
    """Make `config` the settings of the run in `path`.

    Raises:
        UserError: They cannot be written.
    """
    write_atomically(path / "config.json", resolved_json(config))


def read_run_config(path: Path) -> RunConfig:
    """Return the settings of the run in the folder `path`.

    Raises:
        UserError: There is no run, or its settings cannot be read.
    """
    file = path / "config.json"
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{file}: cannot read it ({error.strerror}), expected the settings of a run; check the"
            " path, or start the run without --resume"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: got a byte that is not UTF-8 at offset {error.start}, expected the settings"
            " of a run; restore the file"
        ) from error
    return config_from_json(text, str(file))


def record_conversion(path: Path, conversion: Mapping[str, object]) -> None:
    """Write what the conversion was checked to be; a resumed run's backbone must be the first's.

    Raises:
        UserError: it is not, or the file cannot be written.
    """
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8-sig")).get("backbone_sha256")
        if before != conversion["backbone_sha256"]:
            raise UserError(
                "teacher.path: got other weights than the run began with, expected a backbone of "
                f"SHA-256 {before}; restore them, or start a new run with another --out"
            )
    write_json(path, conversion)


def _environment(device: str, argv: Sequence[str]) -> dict[str, object]:
    # A mistake in the settings of a run is told from its folder, which is read without torch.
    import torch  # noqa: PLC0415

    from tiny_onn.device import device_name, pick_device  # noqa: PLC0415

    commit, dirty = _git_state()
    return {
        "tiny_onn": version("tiny-onn"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "platform": platform.platform(),
        "device": device_name(pick_device(device)),
        "cpu_count": os.cpu_count(),
        "git_commit": commit,
        "git_dirty": dirty,
        "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(argv),
    }


def _git_state() -> tuple[str | None, bool | None]:
    """Return the commit of the checkout that tracks this file, if any, and if it has changes."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(here.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside another project's repository, which does not track it.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None, None
    changes = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD"), None if changes is None else changes != ""
