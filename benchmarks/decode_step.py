"""Ways to decode, old and new, against dense peers: one layer, a compiled model, `generate`.

    python -m benchmarks decode_step [--device cuda] [--parts layer model generate]
        [--tokens 1 4 8 16] [--ks 16] [--batches 1] [--treatments compiled eager] [--smoke]

`layer` times the stack of `decode.py`, whose weights exceed a GPU's L2 cache, in CUDA graphs: our
kernels one program per token and block of neurons ("tokens") or one per block for all tokens
("tiles"), each also with launches that begin while the kernel before ends ("overlap"), the path
that computes all experts, compiled, and the dense MLP as transformers has it, with gate and up in
one product, and compiled.

`model` times Qwen3-0.6B with random weights and its student, greedy decoding with a static cache.
The same is done to both: a step is captured in a CUDA graph as it is ("eager"), or compiled by
torch.compile first ("compiled"), or compiled with products of one row by the compiler's own kernels
too ("tuned"). A model of some 60 small launches a layer hides its MLP's time
behind those of norms, rotary embeddings and the cache, which compiling fuses. Every way of the
kernels is a row of its own.

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import captured, check, environment, measure, relative_gap
from benchmarks.decode import REPLAYS, Stack, bandwidth, through, timed
from benchmarks.decode_model import Decoder
from benchmarks.registry import Option, Result, benchmark
from benchmarks.steps import random_dense, settings
from tiny_onn.conversion.convert import convert
from tiny_onn.model.experts import ExpertBank
from tiny_onn.model.router import route
from tiny_onn.ops.decode import KernelBlocks

# Of the output's norm; bfloat16 keeps 8 bits. A model's logits pass many layers.
LIMIT, MODEL_LIMIT = 2e-2, 1e-1
CHECKED_LAYERS = 2
WAYS = {
    "tokens": KernelBlocks(),
    "tokens, overlap": KernelBlocks(overlap=True),
    "tiles": KernelBlocks(tile_tokens=2),
    "tiles, overlap": KernelBlocks(tile_tokens=2, overlap=True),
    "tiles of 16, overlap": KernelBlocks(tile_tokens=2, tile_width=16, overlap=True),
    "tiles of 256, overlap": KernelBlocks(tile_tokens=2, tile_hidden=256, overlap=True),
}
PARTS = ("layer", "model", "generate")
# Each way of a compiled model is compiled anew, which takes most of a run.
MODEL_WAYS = ("tokens", "tokens, overlap", "tiles, overlap")
TREATMENTS = {
    "compiled": {},
    "eager": None,
    "tuned": {"options": {"coordinate_descent_tuning": True}},
}


def ways_for(tokens: int) -> dict[str, KernelBlocks]:
    """The ways of the kernels that differ for a number of tokens."""
    return {name: ways for name, ways in WAYS.items() if tokens > 1 or not name.startswith("tiles")}


def attempted(ways: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """What each way's preparation returns, and the errors of those that failed."""
    made, errors = {}, {}
    for name, prepare in ways.items():
        start = time.monotonic()
        try:
            made[name] = prepare()
        # Compilers raise errors of many kinds, and none shall end the other ways.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            errors[name] = f"{type(error).__name__}: {error}"[:2000]
        print(f"# {name}: {time.monotonic() - start:.1f} s {errors.get(name, '')}", flush=True)
    return made, errors


def layer(
    device: str, tokens: list[int], ks: list[int], *, smoke: bool
) -> Iterator[dict[str, Any]]:
    """One layer by number of tokens and active experts."""
    rate = max(bandwidth(device, smoke=smoke).values())
    stack = Stack(device, smoke=smoke)
    banks = stack.banks()
    with torch.no_grad():
        for number in tokens:
            generator = torch.Generator(device).manual_seed(number)
            inputs = [
                torch.randn(number, stack.D, generator=generator, device=device).to(stack.dtype)
                for _ in range(stack.layers)
            ]
            stack.budget(banks, inputs, ks[0])
            ways, errors, gaps = layer_ways(stack, banks, inputs)
            for k in ks:
                # The captured graphs read the thresholds, so that they follow them.
                stack.budget(banks, inputs, k)
                pairs = list(zip(banks, inputs, strict=True))
                chosen = sum(int(bank.route(x).active.any(0).sum()) for bank, x in pairs)
                limit = stack.active_bytes(chosen / len(banks)) / rate * 1e6
                micro = timed(ways, stack, 2 if smoke else 20)
                yield {
                    "tokens": number,
                    "k": k,
                    "us_per_layer": micro,
                    "chosen_experts": chosen / len(banks),
                    "limit_us": limit,
                    "share_of_bandwidth": {name: limit / value for name, value in micro.items()},
                    "parity": gaps,
                    **({"error": errors} if errors else {}),
                }


