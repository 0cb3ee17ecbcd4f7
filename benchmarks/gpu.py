"""Everything a GPU has to say about this package, in sections, each printed as soon as it is known.

    python -m benchmarks gpu [--sections card experts sparse decode loss determinism plan]

card: the model card's step (Qwen3-0.6B's shape, 1 x 32,768 tokens, NF4 shared and separate, 8-bit
AdamW, checkpointing): time with SMK and with the gate frozen, for packed rows and whole ones, time
and share of the roofline by phase, memory with the process capped at 24 and 12 GiB. experts:
`expert_layer` at growing numbers of tokens, the crossover written down at the largest. sparse:
`sparse_layer`. decode: `decode`, one token at a time. loss: `distill_loss` at growing numbers of
tokens. determinism: two runs of some steps, compared bit for bit. plan: `plan_memory`, predicted
against measured.

Whether the operators are right on this GPU is for the tests: `python -m pytest -m gpu`. Each
section has a time budget, checked between its measurements. Every record is a JSON line, appended
to `results/gpu_NAME.jsonl` as soon as it is known.
Imports neither text nor command line: torch, transformers, jaxtyping and docstring_parser are
enough.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import decode as decoding
from benchmarks import distill_loss, gpu_card
from benchmarks.common import ROOT, Deadline, command_of, environment
from benchmarks.registry import Option, benchmark
from benchmarks.steps import make_step, perturb, random_dense, random_rows, settings

# Seconds after which a section starts nothing new.
BUDGETS = {
    "card": 200,
    "experts": 120,
    "sparse": 240,
    "decode": 180,
    "loss": 60,
    "determinism": 45,
    "plan": 60,
}


class Gpu:
    """The options that sections read."""

    def __init__(self, device: str, smoke: bool) -> None:
        # Some of torch's functions want an index.
        self.device = "cuda:0" if device == "cuda" else device
        self.smoke = smoke
        self.bnb = importlib.util.find_spec("bitsandbytes") is not None


def card(gpu: Gpu, deadline: Deadline) -> Iterator[dict]:
    """See `gpu_card.py`."""
    yield from gpu_card.run(gpu.device, deadline, smoke=gpu.smoke, bnb=gpu.bnb)


def experts(gpu: Gpu, deadline: Deadline) -> Iterator[dict]:
    """`expert_layer` in a process of its own for every number of tokens; its last line."""
    every = (2, 4, 8, 16, 32)
    # The largest first: it is the one that decides the path.
    ks = {64: ()} if gpu.smoke else {32_768: every, 2048: every, 8192: (4, 16)}
    for tokens, k in ks.items():
        if not deadline.left():
            yield {"tokens": tokens, "skipped": "time budget"}
            continue
        options = ["--device", gpu.device]
        if gpu.smoke:
            options.append("--smoke")
        else:
            options += ["--tokens", str(tokens), "--dtype", "bfloat16", "--k", *map(str, k)]
            options += ["--write-crossover"] if tokens == max(ks) else []
        yield {"tokens": tokens, **_last_line("expert_layer", options, seconds=240)}


def sparse(gpu: Gpu, deadline: Deadline) -> Iterator[dict]:
    """`sparse_layer` in a process of its own; its last line."""
    del deadline
    options = ["--device", gpu.device, *(["--smoke"] if gpu.smoke else [])]
    yield _last_line("sparse_layer", options, seconds=BUDGETS["sparse"])


def decode(gpu: Gpu, deadline: Deadline) -> Iterator[dict]:
    """See `decode`."""
    yield from decoding.records(gpu.device, deadline, smoke=gpu.smoke)


def loss(gpu: Gpu, deadline: Deadline) -> Iterator[dict]:
    """`distill_loss` at growing numbers of tokens."""
    vocab, hidden = (2048, 64) if gpu.smoke else (151_936, 1024)
    for tokens in (96,) if gpu.smoke else (4096, 8192, 16_384, 32_768):
        if not deadline.left():
            yield {"tokens": tokens, "skipped": "time budget"}
            continue
        yield distill_loss.compare(
            tokens=tokens,
            vocab=vocab,
            hidden=hidden,
            dtype="bfloat16",
            device=gpu.device,
            repeats=2 if gpu.smoke else 5,
            own_process=False,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def plan(gpu: Gpu, deadline: Deadline) -> Iterator[dict]:
    """`plan_memory` in a process of its own; its last line."""
    del deadline
    if gpu.smoke:
        # It has a smoke run of its own, of six processes.
        yield {"skipped": "smoke"}
        return
    yield _last_line("plan_memory", ["--device", torch.device(gpu.device).type], seconds=300)


def _last_line(name: str, options: list[str], *, seconds: float) -> dict:
    """The record that a benchmark ends in, or its error."""
    done = subprocess.run(
        command_of(name, *options),
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
        cwd=ROOT,
    )
    if done.returncode:
        return {"error": done.stderr[-2000:]}
    return json.loads(done.stdout.splitlines()[-1])


def determinism(gpu: Gpu, deadline: Deadline) -> Iterator[dict]:
    """Whether two runs end in the same bits, without `train.deterministic` and with it."""
    for asked in (False, True):
        if not deadline.left():
            yield {"deterministic_algorithms": asked, "skipped": "time budget"}
            continue
        _train(gpu, asked)
        start = time.perf_counter()
        first, second = (_train(gpu, asked) for _ in range(2))
        seconds = time.perf_counter() - start
        torch.use_deterministic_algorithms(False)
        differ = [name for name in first if not torch.equal(first[name], second[name])]
        yield {
            "deterministic_algorithms": asked,
            "equal": not differ,
            "seconds": seconds,
            "tensors": len(first),
            "different": len(differ),
            "largest_difference": max(
                ((first[n] - second[n]).abs().max().item() for n in differ), default=0.0
            ),
        }


def _train(gpu: Gpu, deterministic: bool) -> dict[str, Tensor]:
    config = settings(
        f"train.deterministic={str(deterministic).lower()}",
        f"train.compile={str(not gpu.smoke).lower()}",
        f"optim.name={'adamw8bit' if gpu.bnb else 'adamw'}",
    )
    name, tokens = ("tiny", 96) if gpu.smoke else ("SmolLM2-135M", 4096)
    dense = random_dense(name, config, gpu.device)
    vocab = dense.config.get_text_config().vocab_size
    rows = random_rows(vocab, tokens, documents=(tokens // 8, tokens // 4), num_rows=3)
    step = make_step(dense, config, rows)
    if gpu.smoke:
        perturb(step.student)
    for _ in range(3):
        step()
    return {name: p.detach().clone() for name, p in step.student.trainable().items()}


SECTIONS: dict[str, Callable[[Gpu, Deadline], Iterator[dict]]] = {
    "card": card,
    "experts": experts,
    "sparse": sparse,
    "decode": decode,
    "loss": loss,
    "determinism": determinism,
    "plan": plan,
}


@benchmark(
    "Everything a GPU has to say, in sections, each printed as soon as it is known.",
    device=Option("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda or cuda:N"),
    sections=Option(list(SECTIONS), choices=tuple(SECTIONS)),
    seconds=Option(None, "time budget of each section", type=float),
)
def run(arguments: argparse.Namespace) -> None:
    """Run the sections; every record is printed and written at once."""
    # Before the GPU is first used; without deterministic kernels it changes nothing.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    gpu = Gpu(arguments.device, arguments.smoke)
    device = environment(arguments.device)
    folder = arguments.out
    name = re.sub(r"[^a-z0-9]+", "_", str(device.get("gpu", "cpu")).lower())

    def record(section: str, values: dict) -> None:
        line = json.dumps({"section": section, **values})
        print(line, flush=True)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"gpu_{name}.jsonl").open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    record("environment", {**device, "sections": arguments.sections, "smoke": arguments.smoke})
    for section in sorted(arguments.sections, key=list(SECTIONS).index):
        seconds = arguments.seconds or BUDGETS[section]
        for values in _records(section, gpu, Deadline(seconds)):
            record(section, values)


def _records(name: str, gpu: Gpu, deadline: Deadline) -> Iterator[dict]:
    """A section's records; one with the error if it breaks, so that the others still run."""
    try:
        yield from SECTIONS[name](gpu, deadline)
    except (RuntimeError, ValueError, SystemExit, subprocess.TimeoutExpired) as error:
        yield {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-1500:]}
