"""A run's records in an experiment tracker, through the trackers of the library accelerate.

Tracking is off by default, and changes nothing in the run itself: `metrics.jsonl` stays the record
that everything else reads. The run folder notes in `trackers.json` which trackers a run has, with
the tracker's own id of the run, so that a resumed run goes on in the same one.
"""

import importlib
import importlib.util
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tiny_onn.config.read import resolved_json
from tiny_onn.config.schema import RunConfig
from tiny_onn.console import say
from tiny_onn.errors import UserError, reason_of
from tiny_onn.runs.files import write_json

TRACKERS_NAME = "trackers.json"
PROJECT = "tiny-onn"
# The folder of TensorBoard's files in a run's folder.
TENSORBOARD_FOLDER = "tensorboard"


# What trackers raise where a service or a file fails, beside errors of their own.
ERRORS = (OSError, RuntimeError, ValueError, ImportError)
Settings = dict[str, bool | int | float | str]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of tracker.

    Attributes:
        packages: the packages that it needs, of which any one will do.
        options: a function from the run's folder, the tracker's id of the run (None for a new one),
            the last step before this start and the settings to the arguments of accelerate's class.
        id_of: a function from accelerate's tracker to the id by which the run is found again.
        error: the module and name of the package's own error, if it is none of `ERRORS`.
    """

    packages: tuple[str, ...]
    options: Callable[[Path, str | None, int, Settings], dict[str, Any]]
    id_of: Callable[[Any], str]
    error: tuple[str, str] | None = None


def _tensorboard(folder: Path, _: str | None, step: int, __: Settings) -> dict[str, Any]:
    # A resumed run does the steps after its checkpoint again, and the last evaluation at it. So
    # everything from the checkpoint's step on is hidden, and `replay` shows what the run keeps.
    purge = {"purge_step": step} if step else {}
    return {"run_name": TENSORBOARD_FOLDER, "logging_dir": folder, **purge}


def _wandb(folder: Path, run_id: str | None, _: int, __: Settings) -> dict[str, Any]:
    resumed = {} if run_id is None else {"id": run_id, "resume": "allow"}
    return {"run_name": PROJECT, "name": folder.name, "dir": str(folder), **resumed}


def _mlflow(folder: Path, run_id: str | None, _: int, __: Settings) -> dict[str, Any]:
    return {"experiment_name": PROJECT, "run_id": run_id, "run_name": folder.name}


def _trackio(folder: Path, run_id: str | None, _: int, settings: Settings) -> dict[str, Any]:
    # trackio finds a run by its name, which folders of other places may share. It takes settings
    # only when it starts, and forgets them at a start without any.
    name = run_id or f"{folder.name}-{uuid.uuid4().hex[:8]}"
    resume = "never" if run_id is None else "allow"
    return {"run_name": PROJECT, "name": name, "resume": resume, "config": settings}


KINDS = MappingProxyType(
    {
        "tensorboard": Kind(
            ("tensorboard", "tensorboardX"), _tensorboard, lambda _: TENSORBOARD_FOLDER
        ),
        "wandb": Kind(
            ("wandb",),
            _wandb,
            lambda tracker: str(tracker.tracker.id),
            ("wandb.errors", "Error"),
        ),
        "mlflow": Kind(
            ("mlflow",),
            _mlflow,
            lambda tracker: str(tracker.tracker.info.run_id),
            ("mlflow.exceptions", "MlflowException"),
        ),
        "trackio": Kind(("trackio",), _trackio, lambda tracker: str(tracker.tracker.name)),
    }
)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed.

    Raises:
        UserError: there is no such tracker, or its package is missing.
    """
    for name in names:
        if name not in KINDS:
            raise UserError(
                f"--track: got {name}, expected one of {', '.join(KINDS)}; the records are in"
                " metrics.jsonl in any case"
            )
        packages = KINDS[name].packages
        if not any(importlib.util.find_spec(package) for package in packages):
            raise UserError(
                f"--track: got {name}, which is not installed; `pip install {packages[0]}`"
            )


def errors_of(name: str) -> tuple[type[Exception], ...]:
    """Return the errors that an installed tracker raises where a service or a file fails."""
    own = KINDS[name].error
    return ERRORS if own is None else (*ERRORS, getattr(importlib.import_module(own[0]), own[1]))


