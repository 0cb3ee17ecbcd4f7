"""A student on a CPU beside its dense teacher: one token after another, and a prompt at once.

    python -m benchmarks cpu_inference [--shape Qwen3-0.6B SmolLM2-135M] [--dtype float32 bfloat16]
        [--k 4 8 16 24 32] [--tokens 512] [--seconds 5] [--turns 3] [--threads 2] [--keep] [--smoke]

Both have random weights of the shape. A decoded token follows a prompt of 16 tokens in the models'
own growing cache; the prompt's time includes the head for its last token. The limit is the ratio of
the weights that a decoded token has to read. Every case is measured for `--seconds`, and for at
least `--turns` turns. With `--keep` the rows of other shapes and number formats stay in the record.

Parity comes first: at k = 32 the student is its teacher, and at every k its logits are those of the
path that training takes. Times are taken in turns, k after k, and a ratio is the median over the
turns of teacher / student, so that it is a speed-up. CPU seconds of the process stand beside wall
time, because other processes' load moves them less. Ends in one JSON line.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.common import check, relative_gap
from benchmarks.registry import Goal, Option, Result, benchmark
from benchmarks.steps import random_dense, settings
from tiny_onn.conversion.convert import convert
from tiny_onn.model.student import TinyOnnForCausalLM

PROMPT = 16
LIMITS = {"float32": 1e-4, "bfloat16": 6e-2}


def weights_read(model: Any, share: float) -> float:
    """Weights that one token reads where a share of the MLPs' weights is read."""
    mlp = {id(p) for layer in model.model.layers for p in layer.mlp.parameters()}
    inputs = model.get_input_embeddings().weight
    tied = model.config.tie_word_embeddings
    return sum(
        p.numel() * (share if id(p) in mlp else 1)
        for p in model.parameters()
        if p is not inputs or tied
    )


def decoder(model: Any, new: int) -> Callable[[], Tensor]:
    """A call that decodes tokens after a prompt that it has read before."""
    cache = DynamicCache(config=model.config.get_text_config())
    model(input_ids=torch.ones(1, PROMPT, dtype=torch.long), past_key_values=cache, use_cache=True)

    def call() -> Tensor:
        token = torch.ones(1, 1, dtype=torch.long)
        logits = torch.empty(0)
        for _ in range(new):
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
        cache.crop(-new)
        return logits

    return call


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU milliseconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def set_k(student: TinyOnnForCausalLM, k: int) -> None:
    """Let every token activate k experts."""
    for bank in student.banks():
        bank.router.set_budget(float(k))


def parity(student: TinyOnnForCausalLM, dense: Any, ks: list[int], limit: float) -> dict[str, Any]:
    """Check the student against its teacher, and against the path of training."""
    ids = torch.arange(24)[None] % dense.config.vocab_size
    checks = {}
    for k in ks:
        set_k(student, k)
        logits = student(input_ids=ids, use_cache=False).logits
        with torch.enable_grad():
            other = student(input_ids=ids, use_cache=False).logits.detach()
        checks[f"k = {k}"] = check("cpu_inference, path", relative_gap(logits, other), limit)
    set_k(student, student.config.num_experts)
    for tokens in (1, 24):
        part = ids[:, :tokens]
        got, want = (m(input_ids=part, use_cache=False).logits for m in (student, dense))
        checks[f"teacher, {tokens}"] = check("cpu_inference", relative_gap(got, want), limit)
    return checks


