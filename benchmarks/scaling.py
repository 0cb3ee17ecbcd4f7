"""Step time and peak memory at growing row lengths: memory should grow by the saved inputs only.

Each length runs in a process of its own: one step to load, compile and make the optimizer's state,
then measured steps. Memory is the peak of a step beyond what is held between steps (weights and
optimizer state), fitted as a + b * tokens by least squares and compared, as its peer, with what a
token cannot avoid: each layer's saved input and the last hidden states of both models.

    python -m benchmarks scaling [--model SmolLM2-135M] [--tokens 512 1024 2048 4096 8192] [--smoke]

Parity: a step of the longest row, of equal documents, gives the loss of the same documents in rows
of one document each. Random weights. Ends in one JSON line.
"""

import argparse
import statistics
import time
from functools import partial

import torch

from benchmarks.common import check, in_subprocess, peak_bytes
from benchmarks.registry import Goal, Option, Result, benchmark
from benchmarks.steps import make_step, perturb, random_dense, random_rows, settings
from tiny_onn.data.packing import PackedRow, build_row
from tiny_onn.distill.step import distill_step


def parity() -> dict:
    """Relative gap between the loss of one packed row and of its documents in rows of their own."""
    config = settings("teacher.dtype=float32", "train.compile=false")
    dense = random_dense("tiny", config, "cpu")
    whole = random_rows(dense.config.vocab_size, 96, documents=(24, 24))[0]
    ids = whole.input_ids[0].tolist()
    parts = [
        build_row([ids[start : start + 24]], row_tokens=24, pad_token_id=0)
        for start in range(0, 96, 24)
    ]

    def loss(rows: list[PackedRow]) -> float:
        step = make_step(dense, config, rows)
        perturb(step.student)
        result = distill_step(step.student, step.teacher, step.optimizer, rows, config)
        return result.loss.item()

    expected = loss(parts)
    return check("loss of packed documents", abs(loss([whole]) / expected - 1), 1e-5)


def measure_length(case: dict) -> dict:
    """Time and peak memory of a step at one length, in this process."""
    config = settings(
        f"train.compile={str(case['compiled']).lower()}",
        f"train.ffn_chunk_tokens={case['ffn_chunk_tokens']}",
    )
    dense = random_dense(case["model"], config, "cpu")
    text = dense.config.get_text_config()
    lengths = (case["document_tokens"], case["document_tokens"])
    rows = random_rows(text.vocab_size, case["tokens"], documents=lengths)
    step = make_step(dense, config, rows)
    step()
    times = []
    peaks = []
    for _ in range(case["repeats"]):
        start = time.perf_counter()
        peaks.append(peak_bytes(step))
        times.append(time.perf_counter() - start)
    width = torch.finfo(dense.dtype).bits // 8 * text.hidden_size
    return {
        "tokens": case["tokens"],
        "step_s": statistics.median(times),
        "tokens_per_s": case["tokens"] / statistics.median(times),
        "peak_bytes": statistics.median(peaks),
        "saved_bytes_per_token": width * (text.num_hidden_layers + 2),
    }


def line(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """Least squares `y = a + b * x`."""
    fit = statistics.linear_regression(xs, ys)
    return fit.intercept, fit.slope


@benchmark(
    "Time and peak memory of a step at growing row lengths.",
    case=measure_length,
    model=Option("SmolLM2-135M", "a bundled shape", smoke="tiny"),
    tokens=Option([512, 1024, 2048, 4096, 8192], smoke=[128, 512]),
    document_tokens=Option(512, smoke=64),
    ffn_chunk_tokens=Option(512, "0: the whole row", smoke=64),
    repeats=Option(2, smoke=1),
    compile=Option(True, smoke=False),
)
def run(arguments: argparse.Namespace) -> Result:
    """Check, then measure every length and fit a line."""
    gate = parity()
    case = {
        "model": arguments.model,
        "document_tokens": arguments.document_tokens,
        "ffn_chunk_tokens": arguments.ffn_chunk_tokens,
        "repeats": arguments.repeats,
        "compiled": arguments.compile,
    }
    probe = measure_length if arguments.smoke else partial(in_subprocess, "scaling")
    rows = [probe({**case, "tokens": tokens}) for tokens in arguments.tokens]
    saved = [row.pop("saved_bytes_per_token") for row in rows][-1]
    fixed, per_token = line([row["tokens"] for row in rows], [row["peak_bytes"] for row in rows])
    growth = rows[-1]["step_s"] / rows[0]["step_s"] / (rows[-1]["tokens"] / rows[0]["tokens"])
    return Result(
        rows=rows,
        ratios={
            "memory per token / saved inputs": per_token / saved,
            "time growth / token growth": growth,
        },
        goals={"memory per token / saved inputs": Goal(at_most=1.1)},
        parity=gate,
        settings=case,
        more={
            "fit": {
                "fixed_bytes": fixed,
                "bytes_per_token": per_token,
                "saved_bytes_per_token": saved,
            }
        },
    )
