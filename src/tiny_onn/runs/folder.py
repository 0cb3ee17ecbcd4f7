"""A run's folder on disk: its settings, the environments it ran in, and its measurements.

    config.json        every setting, resolved
    environment.json   versions, device, command line; environment-N.json for the N-th resumption
    metrics.jsonl      one JSON object per line, in the order of writing
    summary.json       the results, written last

Checkpoints lie in the same folder (`checkpoint.py`), and so does the student (`students.py`). A
number that is not finite is written as NaN or Infinity, as Python does, so that the records of a
diverged run can be read. This module needs no torch until it records an environment
(`environment.py`).
"""

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny_onn.config.changes import check_changes, with_absolute_paths, with_number_format_of
from tiny_onn.config.read import config_diff, config_from_json, resolved_json
from tiny_onn.config.schema import RunConfig
from tiny_onn.errors import UserError
from tiny_onn.runs.environment import environment
from tiny_onn.runs.files import explain_write, read_object, write_atomically, write_json
from tiny_onn.runs.lock import LOCK_NAME
from tiny_onn.runs.metrics import METRICS_NAME, read_metrics
from tiny_onn.teacher.model_paths import no_folder

# Kinds of records that a run writes before its first step.
_UNTRAINED = ("start", "blocks")
SUMMARY_NAME = "summary.json"
_ENVIRONMENT = re.compile(r"environment(-\d+)?\.json")


def create_run_folder(
    path: Path, config: RunConfig, *, argv: Sequence[str], launch: str | None = None
) -> None:
    """Create `path` with `config.json` and `environment.json`.

    `path` may exist if it is empty, or if a run left it that failed before its first step; the new
    run then takes the place of that run.

    Args:
        path: the folder; missing parents are created.
        config: the resolved settings.
        argv: the command line.
        launch: the name of torchrun's launch, see `World.launch`.

    Raises:
        UserError: the folder holds something else already, or it cannot be written.
    """
    with explain_write(path):
        path.mkdir(parents=True, exist_ok=True)
        if not _cleared(path):
            raise UserError(
                f"{path}: got a folder that is not empty, expected a new one; add --resume to"
                " resume its run, or choose another --out"
            )
    write_json(path / "environment.json", environment(config.train.device, argv, launch))
    # The settings are written last, so that a folder with settings is complete.
    keep_settings(path, config)


@contextmanager
def forgotten_if_refused(path: Path) -> Iterator[None]:
    """Remove the folder of a new run, with its lock, if a `UserError` ends it without a step."""
    try:
        yield
    except UserError:
        # The reason of the error is told, whatever becomes of the files.
        with suppress(OSError, UserError):
            if _cleared(path):
                (path / LOCK_NAME).unlink(missing_ok=True)
                path.rmdir()
        raise


def _cleared(path: Path) -> bool:
    """Remove all but the lock from a folder without results; return False if it holds some."""
    early = list(path.iterdir())
    if not all(_is_replaceable(entry) for entry in early):
        return False
    for entry in early:
        if entry.is_dir():
            entry.rmdir()
        elif entry.name != LOCK_NAME:
            entry.unlink()
    return True


def _is_replaceable(entry: Path) -> bool:
    """Return True if a file or folder belongs to a run and holds no result of its training."""
    if entry.name == "checkpoints":
        return entry.is_dir() and not any(entry.iterdir())
    if entry.is_dir():
        return False
    if entry.name == METRICS_NAME:
        # A line that was cut off may be the record of a step.
        whole = entry.read_bytes().endswith(b"\n") or not entry.stat().st_size
        return whole and all(
            record.get("kind") in _UNTRAINED and record.get("step", 0) == 0
            for record in read_metrics(entry)
        )
    names = ("config.json", "conversion.json", LOCK_NAME)
    return entry.name in names or _ENVIRONMENT.fullmatch(entry.name) is not None