def layer_ways(
    stack: Stack, banks: list[ExpertBank], inputs: list[Tensor]
) -> tuple[dict[str, Callable[[], object]], dict[str, str], dict[str, float]]:
    """Every way captured, after a check of its outputs; errors and gaps by name."""
    mlps = stack.mlps()
    gaps: dict[str, float] = {}
    weights = [bank.route(x_TD).weights for bank, x_TD in zip(banks, inputs, strict=True)]

    def kernels(blocks: KernelBlocks) -> Callable[[], list[Any]]:
        def layers() -> list[Any]:
            return [_with_blocks(bank, blocks) for bank in banks]

        return layers

    named: dict[str, Callable[[], list[Any]]] = {
        **{name: kernels(blocks) for name, blocks in ways_for(len(inputs[0])).items()},
        "all experts, compiled": lambda: [_all_experts(bank) for bank in banks],
        "dense": lambda: list(mlps),
        "dense, fused": lambda: stack.fused(mlps),
        "dense, compiled": lambda: [_compiled_mlp(mlp) for mlp in mlps],
    }

    def prepare(name: str) -> Callable[[], object]:
        outputs: list[Tensor] = []
        call = through(named[name](), inputs, outputs)
        call()
        ones = torch.ones(len(inputs[0]), stack.E, device=stack.device)
        worst = 0.0
        for index in range(min(CHECKED_LAYERS, len(outputs))):
            given = ones if name.startswith("dense") else weights[index]
            expected = stack.defined(index, inputs[index], given)
            worst = max(worst, relative_gap(outputs[index], expected))
        gaps[name] = check(name, worst, LIMIT)["gap"]
        first = [output.clone() for output in outputs]
        way = captured(call, stack.device)
        way()
        again = max(map(relative_gap, outputs, first))
        # Ours repeat bit for bit; a library may choose other kernels within a graph.
        check(f"{name}: captured", again, 0.0 if name in WAYS else LIMIT)
        return way

    ways, errors = attempted({name: (lambda name=name: prepare(name)) for name in named})
    return ways, errors, gaps


def _with_blocks(bank: ExpertBank, blocks: KernelBlocks) -> Callable[[Tensor], Tensor]:
    def call(x_TD: Tensor) -> Tensor:
        bank.set_execution(replace(bank.execution, decode_blocks=blocks))
        return bank(x_TD)

    return call


def _all_experts_layer(  # noqa: PLR0917
    x_TD: Tensor,
    gate: Tensor,
    bias: Tensor,
    limit: Tensor,
    gate_up: Tensor,
    down: Tensor,
    rule: Any,
) -> Tensor:
    E, J, D = gate_up.shape
    routing = route(F.linear(x_TD.float(), gate, bias), rule, limit)
    pre_TEJ = F.linear(x_TD, gate_up.view(E * J, D)).view(-1, E, J)
    gate_TEI, up_TEI = pre_TEJ.chunk(2, -1)
    hidden_TEI = F.silu(gate_TEI) * up_TEI * routing.weights.to(x_TD.dtype)[..., None]
    return hidden_TEI.flatten(1) @ down.mT.reshape(-1, D)


def _mlp_layer(x_TD: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x_TD, gate)) * F.linear(x_TD, up), down)


def _all_experts(bank: ExpertBank) -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(_all_experts_layer, fullgraph=True, dynamic=False)
    router, experts = bank.router, bank.experts
    gate = router.weight, router.bias, router.settled
    return lambda x: compiled(x, *gate, experts.gate_up_proj, experts.down_proj, router.rule)


def _compiled_mlp(mlp: Any) -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(_mlp_layer, fullgraph=True, dynamic=False)
    weights = [getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down")]
    return lambda x: compiled(x, *weights)


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
    device: str, batches: list[int], ks: list[int], treatments: list[str], *, smoke: bool
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
            for name, blocks in ways_for(batch).items()
            if name in MODEL_WAYS
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
        check("logits", gap, MODEL_LIMIT)
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
    tokens=Option([1, 4, 8, 16], "numbers of tokens of the layer", smoke=[2]),
    ks=Option([16], "numbers of active experts", smoke=[2]),
    batches=Option([1], "numbers of sequences of the model", smoke=[2]),
    treatments=Option(
        ["compiled", "eager"],
        "what is done to the model's step",
        smoke=["eager"],
        choices=tuple(TREATMENTS),
    ),
)
def run(arguments: argparse.Namespace) -> Result:
    """Run the parts; every record is printed and written at once."""
    device, smoke, ks = arguments.device, arguments.smoke, arguments.ks
    folder: Path | None = arguments.out
    kind = torch.device(device).type
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "layer": lambda: layer(device, arguments.tokens, ks, smoke=smoke),
        "model": lambda: model(device, arguments.batches, ks, arguments.treatments, smoke=smoke),
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
