"""A plan in pictures: memory and time by part, for the terminal and as a page."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from rich import filesize

from tiny_onn.console import say
from tiny_onn.errors import UserError
from tiny_onn.planning.costs import StepFlops
from tiny_onn.planning.memory import RUNTIME_BYTES, Moment
from tiny_onn.planning.plan import Plan
from tiny_onn.planning.sources import GIB
from tiny_onn.report.plan_page import Section, plan_page
from tiny_onn.report.stacks import Stacks

RUNTIME = "interpreter, libraries, context"


def name_of_devices(plan: Plan) -> str:
    """Return the device's name, with the number of GPUs if there are several."""
    return f"{plan.cluster.gpus:,} x " * (plan.cluster.gpus > 1) + plan.device.name


def memory_stacks(plan: Plan) -> Stacks:
    """Return the memory of a step's phases by part, in GiB, with the device's memory.

    The bar of a phase is its largest moment, as the backward pass has several for each layer.
    """
    runtime = RUNTIME_BYTES[plan.device.type]
    largest: dict[str, Moment] = {}
    for moment in plan.moments:
        phase = moment.name.partition(" of layer ")[0]
        if phase not in largest or moment.total > largest[phase].total:
            largest[phase] = moment
    bars = {
        moment.name: {
            name: size / GIB for name, size in {**moment.parts, RUNTIME: runtime}.items() if size
        }
        for moment in largest.values()
    }
    return Stacks(
        title=f"Memory in each phase of a step, at its largest; the peak: {plan.peak.name}",
        unit="GiB",
        bars=bars,
        limit=(plan.device.name, plan.device.memory_bytes / GIB),
    )


def time_stacks(plan: Plan) -> Stacks:
    """Return the time of a step by phase: seconds, or TFLOPs if the device's rate is unknown."""
    rows = {f"a document of {plan.config.data.row_tokens:,} tokens": plan.whole_rows}
    if plan.document_tokens < plan.config.data.row_tokens:
        rows[f"documents of {plan.document_tokens:,}"] = plan.packed
    unit, rate = "TFLOPs", 1e12
    if plan.has_rate:
        unit, rate = "s", plan.device.bf16_tflops * 1e12 * plan.efficiency
    bars: Mapping[str, Mapping[str, float]] = {
        name: {
            item.name.replace("_", " "): getattr(step, item.name) / rate
            for item in fields(StepFlops)
            if getattr(step, item.name)
        }
        | {part.name: part.seconds for part in plan.collectives if plan.has_rate}
        for name, step in rows.items()
    }
    return Stacks(title="Time of one step by part", unit=unit, bars=bars, form="{:,.3g}")


def time_of_run(plan: Plan) -> str:
    """Tell how long the whole run takes, or why that is unknown."""
    whole, packed = plan.seconds(plan.whole_rows), plan.seconds(plan.packed)
    if whole is None or packed is None:
        return "unknown: the device's rate is for bfloat16, teacher.dtype is float32"
    if plan.document_tokens == plan.config.data.row_tokens:
        return _duration(whole)
    long, short = plan.config.data.row_tokens, plan.document_tokens
    return (
        f"{_duration(packed)} in documents of {short:,} tokens, or {_duration(whole)} in documents"
        f" of {long:,}"
    )


def disk_of_run(plan: Plan) -> str:
    """Tell how much disk the run's folder needs at its largest, and for what."""
    return f"{filesize.decimal(plan.disk.total_bytes)}, for {plan.disk}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def write_plan_page(plan: Plan, path: Path) -> None:
    """Write the page of a plan, which holds everything that it needs.

    Raises:
        UserError: the file cannot be written.
    """
    fits = "fits" if plan.fits else "does not fit"
    rate = f"{plan.device.bf16_tflops:,.4g} TFLOP/s x {plan.efficiency:g}"
    memory = Section(
        key="memory",
        heading="Does it fit?",
        answer=(
            f"It {fits}: the peak is {plan.peak_bytes / GIB:,.2f} GiB of"
            f" {plan.device.memory_bytes / GIB:,.2f} GiB, in the phase {plan.peak.name!r}."
        ),
        stacks=memory_stacks(plan),
        caption=(
            "A bar is the largest moment of a phase, and its parts are the tensors alive then. The"
            " dashed line is the device's memory."
        ),
    )
    time = Section(
        key="time",
        heading="Where does the time go?",
        answer=(
            f"A step reads {plan.config.train.rows_per_step} x {plan.config.data.row_tokens:,}"
            f" tokens. The time of all {plan.steps:,} steps, without conversion and evaluations:"
            f" {time_of_run(plan)}.{_speed(plan)}"
            f" The disk: {disk_of_run(plan)}."
        ),
        stacks=time_stacks(plan),
        caption=(
            f"The parts of a step by their FLOPs, at {rate}. Work without matrix products is left"
            f" out, as is usual; the efficiency stands for it.{_exchanges(plan)}"
            if plan.has_rate
            else "The parts of a step by their FLOPs. The device's rate is for bfloat16, and the"
            " run computes in float32, so that no time can be given."
        ),
    )
    page = plan_page(f"{plan.model} on {name_of_devices(plan)}", [memory, time])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(
            f"--html: got {path}, expected a file to write to ({error.strerror}); choose another"
        ) from error
    say(f"{path}: the page of the plan")


def _speed(plan: Plan) -> str:
    """Return a sentence on the speed of several GPUs; nothing for one."""
    rate, share = plan.tokens_per_s(plan.packed), plan.share_of_linear(plan.packed)
    if not plan.collectives or rate is None or share is None:
        return ""
    return f" The GPUs read {rate:,.0f} tokens a second together, {share:.1%} of linear."


def _exchanges(plan: Plan) -> str:
    """Return a sentence on the parts in which GPUs exchange tensors; nothing for one GPU."""
    if not plan.collectives:
        return ""
    return " Each GPU computes its own rows, and the exchanges come after it; nothing overlaps."
