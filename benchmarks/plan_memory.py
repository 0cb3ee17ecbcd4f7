"""Does `plan` predict the peak memory of a training step? Predicted, measured, and their ratio.

Each case makes a random model and takes two steps (the first one allocates the optimizer's state),
in a process of its own and twice: once to load and compile everything, once measured, beyond what
the process holds before the second model is made.

    python -m benchmarks plan_memory [--device cuda] [--gate] [--smoke]

The rate of the last step is given as a share of a matrix product's, which a CPU's plan assumes.
Parity: the loss of the last step is finite. Ends in one JSON line.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.common import in_subprocess, peak_bytes
from benchmarks.registry import Goal, Result, benchmark
from benchmarks.steps import make_step, random_dense, random_rows
from tiny_onn.config.read import load_config
from tiny_onn.config.schema import RunConfig
from tiny_onn.device import with_number_format
from tiny_onn.planning.plan import plan
from tiny_onn.planning.sources import Device, measure_cpu

GOAL = Goal(at_least=0.9, at_most=1.1)
SHAPE = {
    "vocab_size": 32768,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 65536,
}
SMALL = SHAPE | {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 384}
DOCUMENTS = 4
NUM_STEPS = 2
SMALL_CASES = (("qwen3", ("data.row_tokens=512", "train.compile=false")),)
CASES = (
    ("qwen3", ("data.row_tokens=2048",)),
    ("qwen3", ("data.row_tokens=4096",)),
    ("qwen3", ("data.row_tokens=4096", "train.compile=false")),
    ("llama", ("data.row_tokens=2048", "teacher.dtype=float32", "teacher.placement=separate")),
    ("qwen3", ("data.row_tokens=2048", "train.checkpointing=none")),
    (
        "qwen3",
        ("data.row_tokens=4096", "optim.name=adamw8bit", "optim.master_dtype=bfloat16"),
    ),
)


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """One case: prediction here, measurement in a fresh process."""
    config = load_config(None, None, [*case["settings"], f"train.device={case['device']}"])
    predicted = predict(case["shape"], config, case["device"])
    measured = in_subprocess("plan_memory", case)
    rate = measured["flop_per_s"]
    return {
        "model": case["shape"]["model_type"],
        "settings": " ".join(case["settings"]),
        "predicted_bytes": predicted["bytes"],
        "measured_bytes": measured["bytes"],
        "ratio": predicted["bytes"] / measured["bytes"],
        "step_s": measured["step_s"],
        "efficiency": predicted["flops"] / measured["step_s"] / rate if rate else None,
    }


def predict(shape: dict[str, Any], config: RunConfig, device: str) -> dict[str, float]:
    """The plan's peak and FLOPs of a step."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(shape))
        cuda = torch.device(device).type == "cuda"
        where = Device(
            name=device,
            type="cuda" if cuda else "cpu",
            # Decides the loss' chunk on a GPU.
            memory_bytes=torch.cuda.get_device_properties(device).total_memory if cuda else 1,
            bf16_tflops=1.0,
            bandwidth_gb_s=1.0,
        )
        document_tokens = config.data.row_tokens // DOCUMENTS
        planned = plan(config, path, where, document_tokens=document_tokens)
    return {"bytes": planned.peak.total, "flops": planned.packed.total}


def measure_case(case: dict[str, Any]) -> dict[str, float]:
    """Peak memory and time of a step, in this process."""
    device = torch.device(case["device"])
    config = with_number_format(load_config(None, None, case["settings"]), device)
    seconds = []

    def train() -> None:
        seconds.append(train_twice(case["shape"], config, device))

    train()
    peak = peak_bytes(train, device)
    dtype = getattr(torch, config.teacher.dtype)
    rate = measure_cpu(dtype).bf16_tflops * 1e12 if device.type == "cpu" else 0.0
    return {"bytes": peak, "step_s": seconds[-1], "flop_per_s": rate}


def train_twice(shape: dict[str, Any], config: RunConfig, device: torch.device) -> float:
    """Make a random model and train it; seconds of the last step."""
    dense = random_dense(AutoConfig.for_model(**shape), config, device)
    tokens = config.data.row_tokens
    lengths = (tokens // DOCUMENTS, tokens // DOCUMENTS)
    step = make_step(dense, config, random_rows(shape["vocab_size"], tokens, documents=lengths))
    del dense
    start = 0.0
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        loss = step().loss.item()
        if not math.isfinite(loss):
            raise SystemExit(f"{shape['model_type']}: loss {loss}; nothing is reported")
    return time.perf_counter() - start


@benchmark(
    "Peak memory of a training step as `plan` predicts it against the measured one.",
    case=measure_case,
)
def run(arguments: argparse.Namespace) -> Result:
    """Predict and measure every case."""
    shape = SMALL if arguments.smoke else SHAPE
    rows = [
        compare(
            {
                "device": arguments.device,
                "shape": {"model_type": family, **shape},
                "settings": settings,
            }
        )
        for family, settings in (SMALL_CASES if arguments.smoke else CASES)
    ]
    ratios = {
        f"{row['model']} {row['settings']}: predicted / measured": row["ratio"] for row in rows
    }
    return Result(
        rows=rows,
        ratios=ratios,
        goals={} if arguments.smoke else dict.fromkeys(ratios, GOAL),
        parity="every loss finite",
        settings={"documents": DOCUMENTS, "steps": NUM_STEPS},
    )
