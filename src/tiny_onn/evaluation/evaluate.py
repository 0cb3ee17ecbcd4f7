"""The verb `eval`: a student's quality and cost on held-out text, compared with its teacher's."""

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

# The share by which a mean number of experts may miss its budget before it is off target.
BUDGET_TOLERANCE = 0.02


def budget_report(mean_k: float, router: RouterConfig) -> dict[str, float | bool] | None:
    """Compare a measured mean number of active experts with the budget; None without a budget.

    Returns:
        `target_k`, `mean_k`, `error` (the share by which the mean is above the target) and `met`
        (true if the error is at most `BUDGET_TOLERANCE` in either direction).
    """
    if not has_budget(router):
        return None
    error = mean_k / router.target_k - 1
    met = abs(error) <= BUDGET_TOLERANCE
    return {"target_k": router.target_k, "mean_k": mean_k, "error": error, "met": met}


def shown_k(mean_k: float, router: RouterConfig) -> str:
    """Return a mean number of active experts beside its target, with the error if it is large."""
    report = budget_report(mean_k, router)
    if report is None:
        return f"{mean_k:.2f}"
    error = "" if report["met"] else f" ({report['error']:+.1%}, OFF TARGET)"
    return f"{mean_k:.2f} / {router.target_k:g}{error}"


class EvalOptions(TypedDict):
    """The text, the device and the choice of the student for an evaluation."""

    text: Path | None
    """A file or folder of text; None: held-out text of the student's run."""
    device: str
    """The device to run on."""
    max_tokens: int
    """The maximum number of tokens to read."""
    checkpoint: NotRequired[str]
    """The choice among a run's students; see `load_student`."""
    teacher: NotRequired[str | None]
    """The place of the student's teacher; see `load_student`."""


def run_eval(model: str, **options: Unpack[EvalOptions]) -> dict[str, object]:
    """Compare a student with its teacher, on a text or on the held-out text of its run.

    The teacher is the dense model without quantisation. If the run quantised its teacher,
    `quantised_teacher` in the result compares the quantised teacher with the dense model.

    Args:
        model: a run folder or a student's folder.
        options: see `EvalOptions`.

    Raises:
        UserError: there is no such model or text, or the teacher cannot be had or is another model.
    """
    loaded, held_out, source = load_for_eval(model, **options)
    with status(f"Evaluating on {source}"):
        result = evaluate(loaded.student, held_out, loaded.config.loss)
    measured: dict[str, object] = dict(asdict(result))
    if loaded.config.teacher.quantization != "none":
        settings = replace(loaded.config.teacher, placement="separate")
        quantised = teacher_for(held_out.teacher, settings)
        measured["quantised_teacher"] = asdict(compare(quantised, held_out, loaded.config.loss))
    subject = {"model": model, "step": loaded.step, "teacher": loaded.config.teacher.path}
    budget = budget_report(result.mean_k, loaded.config.router)
    return {**subject, "text": source, **measured, "budget": budget}


def load_for_eval(model: str, **options: Unpack[EvalOptions]) -> tuple[LoadedStudent, HeldOut, str]:
    """Load a student, its teacher with the rows to measure on, and a description of these rows.

    Args:
        model: a run folder or a student's folder.
        options: see `EvalOptions`.

    Raises:
        UserError: there is no such model or text, or the teacher cannot be had or is another model.
    """
    device, text = pick_device(options["device"]), options["text"]
    checkpoint = options.get("checkpoint", "newest")
    loaded = load_student(model, device, checkpoint, options.get("teacher"))
    with status(f"Loading the teacher, {loaded.config.teacher.path}"):
        dense = load_teacher_of(loaded, device)
    data = loaded.config.data
    rows = (
        held_out_rows(data, loaded.tokenizer, data.row_tokens, options["max_tokens"])
        if text is None
        else text_rows(text, loaded.tokenizer, data, options["max_tokens"])
    )
    source = "held-out text of " + ", ".join(data.sources) if text is None else str(text)
    return loaded, HeldOut(dense, rows), source
