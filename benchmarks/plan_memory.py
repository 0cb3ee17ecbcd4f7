"""Does `plan` predict the peak memory of a training step? Predicted, measured, and their ratio.

Each case runs `distill_step` on a random model in a process of its own, twice: once to load and
compile everything, once measured. On a CPU the measure is the growth of peak resident memory over
what the process holds before the second model is made; on CUDA it is the peak of allocated memory.
Both runs take two steps, since the first one allocates the optimizer's state.

    python benchmarks/plan_memory.py [--device cuda] [--smoke]

Ends in one JSON line, written to `results/plan_memory_DEVICE.json` too. Exit status 1 if a ratio is
off by more than 10 %.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from tiny_onn.assembly import assemble
from tiny_onn.attention import DOCUMENT_ATTENTION
from tiny_onn.config import RunConfig
from tiny_onn.convert import convert
from tiny_onn.device import with_number_format
from tiny_onn.packing import build_row
from tiny_onn.plan import plan
from tiny_onn.plan_sources import Device, measure_cpu
from tiny_onn.prepare import set_objective
from tiny_onn.settings import load_config
from tiny_onn.step import distill_step
from tiny_onn.teacher import teacher_for

TOLERANCE = 0.1
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
SMOKE = SHAPE | {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 384}
DOCUMENTS = 4

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


def main() -> int:
    """Run every case in a process of its own and compare."""
    parser = argparse.ArgumentParser(
        description="Predicted and measured peak memory of a training step."
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--smoke", action="store_true", help="a tiny model, no verdict")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        family, *overrides = json.loads(arguments.case)
        print(json.dumps(measure(family, overrides, arguments.device, arguments.smoke)))
        return 0
    rows = [compare(*case, arguments.device, arguments.smoke) for case in CASES]
    show(rows)
    record = {
        "benchmark": "plan_memory",
        "device": arguments.device,
        "smoke": arguments.smoke,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cases": rows,
    }
    if not arguments.smoke:
        results = Path(__file__).parent / "results" / f"plan_memory_{arguments.device}.json"
        results.write_text(f"{json.dumps(record)}\n", encoding="utf-8")
    print(json.dumps(record))
    return int(not arguments.smoke and any(abs(row["ratio"] - 1) > TOLERANCE for row in rows))


def compare(family: str, overrides: tuple[str, ...], device: str, smoke: bool) -> dict:
    """One case: prediction here, measurement in a fresh process."""
    config = load_config(None, None, [*overrides, f"train.device={device}"])
    predicted = predict(family, config, device, smoke)
    command = [sys.executable, __file__, "--device", device, "--case"]
    command += [json.dumps([family, *overrides]), *(["--smoke"] if smoke else [])]
    # glibc keeps freed blocks below a threshold that grows with use; a fixed one gives tensors back
    # to the system when they are freed, so that resident memory is what is alive.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    measured = json.loads(done.stdout.splitlines()[-1])
    return {
        "model": family,
        "settings": " ".join(overrides),
        "predicted_bytes": predicted["bytes"],
        "measured_bytes": measured["bytes"],
        "ratio": predicted["bytes"] / measured["bytes"],
        "step_s": measured["step_s"],
        "efficiency": predicted["flops"] / measured["step_s"] / measured["flop_per_s"]
        if measured["flop_per_s"]
        else None,
    }


def predict(family: str, config: RunConfig, device: str, smoke: bool) -> dict:
    """The plan's peak and FLOPs of a step."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({"model_type": family, **(SMOKE if smoke else SHAPE)}))
        where = Device(
            name=device,
            type="cuda" if device == "cuda" else "cpu",
            # Decides the loss' chunk on a GPU.
            memory_bytes=torch.cuda.get_device_properties(0).total_memory
            if device == "cuda"
            else 1,
            bf16_tflops=1.0,
            bandwidth_gb_s=1.0,
        )
        document_tokens = config.data.row_tokens // DOCUMENTS
        planned = plan(config, path, where, document_tokens=document_tokens)
    return {"bytes": planned.peak.total, "flops": planned.packed.total}


def measure(family: str, overrides: list[str], device: str, smoke: bool) -> dict:
    """Peak memory and time of a step, in this process."""
    config = with_number_format(load_config(None, None, overrides), torch.device(device))
    shape = {"model_type": family, **(SMOKE if smoke else SHAPE)}
    run_steps(shape, config, device, num_steps=2)
    gc.collect()
    if device == "cpu":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        # Linux: 5 resets the peak to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_bytes("VmRSS")
        step_s = run_steps(shape, config, device, num_steps=2)
        peak = resident_bytes("VmHWM") - before
        rate = measure_cpu(getattr(torch, config.teacher.dtype)).bf16_tflops * 1e12
    else:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step_s = run_steps(shape, config, device, num_steps=2)
        peak, rate = torch.cuda.max_memory_allocated() - before, 0.0
    return {"bytes": peak, "step_s": step_s, "flop_per_s": rate}


def run_steps(shape: dict, config: RunConfig, device: str, *, num_steps: int) -> float:
    """Make a random model and train it; seconds of the last step."""
    torch.manual_seed(0)
    settings = AutoConfig.for_model(**shape)
    dtype = getattr(torch, config.teacher.dtype)
    dense = AutoModelForCausalLM.from_config(settings, dtype=dtype).to(device).train(False)
    dense.requires_grad_(False)
    dense.set_attn_implementation(DOCUMENT_ATTENTION)
    generator = torch.Generator().manual_seed(0)
    student = convert(dense, config.experts, config.router, generator=generator)
    set_objective(student.banks(), config)
    training = assemble(config, student, teacher_for(dense, config.teacher))
    del dense
    row_tokens = config.data.row_tokens
    tokens = torch.randint(0, shape["vocab_size"], (row_tokens,), generator=generator).tolist()
    size = row_tokens // DOCUMENTS
    documents = [tokens[start : start + size] for start in range(0, row_tokens, size)]
    row = build_row(documents, row_tokens=row_tokens, pad_token_id=0)
    seconds = 0.0
    for _ in range(num_steps):
        start = time.perf_counter()
        distill_step(training.student, training.teacher, training.optimizer, [row], training.config)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds


def resident_bytes(key: str) -> int:
    """A line of this process's memory accounts, by its name in /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def show(rows: list[dict]) -> None:
    """The table."""
    table = Table("model", "settings", "predicted", "measured", "ratio", "step", "of matmul rate")
    for row in rows:
        share = "-" if row["efficiency"] is None else f"{row['efficiency']:.2f}"
        table.add_row(
            row["model"],
            row["settings"],
            f"{row['predicted_bytes'] / 1e6:,.0f} MB",
            f"{row['measured_bytes'] / 1e6:,.0f} MB",
            f"{row['ratio']:.3f}",
            f"{row['step_s']:.1f} s",
            share,
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
