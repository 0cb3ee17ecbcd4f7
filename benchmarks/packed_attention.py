"""Attention over packed rows, forward and backward: flash attention and FlexAttention.

    python -m benchmarks packed_attention --device cuda [--models SmolLM2-135M Qwen3-0.6B] [--smoke]

With `train.deterministic` the backward pass of torch's variable length flash kernel gives each
document as many blocks of the GPU as if all documents were of one length, so that a row with one
long document among several keeps few of them busy. FlexAttention, which training runs, is compiled
for a block mask of the documents and adds up in a fixed order. The heads are those of two models;
the rows hold one document, three, eleven of which one is half of the row, and 24 of about one
length. Tensors lie token by token, as projections leave them.

Parity comes first, of outputs and of gradients in bfloat16 against the flash kernel, and what is
deterministic has to repeat its gradients' bits. `mask_ms` is the time that the host takes to make
a row's block mask, once for all layers. Where the flash kernel does not run, FlexAttention's
forward pass is compared with attention that loops over documents; on a CPU it has no backward
pass.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks.common import check, measure, relative_gap
from benchmarks.registry import Goal, Option, Result, benchmark
from tiny_onn.data.packing import PackedRow, build_row
from tiny_onn.device import ask_for_same_bits
from tiny_onn.model.attention import loop_attention
from tiny_onn.model.fused_attention import DocumentBlocks, varlen_attention, varlen_supported

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
# Query heads, heads of keys and values, channels of a head.
HEADS = {"SmolLM2-135M": (9, 3, 64), "Qwen3-0.6B": (16, 8, 128), "tiny": (4, 2, 16)}
HEAVY = (16_000, 6000, 3000, 2000, 1500, 1268, 1000, 800, 500, 400, 300)
ROWS = ((4096,), (2000, 1500, 596), HEAVY, (1489, 1300, 1307) * 8)
SMOKE_ROWS = ((256,), (130, 126, 44))
DETERMINISTIC = {"flash": False, "flash deterministic": True, "flex": True, "loop": True}
WARMUP = 2
# As many calls are launched without a wait between them: the GPU is timed, not the launches.
CALLS = 8


@contextmanager
def kernels(way: str, device: torch.device) -> Iterator[None]:
    """Within the context, kernels are those that a way asks for: deterministic ones, or any."""
    if DETERMINISTIC[way]:
        ask_for_same_bits(device)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@dataclass(frozen=True, slots=True)
class Case:
    """A row's documents, queries, keys and values, and the gradient of what attention gives."""

    label: dict[str, Any]
    lengths: tuple[int, ...]
    leaves: tuple[Tensor, ...]
    grad: Tensor
    row: PackedRow

    @property
    def name(self) -> str:
        """What the case is, for the names of ratios."""
        return "{model}, {tokens} tokens, documents={documents}".format(**self.label)

    def mask(self) -> object:
        """The block mask, made anew."""
        return DocumentBlocks(self.row.position_ids).mask()

    def forward_of(self, way: str) -> Callable[[], Tensor]:
        """Attention in one of the ways, of shape (1, tokens, heads, channels)."""
        q, k, v = self.leaves
        if way == "loop":
            bounds = tuple(itertools.accumulate(self.lengths, initial=0))
            return partial(loop_attention, q, k, v, bounds)
        if way != "flex":
            bounds = (self.row.cu_seqlens, self.row.max_seqlen)
            return partial(varlen_attention, q, k, v, *bounds)
        return partial(DocumentBlocks(self.row.position_ids).attend, q, k, v)

    def gradients(self, out: Tensor) -> tuple[Tensor, ...]:
        """Gradients of queries, keys and values."""
        return torch.autograd.grad(out, self.leaves, self.grad, retain_graph=True)

    def results(self, way: str) -> dict[str, Tensor]:
        """Output and gradients by name; on a CPU the output alone."""
        with kernels(way, self.grad.device):
            out = self.forward_of(way)()
            gradients = self.gradients(out) if out.requires_grad else ()
        return {"output": out, **dict(zip(("query", "key", "value"), gradients, strict=False))}


