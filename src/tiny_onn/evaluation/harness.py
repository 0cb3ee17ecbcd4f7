"""Student and teacher on tasks of lm-evaluation-harness, with intervals of their difference.

Both models answer the same documents, so the interval is that of a paired bootstrap: documents are
drawn again with replacement, each with both models' results (Efron and Tibshirani, An Introduction
to the Bootstrap, 1993, chapter 13).
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_onn.console import say, status
from tiny_onn.device import pick_device
from tiny_onn.errors import LoadErrors, UserError, printable
from tiny_onn.model.backbone import backbone_of, generation_attention
from tiny_onn.model.quantized_experts import QuantizeTo
from tiny_onn.routing.budgets import set_budget
from tiny_onn.runs.files import write_json
from tiny_onn.runs.students import load_student, load_teacher_of

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
# A metric is a mean over documents if the mean of the logged values equals it to rounding.
TOLERANCE = 1e-9


class TaskOptions(TypedDict):
    """The tasks, and the way in which lm-evaluation-harness asks for them."""

    tasks: Sequence[str]
    """Names of tasks, groups or tags, or files that define a task."""
    tasks_folder: Path | None
    """A folder with the user's own tasks; None: the harness' own tasks alone."""
    num_fewshot: int | None
    """The number of solved examples before each question; None: as the task says."""
    limit: int | None
    """The maximum number of documents of each task; None: all."""
    batch_size: int
    """The number of texts that a model reads at once."""
    chat: bool
    """True if questions are put into the tokenizer's chat template."""


def require_extra() -> None:
    """Refuse tasks where lm-evaluation-harness is not installed.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise UserError(
            "--tasks: got tasks, expected the package lm-eval, which runs them and is not"
            " installed; install it with `pip install lm-eval scipy`"
        )


def run_tasks(
    model: str,
    *,
    device: str,
    checkpoint: str = "newest",
    teacher: str | None = None,
    budget: float | None = None,
    quantize: QuantizeTo = "none",
    out: Path | None = None,
    options: TaskOptions,
) -> dict[str, Any]:
    """Measure a student and its teacher on the same tasks.

    Args:
        model: a run folder or a student's folder.
        device: the device to run on.
        checkpoint: the choice among a run's students; see `load_student`.
        teacher: the place of the student's teacher; see `load_student`.
        budget: the mean number of active experts per token; None: as in training.
        quantize: the number format that holds the student's experts, or `none`.
        out: the folder for `tasks.json` and for the results of every document; None: none.
        options: the tasks, see `TaskOptions`.

    Returns:
        What was measured, and under `rows` a table: `task`, `metric`, `filter`, `num_documents`,
        `num_fewshot`, `student`, `teacher`, `difference`, and `interval`, the two ends of the
        difference's confidence interval, or None where the metric is no mean over documents.

    Raises:
        UserError: lm-evaluation-harness is not installed, a task is unknown or its data cannot be
            had, or the student or its teacher cannot be loaded.
    """
    require_extra()
    manager = _task_manager(options)
    loaded = load_student(model, pick_device(device), checkpoint, teacher, quantize=quantize)
    if budget is not None:
        set_budget(loaded.student, budget)
    if options["chat"] and not loaded.tokenizer.chat_template:
        raise UserError(
            f"--chat: got {model}, whose tokenizer has no chat template, expected one; leave --chat"
            " out"
        )
    with status(f"Loading the teacher, {loaded.config.teacher.path}"):
        dense = load_teacher_of(loaded, pick_device(device))
    loaded.student.round_experts()
    measured = {}
    for name, network in (("student", loaded.student), ("teacher", dense)):
        # The harness pads rows, which the attention for packed rows does not know.
        network.set_attn_implementation(generation_attention(backbone_of(network)))
        say(f"{name}: {', '.join(options['tasks'])}")
        measured[name] = _measure(network, loaded.tokenizer, manager, options)
    rows = table_rows(measured["student"], measured["teacher"])
    result = {
        "model": model,
        "step": loaded.step,
        "teacher": loaded.config.teacher.path,
        "budget": budget,
        "experts_stored_as": loaded.student.banks()[0].experts.stored_as,
        "tasks": list(options["tasks"]),
        "limit": options["limit"],
        "chat": options["chat"],
        "lm_eval_version": measured["student"].get("lm_eval_version"),
        "task_versions": measured["student"].get("versions"),
        "rows": rows,
    }
    if out is not None:
        _write(out, result, measured)
    return result


def table_rows(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the table of two results of `lm_eval.simple_evaluate`.

    Args:
        student: the student's results, with samples.
        teacher: the teacher's results on the same documents.
    """
    rows = []
    for task, metrics in student["results"].items():
        leaves = _leaves(task, student.get("group_subtasks", {}))
        for key, ours in metrics.items():
            metric, _, applied = key.partition(",")
            theirs = teacher["results"][task].get(key)
            numbers = isinstance(ours, int | float) and isinstance(theirs, int | float)
            if not applied or not numbers or metric.endswith("_stderr"):
                continue
            values = [
                _values(result, leaves, metric, applied, reported)
                for result, reported in ((student, ours), (teacher, theirs))
            ]
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": applied,
                    "num_documents": sum(
                        student["n-samples"][leaf]["effective"] for leaf in leaves
                    ),
                    "num_fewshot": student["n-shot"].get(task),
                    "student": float(ours),
                    "teacher": float(theirs),
                    "difference": float(ours) - float(theirs),
                    "interval": paired_interval(*values),
                }
            )
    return rows


