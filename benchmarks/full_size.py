"""One complete distillation step at Qwen3-0.6B's exact shape, on a CPU within 20 GB.

Random weights, vocabulary 151,936, one row of 2,048 tokens in packed documents, NF4 teacher (shared
and separate), 8-bit AdamW, gradient checkpointing, SMK. Each placement runs in a process of its
own: peak resident memory is the whole process', interpreter and model building included.

    python -m benchmarks full_size [--tokens 2048] [--placement shared separate] [--smoke]

The first step is reported, which compiles and makes the optimizer's state, and the second. Its peer
is the limit of 20 GB, and the shared placement for the separate one. Parity: the loss is finite,
every expert and gate moved, nothing of the backbone did. Ends in one JSON line.
"""

import argparse
import math
import time

import torch

from benchmarks.common import in_subprocess, resident_bytes
from benchmarks.registry import Goal, Option, Result, benchmark
from benchmarks.steps import Step, make_step, random_dense, random_rows, settings
from tiny_onn.conversion.verify import backbone_hash

LIMIT_BYTES = 20e9


def measure_placement(case: dict) -> dict:
    """Two steps in this process."""
    start = time.perf_counter()
    config = settings(
        f"train.compile={str(case['compiled']).lower()}",
        f"teacher.placement={case['placement']}",
        "teacher.quantization=nf4",
        "optim.name=adamw8bit",
        f"data.row_tokens={case['tokens']}",
    )
    dense = random_dense(case["model"], config, "cpu")
    vocab = dense.config.get_text_config().vocab_size
    lengths = (max(2, case["tokens"] // 8), case["tokens"] // 2)
    step = make_step(dense, config, random_rows(vocab, case["tokens"], documents=lengths))
    del dense
    made_s = time.perf_counter() - start
    still = backbone_hash(step.student)
    before = {name: _sum(p) for name, p in step.student.trainable().items()}
    held = resident_bytes("VmRSS")
    seconds, losses, phases = [], [], {}
    for _ in range(2):
        start = time.perf_counter()
        result = step()
        seconds.append(time.perf_counter() - start)
        losses.append(result.loss.item())
        phases = result.seconds
    _verify(step, before, still, losses)
    return {
        "placement": case["placement"],
        "tokens": case["tokens"],
        "make_s": made_s,
        "first_step_s": seconds[0],
        "step_s": seconds[1],
        "tokens_per_s": case["tokens"] / seconds[1],
        "held_bytes": held,
        "peak_bytes": resident_bytes("VmHWM"),
        "loss": losses[-1],
        "phases_s": phases,
    }


def _verify(step: Step, before: dict[str, float], still: str, losses: list[float]) -> None:
    unmoved = [name for name, p in step.student.trainable().items() if _sum(p) == before[name]]
    if unmoved or backbone_hash(step.student) != still or not all(map(math.isfinite, losses)):
        raise SystemExit(f"losses {losses}, unmoved {unmoved}; no time is reported")


def _sum(parameter: torch.Tensor) -> float:
    return parameter.detach().double().abs().sum().item()


@benchmark(
    "Time and peak resident memory of a step at Qwen3-0.6B's exact shape.",
    case=measure_placement,
    model=Option("Qwen3-0.6B", "a bundled shape", smoke="tiny"),
    tokens=Option(2048, smoke=64),
    placement=Option(["shared", "separate"], smoke=["separate"]),
    compile=Option(True, smoke=False),
)
def run(arguments: argparse.Namespace) -> Result:
    """Take two checked steps with every placement of the teacher."""
    case = {
        "model": arguments.model,
        "tokens": arguments.tokens,
        "compiled": arguments.compile,
    }
    rows = [in_subprocess("full_size", {**case, "placement": p}) for p in arguments.placement]
    phases = {row["placement"]: row.pop("phases_s") for row in rows}
    peaks = {f"{row['placement']}: peak / 20 GB": row["peak_bytes"] / LIMIT_BYTES for row in rows}
    ratios: dict[str, float | None] = {**peaks}
    if len(rows) == 2:
        ratios["separate / shared, time"] = rows[1]["step_s"] / rows[0]["step_s"]
    return Result(
        rows=rows,
        ratios=ratios,
        goals={name: Goal(at_most=1.0) for name in peaks},
        parity="loss finite, all experts and gates moved, backbone unchanged (SHA-256)",
        settings=case,
        more={"phases_s": phases},
    )