def resume_run_folder(
    path: Path,
    config: RunConfig,
    *,
    argv: Sequence[str],
    allow_change: Sequence[str] = (),
    launch: str | None = None,
) -> None:
    """Check that `path` holds a run with the same settings, and record the new environment.

    `config.json` keeps the old settings until `keep_settings`, since the run may still refuse the
    changes.

    Args:
        path: the folder.
        config: the settings to go on with, with absolute paths.
        argv: the command line.
        allow_change: the names of the settings that may differ; `environment-N.json` gets the
            differences.
        launch: the name of torchrun's launch, see `World.launch`.

    Raises:
        UserError: the folder holds no run, or a run with other settings, or cannot be written.
    """
    before = with_absolute_paths(read_run_config(path))
    changes = check_changes(before, config, allow_change)
    number = 1
    while (path / f"environment-{number}.json").exists():
        number += 1
    record = {**environment(config.train.device, argv, launch), "changes": changes}
    write_json(path / f"environment-{number}.json", record)


def was_begun_by(launch: str | None, path: Path) -> bool:
    """Return True if processes of a launch of torchrun began, or resumed, the run in `path`."""
    # Path.is_file raises an error for a name that is too long, os.path.isfile returns False.
    is_run = os.path.isfile(path / "config.json")  # noqa: PTH113
    records = path.glob("environment*.json") if is_run else ()
    launches = [(read_object(file) or {}).get("launch") for file in records]
    return launch is not None and launch in launches


def keep_settings(path: Path, config: RunConfig) -> None:
    """Write `config` as the settings of the run in `path`.

    Raises:
        UserError: the settings cannot be written.
    """
    write_atomically(path / "config.json", resolved_json(config))


def reopen(path: Path, config: RunConfig) -> None:
    """Write the settings with which a resumed run goes on; it counts as unfinished until its end.

    Raises:
        UserError: the settings cannot be written.
    """
    keep_settings(path, config)
    summary = read_summary(path)
    if summary is not None and not summary.get("interrupted"):
        write_json(path / SUMMARY_NAME, {**summary, "interrupted": True})


