"""Ways to decode, old and new, against dense peers: one layer, a compiled model, `generate`.

    python -m benchmarks decode_step [--device cuda] [--parts layer model generate]
        [--tokens 1 8 16] [--ks 16] [--ways ...] [--batches 1] [--treatments compiled eager]
        [--model-ways ...] [--smoke]

`layer` times the stack of `decode.py`, whose weights exceed a GPU's L2 cache, in CUDA graphs. Our
kernels run one program per token and block of neurons ("tokens"), also with launches that begin
while the kernel before ends ("tokens, overlap"), or one per block for all tokens ("tiles"). Beside
them stand the path that computes all experts, compiled, and the dense MLP as transformers has it,
with gate and up in one product, and compiled. In the stack a layer follows the other, so that
launches overlap across layers, where a model has attention between them: the model's rows decide.

`model` times Qwen3-0.6B with random weights and its student, greedy decoding with a static cache.
The same is done to both: a step is captured in a CUDA graph as it is ("eager"), or compiled by
torch.compile first ("compiled"), or compiled with products of one row by the compiler's own kernels
too ("tuned"). A step of some 60 small launches a layer hides the MLP's time behind those of norms,
rotary embeddings and the cache, which compiling fuses. Every way of the kernels is a row, and is
compiled anew, which takes most of a run.

`generate` times what users run: transformers' `generate` without an option, and with a static
cache, for which transformers itself compiles and captures the step.

Each way stands alone: one that fails becomes a row with its error. Records are printed, and
appended to `results/decode_step_DEVICE.jsonl`, as soon as they are known.
"""

import argparse
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import captured, check, environment, measure, relative_gap
from benchmarks.decode import REPLAYS
from benchmarks.decode_model import Decoder
from benchmarks.decode_ways import WAYS, attempted, layer, ways_for
from benchmarks.registry import Option, Result, benchmark
from benchmarks.steps import random_dense, settings
from tiny_onn.conversion.convert import convert
from tiny_onn.ops.decode import KernelBlocks
from tiny_onn.ops.regions import separate_compiled_code

# Of the logits' norm; bfloat16 keeps 8 bits, and logits pass many layers. Rounding also swaps
# experts of nearly equal logits, and with random weights any two experts are far from each other.
LIMIT, STUDENT_LIMIT = 1e-1, 5e-1
PARTS = ("layer", "model", "generate")
TREATMENTS = {
    "compiled": {},
    "eager": None,
    "tuned": {"options": {"coordinate_descent_tuning": True}},
}


def models(device: str, *, smoke: bool) -> tuple[Any, Any]:
    """Qwen3-0.6B with random weights, and its student, ready for generation."""
    config = settings("router.selection=top_k")
    dense: Any = random_dense("tiny" if smoke else "Qwen3-0.6B", config, device)
    dense.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(0)
    student: Any = convert(dense, config.experts, config.router, generator=generator).train(False)
    student.requires_grad_(False)
    student.round_experts()
    return dense, student


def model(
    device: str,
    batches: list[int],
    ks: list[int],
    treatments: list[str],
    names: list[str],
    *,
    smoke: bool,
) -> Iterator[dict[str, Any]]:
    """Tokens a second of both models, by number of sequences and way, eager and compiled."""
    dense, student = models(device, smoke=smoke)

    def student_speed(k: int, blocks: KernelBlocks, batch: int, treatment: str) -> dict[str, Any]:
        for bank in student.banks():
            bank.router.set_budget(float(k))
            bank.set_execution(replace(bank.execution, decode_blocks=blocks))
        return speed(student, device, batch, treatment, smoke=smoke)

    for batch, treatment in itertools.product(batches, treatments):
        ways = {"dense": partial(speed, dense, device, batch, treatment, smoke=smoke)} | {
            f"k = {k}, {name}": partial(student_speed, k, blocks, batch, treatment)
            for k in ks
            for name, blocks in ways_for(batch, names).items()
        }
        rates: dict[str, float] = {}
        for name, way in ways.items():
            made, errors = attempted({name: way})
            rates |= {key: value["tokens_per_s"] for key, value in made.items()}
            yield {
                "batch": batch,
                "treatment": treatment,
                "way": name,
                **(made[name] if made else {"error": errors[name]}),
                "ratio to dense": _ratio(rates, name),
            }


def _ratio(rates: dict[str, float], name: str) -> float | None:
    """The speed of one way as a share of the dense model's, if both are known."""
    return rates[name] / rates["dense"] if {name, "dense"} <= set(rates) else None


