"""The verb `eval`: a student's quality and cost on text, compared with its teacher's."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, Unpack

from transformers import PreTrainedModel

from tiny_onn.config.routing_checks import has_budget
from tiny_onn.config.schema import RouterConfig
from tiny_onn.console import status
from tiny_onn.data.passages import Passages, held_out_passages, text_passages
from tiny_onn.device import pick_device
from tiny_onn.errors import UserError
from tiny_onn.evaluation.compare import compare
from tiny_onn.evaluation.document_sums import CONFIDENCE, NUM_RESAMPLES
from tiny_onn.evaluation.exact import at_exactly, missing, surround
from tiny_onn.evaluation.measure import Measured, measure
from tiny_onn.model.quantized_experts import QuantizeTo
from tiny_onn.report.evaluation import budget_advice
from tiny_onn.runs.folder import read_summary, resume_command
from tiny_onn.runs.students import LoadedStudent, load_student, load_teacher_of
from tiny_onn.teacher.held_out import TaughtText
from tiny_onn.teacher.load import teacher_for

# The share by which a mean number of experts may miss its budget before it is off target.
BUDGET_TOLERANCE = 0.02
# The seed of all resamples, so that intervals at several budgets come from the same draws.
SEED = 0


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
    """The maximum number of tokens to read; 0: the whole text."""
    stride: NotRequired[int | None]
    """The distance of overlapping windows; None: windows do not overlap."""
    checkpoint: NotRequired[str]
    """The choice among a run's students; see `load_student`."""
    teacher: NotRequired[str | None]
    """The place of the student's teacher; see `load_student`."""
    quantize: NotRequired[QuantizeTo]
    """The number format that holds the student's experts; `none`: as they are loaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """A student, its teacher and the text to measure both on."""

    loaded: LoadedStudent
    dense: PreTrainedModel
    passages: Passages
    source: str
    """The description of the text in messages."""
    text: TaughtText

    def measure(self, budgets: list[float | None]) -> list[Measured]:
        """Measure the student at budgets; None stands for the student as it is deployed.

        Raises:
            UserError: the text cannot be read, or the student cannot run at a budget.
        """
        shown = [f"{budget:g}" for budget in budgets if budget is not None]
        at = f" with {', '.join(shown)} experts per token" if shown else ""
        with status(f"Evaluating on {self.source}{at}"):
            return measure(
                self.loaded.student,
                self.text,
                self.loaded.tokenizer,
                budgets,
                sources=self.passages.sources,
            )

    def surround(self, points: list[Measured], wanted: list[float]) -> list[Measured]:
        """Measure at budgets around the asked k, see `exact.surround`."""
        config = self.loaded.student.config
        least = float(config.routing_rule().num_shared + 1)
        limits = (least, float(config.num_experts))
        return surround(points, wanted, lambda budgets: self.measure([*budgets]), limits)

    def facts(self) -> dict[str, Any]:
        """Return what was measured, on which text, and how the intervals are made."""
        return {
            "step": self.loaded.step,
            "experts_stored_as": self.loaded.student.banks()[0].experts.stored_as,
            "teacher": self.loaded.config.teacher.path,
            "text": self.source,
            "windows": {"tokens": self.passages.row_tokens, "stride": self.passages.stride},
            "intervals_are": {
                "confidence": CONFIDENCE,
                "resamples": NUM_RESAMPLES,
                "method": "paired bootstrap of documents",
            },
        }


def run_eval(model: str, **options: Unpack[EvalOptions]) -> dict[str, Any]:
    """Compare a student with its teacher, on a text or on the held-out text of its run.

    The teacher is the dense model without quantisation. If the run quantised its teacher,
    `quantised_teacher` in the result compares the quantised teacher with the dense model.

    Args:
        model: a run folder or a student's folder.
        options: see `EvalOptions`.

    Returns:
        The numbers of the student as it is deployed with their `intervals`; `domains`, the same by
        domain; `budget`; `budget_advice`, what helps if it is missed; and `at_k`, the numbers
        at exactly the target (`exact.at_exactly`), or None, and then `at_k_missing` is the reason.

    Raises:
        UserError: there is no such model or text, or the teacher cannot be had or is another model.
    """
    bench = load_for_eval(model, **options)
    router = bench.loaded.config.router
    (deployed,) = bench.measure([None])
    result: dict[str, Any] = {"model": model, **bench.facts(), **deployed.numbers()}
    result["intervals"] = deployed.intervals(SEED)
    budget = result["budget"] = budget_report(deployed.evaluation.mean_k, router)
    missed = budget is not None and not budget["met"]
    result["budget_advice"] = _budget_advice(model, bench.loaded) if missed else None
    result |= _at_target(bench, deployed, router)
    result["domains"] = deployed.domains(SEED)
    if bench.loaded.config.teacher.quantization != "none":
        settings = replace(bench.loaded.config.teacher, placement="separate")
        quantised = teacher_for(bench.dense, settings)
        compared = compare(quantised, bench.text, bench.loaded.config.loss)
        result["quantised_teacher"] = asdict(compared)
    return result


def _budget_advice(model: str, loaded: LoadedStudent) -> str:
    """Return what helps a student that is off its target."""
    follows = loaded.student.routing_controller == "sequence"
    if not loaded.of_run:
        return budget_advice(None, follows=follows)
    summary = read_summary(Path(model)) or {}
    if summary.get("interrupted") or summary.get("steps") != loaded.step:
        return (
            "its thresholds are measured when its run ends; if that was stopped,"
            f" `{resume_command(model)}` goes on"
        )
    return budget_advice(loaded.config, follows=follows)


def _at_target(bench: Bench, deployed: Measured, router: RouterConfig) -> dict[str, Any]:
    """Return `at_k`, and `at_k_missing` where there is nothing to read."""
    target = router.target_k if has_budget(router) else deployed.evaluation.mean_k
    points = [deployed]
    if missing(points, [target]):
        try:
            points += bench.surround(points, [target])
        except UserError as error:
            return {"at_k": None, "at_k_missing": str(error).removeprefix("--budget: ")}
    found = at_exactly(points, target, SEED)
    if found is None:
        return {"at_k": None, "at_k_missing": "no budget gave a mean k beyond the target"}
    return {"at_k": found}


def load_for_eval(model: str, **options: Unpack[EvalOptions]) -> Bench:
    """Load a student and its teacher, and find the text to measure them on.

    Args:
        model: a run folder or a student's folder.
        options: see `EvalOptions`.

    Raises:
        UserError: there is no such model or text, the teacher cannot be had or is another model, or
            the experts cannot be quantised.
    """
    device, text = pick_device(options["device"]), options["text"]
    checkpoint = options.get("checkpoint", "newest")
    quantize = options.get("quantize", "none")
    loaded = load_student(model, device, checkpoint, options.get("teacher"), quantize=quantize)
    with status(f"Loading the teacher, {loaded.config.teacher.path}"):
        dense = load_teacher_of(loaded, device)
    data, tokenizer = loaded.config.data, loaded.tokenizer
    limits = {"stride": options.get("stride"), "max_tokens": options["max_tokens"]}
    passages = (
        held_out_passages(data, tokenizer, **limits)
        if text is None
        else text_passages(text, data, tokenizer, **limits)
    )
    source = "held-out text of " + ", ".join(data.sources) if text is None else str(text)
    return Bench(
        loaded=loaded,
        dense=dense,
        passages=passages,
        source=source,
        text=TaughtText(dense, passages),
    )