def read_summary(path: Path) -> dict[str, Any] | None:
    """Return the `summary.json` of the run in `path`; None if there is none that can be read."""
    try:
        found = json.loads((path / SUMMARY_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def finished_tokens(path: Path, config: RunConfig) -> int | None:
    """Return the number of training tokens of a run that has finished with these settings.

    A run writes its summary last, which tells that all files were written.

    Args:
        path: the run's folder.
        config: the settings to resume with.

    Returns:
        The number; None if the run has not finished, or if other settings are to be applied.

    Raises:
        UserError: there is no run, or its settings cannot be read.
    """
    began, summary = read_run_config(path), read_summary(path)
    after = with_absolute_paths(with_number_format_of(began, config))
    if config_diff(with_absolute_paths(began), after) or not (path / "student").is_dir():
        return None
    if summary is None or summary.get("interrupted"):
        return None
    tokens, planned = summary.get("tokens"), began.train.blockwise_tokens + began.train.tokens
    # A run of before that was resumed with more tokens kept the summary of its first end.
    return tokens if isinstance(tokens, int) and tokens >= planned else None


def read_run_config(path: Path) -> RunConfig:
    """Return the settings of the run in the folder `path`.

    Raises:
        UserError: there is no run, or its settings cannot be read.
    """
    file = path / "config.json"
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        refuse_several(path)
        raise UserError(
            f"{file}: cannot read it ({error.strerror}), expected the settings of a run; check the"
            " path, or start the run without --resume"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: got a byte that is not UTF-8 at offset {error.start}, expected the settings"
            " of a run; restore the file"
        ) from error
    if model_type_of(path) is not None:
        run = path.resolve().parent
        remedy = f"name its run, {run}" if has_metrics(run) else "name the folder of a run"
        raise UserError(f"{path}: got the folder of a model, expected a run; {remedy}")
    return config_from_json(text, str(file))


def model_type_of(folder: Path) -> str | None:
    """Return the type of the model that transformers finds in a folder; None if there is none."""
    file = folder / "config.json"
    try:
        # Reading a pipe would block forever.
        table = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return table.get("model_type") if isinstance(table, dict) else None


def refuse_several(folder: Path) -> None:
    """Refuse a folder of runs, or of folders of runs, where one run is meant.

    Raises:
        UserError: the folder is no run and holds runs, the first of which are named.
    """
    if names := some_runs_in(folder):
        raise UserError(f"{folder}: got a folder of runs, expected a run; name one of {names}")


def some_runs_in(folder: Path) -> str:
    """Return the names of some runs in a folder, or in its folders; empty if there are none."""
    found = _runs_inside(folder) or _runs_inside(folder, "*/*/config.json")
    return _some(found)


def _some(folders: Sequence[Path]) -> str:
    """Return the names of the first folders."""
    return ", ".join(map(str, folders[:3])) + ", ..." * (len(folders) > 3)


def settings_of_student(model: str) -> RunConfig | None:
    """Return the settings of a run, or for a student's folder the defaults with its own routing.

    Arguments are checked against them before torch is imported. None: the folder's config.json does
    not tell them, and loading the student will say why.
    """
    file = Path(model) / "config.json"
    try:
        # Reading a pipe would block forever.
        table = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}
        if table.get("model_type") != "tiny_onn":
            return read_run_config(Path(model)) if table else None
        # Students from before the table of routing options hold them beside the other attributes.
        routing, default = table.get("routing") or table, RunConfig()
        return replace(
            default,
            experts=replace(
                default.experts,
                num_experts=int(table["num_experts"]),
                num_shared=int(routing.get("num_shared", 0)),
            ),
            router=replace(
                default.router,
                selection=routing.get("selection", "budget"),
                target_k=float(routing.get("target_k", default.router.target_k)),
                oracle_budget=routing.get("oracle_budget", False),
            ),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def runs_in(folder: Path) -> list[Path]:
    """Return the folder itself if it is a run, or else the runs in it: student, static, others.

    Raises:
        UserError: there is no run.
    """
    # Path.is_file raises an error for a name that is too long, os.path.isfile returns False.
    if os.path.isfile(folder / "config.json"):  # noqa: PTH113
        return [folder]
    if not (found := _runs_inside(folder)):
        several = sorted({run.parent for run in _runs_inside(folder, "*/*/config.json")})
        remedy = "make one with `tiny-onn distill` or `tiny-onn demo`"
        raise UserError(
            f"RUN: got {folder}, expected the folder of a run, with its config.json, or a folder of"
            f" runs; {f'name one of {_some(several)}' if several else remedy}"
        )
    first = ("student", "static")
    return sorted(found, key=lambda path: [not path.name.startswith(name) for name in first])


def _runs_inside(folder: Path, pattern: str = "*/config.json") -> list[Path]:
    """Return the runs in a folder that is no run or model itself."""
    # A name that is too long, and a folder that may not be read, hold no run.
    with suppress(OSError):
        if not (folder / "config.json").is_file():
            found = sorted(file.parent for file in folder.glob(pattern))
            return [run for run in found if has_metrics(run)]
    return []


def resume_command(folder: str | Path) -> str:
    """Return the command that goes on with the run in a folder, for a shell."""
    return f"tiny-onn distill --resume --out {shlex.quote(str(folder))}"


def has_metrics(folder: Path) -> bool:
    """Return True if the folder holds the metrics of a run."""
    return (folder / METRICS_NAME).is_file()


def no_student(name: str) -> UserError:
    """Return the refusal of a name that is neither a run's folder nor a student's."""
    # Path.is_dir raises an error for a name that is too long, os.path.isdir returns False.
    why = "" if os.path.isdir(name) else f" ({no_folder(name)})"  # noqa: PTH112
    if os.path.isfile(Path(name) / "environment.json"):  # noqa: PTH113
        return UserError(
            f"MODEL: got {name}, a run that has saved no checkpoint yet, or no whole one, expected"
            " a student; wait for its first checkpoint or, if it was interrupted, go on with"
            f" `{resume_command(name)}`"
        )
    return UserError(
        f"MODEL: got {name}, expected a run folder or the folder of a Tiny-ONN student{why}; "
        "make one with `tiny-onn demo` or `tiny-onn distill`"
    )


def record_conversion(path: Path, conversion: Mapping[str, Any]) -> None:
    """Write the checks of a conversion, after comparing its backbone with the recorded one.

    Raises:
        UserError: a resumed run has another backbone than it began with, or the file cannot be
            written.
    """
    check_backbone(path, conversion["backbone_sha256"])
    write_json(path, conversion)


def check_backbone(path: Path, sha256: str) -> None:
    """Refuse a backbone of another hash than the checks of the run's conversion have.

    Raises:
        UserError: a resumed run has another backbone than it began with.
    """
    if path.exists():
        before = (read_object(path) or {}).get("backbone_sha256")
        if before != sha256:
            raise UserError(
                "teacher.path: got other weights than the run began with, expected a backbone of "
                f"SHA-256 {before}; restore those weights, or start a new run with another --out"
            )