def speed(network: Any, device: str, batch: int, treatment: str, *, smoke: bool) -> dict[str, Any]:
    """Tokens a second of all sequences together, captured, after a check of logits and tokens."""
    new, repeats, length = (4, 1, 16) if smoke else (64, 5, 256)
    torch._dynamo.reset()
    decoder = Decoder(network, device, length, batch)

    def write(step: Callable[[], object]) -> Tensor:
        decoder.reset()
        for _ in range(new):
            step()
        return decoder.written[:, :new].clone()

    with torch.no_grad():
        decoder.reset()
        expected = decoder.step().clone()
        step = decoder.step
        options = TREATMENTS[treatment]
        if options is not None:
            step = torch.compile(decoder.step, fullgraph=True, dynamic=False, **options)
        decoder.reset()
        start = time.monotonic()
        gap = relative_gap(step(), expected)
        compile_s = time.monotonic() - start
        check("logits", gap, STUDENT_LIMIT if hasattr(network, "banks") else LIMIT)
        tokens = write(step)
        replay = captured(step, device)
        check("captured", float(not torch.equal(write(replay), tokens)), 0.0)
        again = write(replay)
        check("repeated", float(not torch.equal(again, tokens)), 0.0)
        timing = measure({"": lambda: write(replay)}, repeats=repeats, warmup=1, device=device)[""]
    seconds = timing.p50_ms / 1e3
    return {
        "tokens_per_s": batch * new / seconds,
        "ms_per_step": 1e3 * seconds / new,
        "logits_gap": gap,
        "compile_s": compile_s,
    }


def generate(device: str, ks: list[int], *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Tokens a second of transformers' `generate`, one sequence, as it is and compiled."""
    dense, student = models(device, smoke=smoke)
    for bank in student.banks():
        bank.router.set_budget(float(ks[0]))
    new = 4 if smoke else 96
    ids = torch.arange(1, 9, device=device)[None]
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    for treatment, cache in (("eager", None), ("compiled", "static")):
        rates: dict[str, float] = {}
        for name, network in (("dense", dense), (f"k = {ks[0]}", student)):

            def rate(network: Any = network, cache: str | None = cache) -> float:
                torch._dynamo.reset()

                def write() -> None:
                    network.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        cache_implementation=cache,
                        pad_token_id=0,
                        **options,
                    )

                timings = measure({"": write}, repeats=3, warmup=2, device=device)
                return new / (timings[""].p50_ms / 1e3)

            made, errors = attempted({name: rate})
            rates |= made
            yield {
                "batch": 1,
                "treatment": treatment,
                "way": name,
                **({"tokens_per_s": made[name]} if made else {"error": errors[name]}),
                "ratio to dense": _ratio(rates, name),
            }


def rows_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of the table that a record makes."""
    if record["part"] == "layer":
        return [
            {
                "part": f"layer, {record['tokens']} tokens, k = {record['k']}",
                "way": name,
                "us": micro,
                "share of bandwidth": record["share_of_bandwidth"][name],
            }
            for name, micro in record["us_per_layer"].items()
        ]
    values = {"tokens_per_s": record.get("tokens_per_s"), "/ dense": record["ratio to dense"]}
    part = f"{record['part']}, {record['treatment']}, {record['batch']} at once"
    return [{"part": part, "way": record["way"], **values}]


@benchmark(
    "Ways to decode, old and new: one layer, a compiled model, and `generate`.",
    parts=Option(list(PARTS), choices=PARTS),
    tokens=Option([1, 8, 16], "numbers of tokens of the layer", smoke=[2]),
    ks=Option([16], "numbers of active experts", smoke=[2]),
    ways=Option(list(WAYS), "ways of the layer's kernels", choices=tuple(WAYS)),
    batches=Option([1], "numbers of sequences of the model", smoke=[2]),
    treatments=Option(
        ["compiled", "eager"],
        "what is done to the model's step",
        smoke=["eager"],
        choices=tuple(TREATMENTS),
    ),
    model_ways=Option(list(WAYS), "ways of the model's kernels", choices=tuple(WAYS)),
)
def run(arguments: argparse.Namespace) -> Result:
    """Run the parts; every record is printed and written at once."""
    separate_compiled_code()
    device, smoke, ks = arguments.device, arguments.smoke, arguments.ks
    of_model = (arguments.batches, ks, arguments.treatments, arguments.model_ways)
    folder: Path | None = arguments.out
    kind = torch.device(device).type
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "layer": lambda: layer(device, arguments.tokens, ks, arguments.ways, smoke=smoke),
        "model": lambda: model(device, *of_model, smoke=smoke),
        "generate": lambda: generate(device, ks, smoke=smoke),
    }
    found: list[dict[str, Any]] = []

    def record(values: dict[str, Any]) -> None:
        line = json.dumps(values)
        print(line, flush=True)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"decode_step_{kind}.jsonl").open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    record({"part": "environment", **environment(device), "smoke": smoke})
    for part in arguments.parts:
        for values in parts[part]():
            found.append({"part": part, **values})
            record(found[-1])
        gc.collect()
        if kind == "cuda":
            torch.cuda.empty_cache()
    rows = [row for values in found for row in rows_of(values)]
    ratios = {f"{r['part']}, {r['way']} / dense": r["/ dense"] for r in rows if "/ dense" in r}
    for values in found:
        micro = values.get("us_per_layer", {})
        dense = min((v for name, v in micro.items() if name.startswith("dense")), default=None)
        if dense is not None:
            where = f"layer, {values['tokens']} tokens, k = {values['k']}"
            ratios |= {f"{where}, {name} / best dense": v / dense for name, v in micro.items()}
    return Result(rows=rows, ratios=ratios, settings={"replays": REPLAYS}, more={"records": found})