def paired_interval(
    ours: Float[np.ndarray, " documents"] | None, theirs: Float[np.ndarray, " documents"] | None
) -> list[float] | None:
    """Return the bootstrap interval of the mean difference over documents.

    Args:
        ours: a model's value of every document; None: there are no such values.
        theirs: another model's values of the same documents.

    Returns:
        The ends of the percentile interval at `CONFIDENCE`, from `NUM_RESAMPLES` draws with seed 0;
        None without values, or with fewer than two documents.
    """
    if ours is None or theirs is None or len(ours) != len(theirs) or len(ours) < 2:
        return None
    # The package comes with lm-evaluation-harness.
    from scipy.stats import bootstrap  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    interval = bootstrap(
        (ours - theirs,),
        np.mean,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, 2**22 // len(ours)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return [float(interval.low), float(interval.high)]


def _values(
    result: Mapping[str, Any], leaves: Sequence[str], metric: str, applied: str, reported: float
) -> np.ndarray | None:
    """Return a metric's value of every document; None if the metric is not their mean."""
    values = [
        sample.get(metric)
        for leaf in leaves
        for sample in sorted(result["samples"].get(leaf, []), key=lambda sample: sample["doc_id"])
        if sample["filter"] == applied
    ]
    if not values or not all(isinstance(value, int | float | np.number) for value in values):
        return None
    array = np.array(values, dtype=np.float64)
    same = math.isclose(array.mean(), reported, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return array if same else None


def _leaves(task: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the tasks of a group and of its groups; of a task, the task itself."""
    below = children.get(task) or []
    return [leaf for child in below for leaf in _leaves(child, children)] if below else [task]


def _task_manager(options: TaskOptions) -> Any:  # noqa: ANN401 - lm_eval may not be installed
    """Return the harness' manager of tasks, after all tasks and their data were loaded once.

    Raises:
        UserError: a task is unknown, or its files are damaged or cannot be had.
    """
    with status("Starting lm-evaluation-harness"), quiet_harness():
        from lm_eval.tasks import TaskManager  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

        folder, names = options["tasks_folder"], list(options["tasks"])
        manager = None
        if folder is not None:
            if not folder.is_dir():
                raise UserError(
                    f"--tasks-folder: got {folder}, expected a folder with tasks' YAML files; name"
                    " one"
                )
            with LoadErrors(
                f"--tasks-folder: got {folder}, expected tasks' YAML files ({{}}); mend them".format
            ):
                manager = TaskManager(include_path=str(folder), include_defaults=False)
        if manager is None or not set(names) <= set(manager.all_tasks):
            # Reading the harness' own tasks, of which there are thousands, takes seconds.
            manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            own = "" if folder is None else f", or a task in {folder}"
            raise UserError(
                f"--tasks: got {printable(name)}, expected the name of a task of"
                f" lm-evaluation-harness{own}; `lm_eval ls tasks` lists them, and --tasks-folder"
                " names a folder with your own"
            )
        explain = (
            f"--tasks: got {printable(name)}, whose data or definition cannot be loaded ({{}}),"
            " expected a task that loads; tasks of the hub need a network or a local cache"
        )
        with status(f"Loading {name}"), quiet_harness(), LoadErrors(explain.format):
            manager.load([name])
    return manager


def _measure(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    manager: Any,  # noqa: ANN401 - lm_eval may not be installed
    options: TaskOptions,
) -> dict[str, Any]:
    """Return the results of one model, those of every document among them."""
    with quiet_harness():
        # The package is optional, and its decorators hide the signatures.
        harness: Any = import_module("lm_eval")
        models: Any = import_module("lm_eval.models.huggingface")
        reader = models.HFLM(
            pretrained=network,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=options["batch_size"],
        )
        try:
            result = harness.simple_evaluate(
                model=reader,
                tasks=list(options["tasks"]),
                task_manager=manager,
                num_fewshot=options["num_fewshot"],
                limit=options["limit"],
                apply_chat_template=options["chat"],
                log_samples=True,
                # The intervals are ours, and these are drawn for each model alone.
                bootstrap_iters=0,
            )
        except ValueError as error:
            if "unsafe" in str(error) or "multimodal" in str(error):
                raise UserError(f"--tasks: {error}; leave that task out") from error
            raise
    assert result is not None
    return dict(result)


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Silence the harness' notices, but for its bars and errors."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _write(out: Path, result: Mapping[str, Any], measured: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `tasks.json`, and `tasks_samples.jsonl` with a line for every document and model.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "tasks.json", dict(result))
        with (out / "tasks_samples.jsonl").open("w", encoding="utf-8") as file:
            for model, results in measured.items():
                for task, samples in results["samples"].items():
                    for sample in samples:
                        names = ("doc_id", "filter", *sample["metrics"])
                        line = {"model": model, "task": task} | {n: sample[n] for n in names}
                        file.write(json.dumps(line, default=str) + "\n")
        say(f"{out}: tasks.json and tasks_samples.jsonl")
    except OSError as error:
        raise UserError(
            f"--out: got {out}, expected a folder to write to ({error.strerror}); choose another"
        ) from error