def measured(
    arguments: argparse.Namespace, shape: str, dtype: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of one shape and number format, and its parity checks."""
    config = settings("router.selection=top_k", f"teacher.dtype={dtype}")
    dense = random_dense(shape, config, "cpu").to(getattr(torch, dtype))
    dense.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(0)
    student = convert(dense, config.experts, config.router, generator=generator).train(False)
    student.set_attn_implementation("sdpa")
    student.requires_grad_(False)
    student.round_experts()
    checks = parity(student, dense, arguments.k, LIMITS[dtype])
    ids = torch.arange(arguments.tokens)[None] % dense.config.vocab_size
    models, rows = (student, dense), []
    for k in arguments.k:
        set_k(student, k)
        limit = weights_read(dense, 1.0) / weights_read(dense, k / config.experts.num_experts)
        decoding = [decoder(model, arguments.new) for model in models]
        reading = [
            lambda m=model: m(input_ids=ids, use_cache=False, logits_to_keep=1) for model in models
        ]
        for what, calls in (("decode", decoding), ("prompt", reading)):
            times = in_turns(calls, arguments.turns, arguments.seconds)
            row = {"shape": shape, "dtype": dtype, "what": what, "k": k, **times}
            rows.append(row | ({"limit": float(limit)} if what == "decode" else {}))
            print(rows[-1], flush=True)
    return rows, checks


def in_turns(calls: Sequence[Callable[[], object]], least: int, seconds: float) -> dict[str, float]:
    """Medians of both calls' times, milliseconds, and of the turns' speed-ups."""
    for call in calls:
        call()
    turns, end = [], time.perf_counter() + seconds
    while len(turns) < least or time.perf_counter() < end:
        order = (0, 1) if len(turns) % 2 == 0 else (1, 0)
        found = {index: timed(calls[index]) for index in order}
        ours, dense = found[0], found[1]
        turns.append((*ours, *dense, dense[0] / ours[0], dense[1] / ours[1]))
    names = ("ours_ms", "ours_cpu_ms", "dense_ms", "dense_cpu_ms", "speedup", "cpu_speedup")
    return dict(zip(names, map(statistics.median, zip(*turns, strict=True)), strict=True))


def kept(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The record's rows and parity checks that stay, of what is not measured now."""
    path = arguments.out and arguments.out / "cpu_inference.json"
    if not arguments.keep or path is None or not path.is_file():
        return [], {}
    record = json.loads(path.read_text("utf-8"))
    now = {f"{shape} {dtype}" for shape in arguments.shape for dtype in arguments.dtype}
    rows = [row for row in record["rows"] if f"{row['shape']} {row['dtype']}" not in now]
    return rows, {name: made for name, made in record["parity"].items() if name not in now}


@benchmark(
    "Time of a decoded token and of a prompt on a CPU, a student at some k beside its teacher.",
    shape=Option(["Qwen3-0.6B", "SmolLM2-135M"], "bundled shapes", smoke=["tiny"]),
    dtype=Option(["float32", "bfloat16"], smoke=["float32"]),
    k=Option([4, 8, 16, 24, 32], smoke=[16]),
    tokens=Option(512, "of the prompt", smoke=32),
    new=Option(4, "decoded tokens of one turn", smoke=2),
    seconds=Option(5.0, "of a case", smoke=0.0),
    turns=Option(3, "of a case at least", smoke=1),
    threads=Option(2),
    keep=Option(default=False, help="keep the record's rows of other shapes and number formats"),
)
@torch.no_grad()
def run(arguments: argparse.Namespace) -> Result:
    """Check, then time both models in turns."""
    torch.set_num_threads(arguments.threads)
    rows, checks = kept(arguments)
    for shape in arguments.shape:
        for dtype in arguments.dtype:
            found, checks[f"{shape} {dtype}"] = measured(arguments, shape, dtype)
            rows += found
    goals, ratios = {}, {}
    for row in rows:
        name = f"{row['shape']}, {row['dtype']}, {row['what']}, k={row['k']}, dense / ours"
        ratios[name] = row["speedup"]
        if row["k"] == 16:
            least = 0.9 * row["limit"] if row["what"] == "decode" else 1.2
            goals[name] = Goal(at_least=least)
        elif row["k"] <= 24:
            goals[name] = Goal(at_least=1.0)
    names = ("tokens", "new", "seconds", "turns", "threads")
    return Result(
        rows=rows,
        ratios=ratios,
        goals=goals,
        parity=checks,
        settings={name: getattr(arguments, name) for name in names},
    )
