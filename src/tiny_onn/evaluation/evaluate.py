"""How good a student is and what it costs, against its teacher, on held-out text."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import NotRequired, TypedDict, Unpack

from tiny_onn.config.routing_checks import has_budget
from tiny_onn.config.schema import RouterConfig
from tiny_onn.console import status
from tiny_onn.data.rows import held_out_rows, text_rows
from tiny_onn.device import pick_device
from tiny_onn.evaluation.compare import compare, evaluate
from tiny_onn.runs.students import LoadedStudent, load_student, load_teacher_of
from tiny_onn.teacher.held_out import HeldOut
from tiny_onn.teacher.load import teacher_for

# Share by which a mean number of experts may miss its budget without being called off target.
BUDGET_TOLERANCE = 0.02


def budget_report(mean_k: float, router: RouterConfig) -> dict[str, float | bool] | None:
    """How a measured mean number of active experts compares with the budget; None without one.

    Returns:
        `target_k`, `mean_k`, `error` (the share by which the mean is above the target) and `met`,
        whether the error is at most `BUDGET_TOLERANCE` either way.
    """
    if not has_budget(router):
        return None
    error = mean_k / router.target_k - 1
    met = abs(error) <= BUDGET_TOLERANCE
    return {"target_k": router.target_k, "mean_k": mean_k, "error": error, "met": met}


def shown_k(mean_k: float, router: RouterConfig) -> str:
    """A mean number of active experts beside its target, with what it misses if that is much."""
    report = budget_report(mean_k, router)
    if report is None:
        return f"{mean_k:.2f}"
    miss = "" if report["met"] else f" ({report['error']:+.1%}, OFF TARGET)"
    return f"{mean_k:.2f} / {router.target_k:g}{miss}"


class EvalOptions(TypedDict):
    """What a student is measured on, and how it is found."""

    text: Path | None
    """A file or folder; None: held-out text of the student's run."""
    device: str
    """Where to run."""
    max_tokens: int
    """Tokens to read, at most."""
    checkpoint: NotRequired[str]
    """Which of a run's students; see `load_student`."""
    teacher: NotRequired[str | None]
    """Where the student's teacher is; see `load_student`."""


def run_eval(model: str, **options: Unpack[EvalOptions]) -> dict[str, object]:
    """The verb `eval`: a student against its teacher, on a file or on its run's held-out text.

    The teacher is the dense model as it is; where the run's teacher was quantised, the result also
    says what that cost the teacher itself, under `quantised_teacher`.

    Args:
        model: a run folder or a student's folder.
        options: see `EvalOptions`.

    Raises:
        UserError: no such model or text, or the teacher cannot be had or is another model.
    """
    loaded, held_out, source = load_for_eval(model, **options)
    with status(f"Evaluating on {source}"):
        result = evaluate(loaded.student, held_out, loaded.config.loss)
    found: dict[str, object] = dict(asdict(result))
    if loaded.config.teacher.quantization != "none":
        settings = replace(loaded.config.teacher, placement="separate")
        quantised = teacher_for(held_out.teacher, settings)
        found["quantised_teacher"] = asdict(compare(quantised, held_out, loaded.config.loss))
    about = {"model": model, "step": loaded.step, "teacher": loaded.config.teacher.path}
    budget = budget_report(result.mean_k, loaded.config.router)
    return {**about, "text": source, **found, "budget": budget}


def load_for_eval(model: str, **options: Unpack[EvalOptions]) -> tuple[LoadedStudent, HeldOut, str]:
    """A student, the rows to measure on with its teacher, and what these are in words.

    Args:
        model: a run folder or a student's folder.
        options: see `EvalOptions`.

    Raises:
        UserError: as `run_eval`.
    """
    where, text = pick_device(options["device"]), options["text"]
    checkpoint = options.get("checkpoint", "newest")
    loaded = load_student(model, where, checkpoint, options.get("teacher"))
    with status(f"Loading the teacher, {loaded.config.teacher.path}"):
        dense = load_teacher_of(loaded, where)
    data = loaded.config.data
    rows = (
        held_out_rows(data, loaded.tokenizer, data.row_tokens, options["max_tokens"])
        if text is None
        else text_rows(text, loaded.tokenizer, data, options["max_tokens"])
    )
    source = "held-out text of " + ", ".join(data.sources) if text is None else str(text)
    return loaded, HeldOut(dense, rows), source
