"""The time of a training step by phase and operator, from some steps under torch's profiler.

The steps run the same program as a run's, in the stage with which the run begins. The run folder
gets `profile/trace.json` (for chrome://tracing or Perfetto) and `profile/summary.json`, and no
checkpoint. The first steps compile, allocate and warm up, and do not count. On a GPU each phase
ends by waiting for the device, so that its time is its own; a run does not wait, and is faster.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

from rich.console import Console, Group
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, schedule

from tiny_onn.config.schema import RunConfig
from tiny_onn.conversion.pipeline import Prepared, prepare
from tiny_onn.data.rows import calibration_rows, training_rows
from tiny_onn.device import prepare_device
from tiny_onn.distill.assembly import assemble
from tiny_onn.distill.blockwise import blockwise_step, teacher_power
from tiny_onn.distill.clock import Clock
from tiny_onn.distill.stages import step_tokens
from tiny_onn.distill.start_checks import check_sizes
from tiny_onn.distill.step import distill_step
from tiny_onn.runs.files import write_json
from tiny_onn.runs.folder import create_run_folder, forgotten_if_refused

WARMUP_STEPS = 3
PROFILED_STEPS = 3
TOP_OPERATORS = 15
OUTSIDE = "outside the phases"


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """The time of one operator itself, without the operators that it calls."""

    name: str
    milliseconds: float
    """Time per step on the GPU, or on a CPU in all threads that called the operator."""
    calls: float
    """Number of calls per step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProfile:
    """Means over the profiled steps."""

    device: str
    steps: int
    tokens_per_step: int
    step_milliseconds: float
    phase_milliseconds: dict[str, float]
    """Time of each phase and `outside the phases`, which add up to the step."""
    operators: list[Operator]
    """The operators that take most time, the slowest first."""

    def as_dict(self) -> dict[str, object]:
        """Return the fields as JSON values."""
        return asdict(self)


def run_profile(config: RunConfig, *, out: Path, argv: Sequence[str] = ()) -> StepProfile:
    """Profile a few steps of the run that the settings describe, and show and write the result.

    Args:
        config: The settings.
        out: A new run folder.
        argv: The command line, which is recorded.

    Raises:
        UserError: Settings, text, teacher, folder or disk are unfit.
    """
    config, _ = prepare_device(config)
    check_sizes(config)
    create_run_folder(out, config, argv=argv)
    with forgotten_if_refused(out):
        prepared = prepare(config)
    folder = out / "profile"
    folder.mkdir()
    result = profile_steps(config, prepared, folder / "trace.json")
    write_json(folder / "summary.json", result.as_dict())
    console = Console()
    console.print(render(result))
    console.print(
        f"Trace: {folder / 'trace.json'}",
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
    )
    return result


def profile_steps(config: RunConfig, prepared: Prepared, trace: Path) -> StepProfile:
    """Run steps over the run's first rows, and record the last `PROFILED_STEPS` into `trace`."""
    training = assemble(config, prepared.student, prepared.teacher)
    stream = training_rows(config, prepared.tokenizer)
    device = prepared.student.banks()[0].experts.down_proj.device
    run_step = distill_step
    if config.train.blockwise_tokens:
        rows = calibration_rows(config, prepared.tokenizer, device)
        run_step = partial(blockwise_step, power=teacher_power(prepared.teacher, rows))
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiled_steps = schedule(wait=WARMUP_STEPS - 1, warmup=1, active=PROFILED_STEPS, repeat=1)
    clocks, seconds = [], []
    with profile(
        activities=activities,
        schedule=profiled_steps,
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(trace)),
        acc_events=True,
    ) as profiler:
        for _ in range(WARMUP_STEPS + PROFILED_STEPS):
            rows = training.next_rows(stream)
            clock, start = Clock(device, wait=True), perf_counter()
            inputs = (training.student, training.teacher, training.optimizer, rows)
            run_step(*inputs, training.config, clock=clock)
            seconds.append(perf_counter() - start)
            clocks.append(clock)
            profiler.step()
    phases = {
        name: sum(clock.seconds[name] for clock in clocks[WARMUP_STEPS:]) * 1e3 / PROFILED_STEPS
        for name in clocks[-1].seconds
    }
    step = sum(seconds[WARMUP_STEPS:]) * 1e3 / PROFILED_STEPS
    return StepProfile(
        device=str(device),
        steps=PROFILED_STEPS,
        tokens_per_step=step_tokens(config),
        step_milliseconds=step,
        phase_milliseconds=phases | {OUTSIDE: step - sum(phases.values())},
        operators=_operators(profiler, phases, on_gpu=device.type == "cuda"),
    )


def _operators(profiler: profile, phases: dict[str, float], *, on_gpu: bool) -> list[Operator]:
    operators = [
        Operator(
            name=event.key,
            milliseconds=(event.self_device_time_total if on_gpu else event.self_cpu_time_total)
            / (1e3 * PROFILED_STEPS),
            calls=event.count / PROFILED_STEPS,
        )
        for event in profiler.key_averages()
        # Phases and steps are ranges around operators, and kernels are counted with their callers.
        if event.device_type.name == "CPU"
        and event.key not in phases
        and not event.key.startswith("ProfilerStep")
    ]
    return sorted(operators, key=lambda o: o.milliseconds, reverse=True)[:TOP_OPERATORS]


def render(result: StepProfile) -> Group:
    """Return the tables of phases and operators."""
    step = result.step_milliseconds
    rate = result.tokens_per_step / step * 1e3
    phases = Table(
        "phase",
        "ms/step",
        "share",
        title=f"{step:,.1f} ms a step, {rate:,.0f} tokens/s on {result.device}, under the profiler",
    )
    for name, milliseconds in result.phase_milliseconds.items():
        phases.add_row(name, f"{milliseconds:,.1f}", f"{milliseconds / step:.1%}")
    operators = Table("operator", "ms/step", "share", "calls/step", title="Most time in itself")
    for o in result.operators:
        operators.add_row(
            o.name, f"{o.milliseconds:,.2f}", f"{o.milliseconds / step:.1%}", f"{o.calls:,.0f}"
        )
    return Group(phases, operators)