def recorded_trackers(folder: Path) -> dict[str, str]:
    """Return the trackers that a run has had so far, each with its id of the run.

    Raises:
        UserError: the record is damaged.
    """
    path = folder / TRACKERS_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot read it ({reason_of(error)}), expected the run's trackers; remove the"
            " file to go on in new ones"
        ) from error
    known = isinstance(found, dict) and all(
        name in KINDS and isinstance(run_id, str) for name, run_id in found.items()
    )
    if not known:
        raise UserError(
            f"{path}: got other trackers than {', '.join(KINDS)} with their ids, expected the run's"
            " own; remove the file to go on in new ones"
        )
    return found


class Trackers:
    """The open trackers of a run; a context manager that closes them.

    Args:
        folder: the run folder.
        names: the trackers that the user named; those that the run had before are opened too.
        config: the settings, which a new tracker run records.
        step: the number of updates before this start of the run; 0 for a new run.

    Raises:
        UserError: a tracker is unknown, not installed, or cannot be opened.
    """

    def __init__(self, folder: Path, names: Sequence[str], config: RunConfig, step: int) -> None:
        known = recorded_trackers(folder)
        wanted = list(dict.fromkeys([*known, *names]))
        check_trackers(wanted)
        self._open: dict[str, Any] = {}
        self._step = step
        if not wanted:
            return
        from accelerate import PartialState  # noqa: PLC0415 (tracking alone needs it)
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # noqa: PLC0415

        # The trackers ask which process is the main one. This run computes on no other, and the
        # device stays the run's own affair.
        PartialState(cpu=True)
        ids: dict[str, str] = {}
        with ExitStack() as undo:
            undo.callback(self.close)
            for name in wanted:
                kind = KINDS[name]
                options = kind.options(folder, known.get(name), step, flat_settings(config))
                tracker = LOGGER_TYPE_TO_CLASS[name](**options)
                try:
                    tracker.start()
                except errors_of(name) as error:
                    raise UserError(
                        f"--track: {name} cannot begin ({reason_of(error)}); leave it out, or set"
                        " it up"
                    ) from error
                self._open[name] = tracker
                ids[name] = kind.id_of(tracker)
                if name not in known:
                    _record_settings(name, tracker, config)
                where = "goes on in" if name in known else "is tracked in"
                say(f"{folder}: the run {where} {name} ({ids[name]})")
            write_json(folder / TRACKERS_NAME, ids)
            undo.pop_all()

    def log(self, record: Mapping[str, Any], only: str | None = None) -> None:
        """Hand the numbers of a record to all trackers; one that fails is left out from then on.

        Args:
            record: the record.
            only: the tracker that gets it; None: all of them.
        """
        kind = record["kind"]
        prefix = "held_out" if kind in ("start", "eval", "end") else "train"
        if not self._open or kind not in ("start", "eval", "end", "step", "blockwise"):
            return
        values = {f"{prefix}/{name}": value for name, value in numbers_in(record)}
        for name, tracker in list(self._open.items()):
            if only not in (None, name):
                continue
            try:
                tracker.log(values, step=record["step"])
            except errors_of(name) as error:
                say(f"{name}: the run goes on without it: {reason_of(error)}")
                del self._open[name]

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Show the records that a resumed run keeps of its last step where they were hidden."""
        if self._step and TENSORBOARD_FOLDER in self._open:
            for record in records:
                if record["step"] == self._step:
                    self.log(record, only=TENSORBOARD_FOLDER)

    def close(self) -> None:
        """Close all trackers."""
        while self._open:
            self._open.popitem()[1].finish()

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def numbers_in(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """Yield the numbers of a record by name, with those of parts as part/name, without `layers`."""
    for name, value in record.items():
        if name in ("layers", "step", "kind"):
            continue
        if isinstance(value, list):
            value = {str(number): item for number, item in enumerate(value)}  # noqa: PLW2901
        if isinstance(value, Mapping):
            yield from numbers_in(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def flat_settings(config: RunConfig) -> Settings:
    """Return the settings by the names `section.key`, in types that trackers take."""
    return {
        f"{section}.{key}": value if isinstance(value, bool | int | float) else str(value)
        for section, values in json.loads(resolved_json(config)).items()
        for key, value in values.items()
    }


def _record_settings(name: str, tracker: Any, config: RunConfig) -> None:  # noqa: ANN401 - accelerate's trackers share no type
    if name == "tensorboard":
        # Its own form for settings makes a second run out of each start.
        tracker.log({"settings": f"```json\n{resolved_json(config)}\n```"}, step=0)
    elif name != "trackio":
        tracker.store_init_configuration(flat_settings(config))