def make_case(model: str, lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> Case:
    """Random tensors of a model's heads for a row of documents."""
    heads, kv_heads, channels = HEADS[model]
    documents = [[0] * length for length in lengths]
    row = build_row(documents, row_tokens=sum(lengths), pad_token_id=0)
    generator = torch.Generator(device).manual_seed(0)

    def random(num_heads: int) -> Tensor:
        shape = (1, sum(lengths), num_heads, channels)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    leaves = [random(number).transpose(1, 2) for number in (heads, kv_heads, kv_heads)]
    return Case(
        label={"model": model, "tokens": sum(lengths), "documents": len(lengths),
               "longest": max(lengths)},
        lengths=tuple(lengths),
        leaves=tuple(leaf.requires_grad_(device.type != "cpu") for leaf in leaves),
        grad=random(heads),
        row=row.to(device),
    )  # fmt: skip


def parity(case: Case, ways: Sequence[str]) -> dict[str, float]:
    """The gaps of all ways to the first one, which is not timed if they are large."""
    first, *others = ways
    expected = case.results(first)
    gaps = {}
    for way in others:
        got, again = (case.results(way) for _ in range(2))
        label = f"{way}, {case.name}"
        for name, value in got.items():
            gap = relative_gap(value, expected[name])
            gaps[f"{label}, {name}"] = gap
            check(f"{label}, {name}", gap, LIMITS[value.dtype])
        if not all(torch.equal(got[name], again[name]) for name in got):
            raise SystemExit(f"{label}: two runs differ; no time is reported")
    return gaps


def times(case: Case, ways: Sequence[str], repeats: int) -> Iterator[dict[str, Any]]:
    """The medians of each way, forward and backward, and of making the mask."""
    device = case.grad.device
    calls = 1 if device.type == "cpu" else CALLS

    def launched(way: str, function: Callable[[], object]) -> None:
        with kernels(way, device):
            for _ in range(calls):
                function()

    functions = {}
    for way in ways:
        with kernels(way, device):
            forward = case.forward_of(way)
            out = forward()
        functions[way, "forward_ms"] = partial(launched, way, forward)
        if out.requires_grad:
            backward = partial(case.gradients, out)
            functions[way, "backward_ms"] = partial(launched, way, backward)
        if way == "flex":
            functions[way, "mask_ms"] = partial(launched, way, case.mask)
    named = {f"{way}/{part}": function for (way, part), function in functions.items()}
    timings = measure(named, repeats=repeats, warmup=WARMUP, device=device)
    for way in ways:
        ms = {
            part: timings[f"{way}/{part}"].p50_ms / calls
            for part in ("forward_ms", "backward_ms", "mask_ms")
            if (way, part) in functions
        }
        yield {**case.label, "way": way, **ms}


def ratios_of(case: Case, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """FlexAttention to the flash kernel, deterministic and not."""
    by_way = {row["way"]: row for row in rows}
    return {
        f"flex / {peer}, {part}, {case.name}": by_way["flex"][key] / by_way[peer][key]
        for part in ("forward", "backward")
        for peer in ("flash deterministic", "flash")
        if (key := f"{part}_ms") in by_way.get(peer, {})
    }


@benchmark(
    "Attention over packed rows: deterministic flash kernels against FlexAttention.",
    models=Option(["SmolLM2-135M", "Qwen3-0.6B"], "whose heads", smoke=["tiny"],
                  choices=tuple(HEADS)),
    repeats=Option(10, smoke=1),
)  # fmt: skip
def run(arguments: argparse.Namespace) -> Result:
    """Parity, then times, row by row."""
    torch._dynamo.config.recompile_limit = 64
    # The backward pass is timed alone: it runs many times for one forward pass.
    functorch_config.donated_buffer = False
    smoke, device = arguments.smoke, torch.device(arguments.device)
    dtype = torch.float32 if smoke else torch.bfloat16
    # Compiling costs a smoke run more than all else.
    torch.compiler.set_stance("force_eager" if smoke else "default")
    rows, ratios, gaps, skipped = [], {}, {}, {}
    mixes = SMOKE_ROWS if smoke else ROWS
    for model, lengths in itertools.product(arguments.models, mixes):
        case = make_case(model, lengths, device, dtype)
        ways = ["flash", "flash deterministic", "flex"]
        if not varlen_supported(case.leaves[0], case.leaves[2]):
            ways = ["loop", "flex"]
            skipped["flash"] = "it needs a GPU of capability 8.0 or more and half precision"
        gaps |= parity(case, ways)
        found = list(times(case, ways, arguments.repeats))
        ratios |= ratios_of(case, found)
        rows += found
    goals = [name for name in ratios if name.startswith("flex / flash, backward")]
    return Result(
        rows=rows,
        ratios=ratios,
        goals={name: Goal(at_most=1.0) for name in goals},
        parity=gaps,
        settings={"repeats": arguments.repeats, "calls": CALLS},
        more={"skipped": skipped},
    )
