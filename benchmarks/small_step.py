"""A whole training step of a small model on a GPU: tokens per second, and where the time goes.

    python -m benchmarks small_step [--model SmolLM2-135M] [--tokens 32768] [--profile]

The default recipe (the preset `recommended`) on packed rows of documents of 1K to 2K random tokens,
random weights of a bundled shape. `--variant` picks ways to run the same step; each is checked
against the first one's loss before any is timed. `--profile` prints the kernels that take most
time, the number of launches, and the host's time.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import measure
from benchmarks.registry import Goal, Option, Result, benchmark
from benchmarks.steps import FIXED, Step, make_step, random_dense, random_rows
from tiny_onn.config.read import load_config
from tiny_onn.distill.clock import Clock

KEPT, SPARSE = "train.checkpointing=none", "train.expert_path=sparse"
SAMPLED = "smk.lesson_share=0.125"
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "keep activations": (KEPT,),
    "as preset": (),
    "without graphs": (KEPT, "train.cuda_graphs=false"),
    "keep attention": ("train.checkpointing=selective",),
    "sparse": (KEPT, SPARSE),
    "sparse, layers recomputed": (SPARSE,),
    "sparse, attention kept": ("train.checkpointing=selective", SPARSE),
    "sparse, sampled lesson": (KEPT, SPARSE, SAMPLED),
    "layers recomputed, without graphs": ("train.cuda_graphs=false",),
}


def recipe(preset: str, tokens: int, smoke: bool, *overrides: str) -> Any:
    """The preset's settings with random experts and gates, and `overrides`."""
    fixed = [*FIXED, f"data.row_tokens={tokens}", f"train.compile={str(not smoke).lower()}"]
    return load_config(None, preset, [*fixed, "loss.chunk_tokens=4096", *overrides])


def profiled(step: Step, device: str) -> dict[str, Any]:
    """One step's kernels and launches under torch's profiler."""
    clock = Clock(torch.device(device), wait=True)
    step(clock=clock)
    activities = [ProfilerActivity.CPU]
    if torch.device(device).type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        step(clock=Clock(torch.device(device)))
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in profiler.events() or []:
        if event.device_type.name == "CUDA":
            times = kernels.setdefault(event.name[:90], [0.0, 0])
            times[0] += event.device_time_total / 1e3
            times[1] += 1
    for key in ("teacher forward", "student forward", "loss", "backward", "optimizer"):
        kernels.pop(key, None)
    ranked = sorted(kernels.items(), key=lambda item: -item[1][0])
    busy = sum(ms for _, (ms, _) in ranked)
    print(f"phases { ({k: round(1e3 * v, 1) for k, v in clock.seconds.items()}) } ms")
    print(f"kernels {busy:.1f} ms busy, {sum(int(n) for _, (_, n) in ranked)} launches")
    for name, (ms, calls) in ranked[:30]:
        print(f"{ms:9.2f} ms {int(calls):6d}  {name}")
    by_shape = profiler.key_averages(group_by_input_shape=True)
    for event in sorted(by_shape, key=lambda e: -e.self_device_time_total)[:60]:
        ms = event.self_device_time_total / 1e3
        print(f"{ms:9.2f} ms {event.count:6d}  {event.key[:40]} {str(event.input_shapes)[:80]}")
    return {"busy_ms": busy, "phases_s": clock.seconds}


@benchmark(
    "A whole training step of a small model: tokens per second.",
    model=Option("SmolLM2-135M", "a bundled shape", smoke="tiny"),
    preset=Option("recommended", "the recipe"),
    tokens=Option(32768, "the tokens of a row", smoke=256),
    variant=Option(
        list(VARIANTS), "ways to run the step", choices=list(VARIANTS), smoke=list(VARIANTS)[:2]
    ),
    profile=Option(False, "print each variant's kernels"),
    repeats=Option(10, "timed steps of each variant", smoke=2),
    set=Option([""], "further settings of all variants, as section.key=value"),
)
def run(arguments: argparse.Namespace) -> Result:
    """Time the step in every variant, after a check that their losses agree."""
    smoke, device = arguments.model == "tiny", arguments.device
    documents = (16, 32) if smoke else (1024, 2048)
    steps: dict[str, Step] = {}
    losses: dict[str, float] = {}
    profiles = {}
    for name in arguments.variant:
        overrides = [*VARIANTS[name], *filter(None, arguments.set)]
        config = recipe(arguments.preset, arguments.tokens, smoke, *overrides)
        dense = random_dense(arguments.model, config, device)
        vocab = dense.config.get_text_config().vocab_size
        rows = random_rows(vocab, arguments.tokens, documents=documents, num_rows=4)
        steps[name] = make_step(dense, config, [row.to(device) for row in rows])
        losses[name] = float(steps[name]().loss)
        if arguments.profile:
            print(f"== {name}")
            for _ in range(3):
                steps[name]()
            profiles[name] = profiled(steps[name], device)
    first = losses[arguments.variant[0]]
    apart = {name: loss for name, loss in losses.items() if abs(loss / first - 1) > 0.02}
    if apart:
        raise SystemExit(f"first losses {losses}; no time is reported")
    timings = measure(steps, repeats=arguments.repeats, warmup=2, device=device)
    rates = {name: arguments.tokens / t.p50_ms * 1e3 for name, t in timings.items()}
    rows = [
        {"step": name, **t.columns(), "tokens_per_s": rates[name]} for name, t in timings.items()
    ]
    goal = f"{arguments.variant[-1]}: tokens/s / 200,000"
    return Result(
        rows=rows,
        ratios={f"{name}: tokens/s / 200,000": rate / 200_000 for name, rate in rates.items()},
        goals={goal: Goal(at_least=1.0)},
        parity={"first losses": losses},
        settings={"model": arguments.model, "preset": arguments.preset, "tokens": arguments.tokens},
        more={"profiles": profiles},
    )
