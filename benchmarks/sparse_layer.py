"""One expert layer on a GPU, forward and backward with surprise, kernel by kernel.

    python benchmarks/sparse_layer.py [--tokens 32768 8192 2048] [--k 16 4] [--only parity|times]
        [--captured] [--profile] [--sweep up slope outer_gate_up outer_down project] [--smoke]

Qwen3-0.6B's shape: hidden 1024, 32 experts of width 96, bfloat16. Contenders: the dense MLP as it
is and compiled, the dense-masked path with compiled regions, the grouped path, and the sparse path
with dense sums and with rows. Parity comes first, in float32 and bfloat16, against the textbook
formula in float64; no time is reported where it fails. `--profile` gives the kernels of a step,
`--sweep` the times of one kernel by its tile. With TRITON_INTERPRET=1 and `--smoke` it runs on a
CPU. Every result is a JSON line. Imports neither text nor transformers.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_onn.ops import dense_masked, grouped, sparse
from tiny_onn.ops.router_gradient import SmkStep
from tiny_onn.ops.sparse_launches import Launches, Options, Tile, Tiles, list_tokens
from tiny_onn.ops.surprise import SmkRule

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
NAMES = ("y", "x", "gate_up", "down", "weights", "logits")
NUM_INPUTS = 4
# Tiles worth trying: rows, depth, columns, warps, stages.
CANDIDATES = {
    "up": [(128, 64, 0, 8, 2), (128, 64, 0, 8, 3), (128, 64, 0, 8, 4), (128, 32, 0, 8, 4),
           (64, 64, 0, 4, 3), (64, 64, 0, 4, 2), (256, 64, 0, 8, 3), (128, 128, 0, 8, 2)],
    "slope": [(64, 64, 32, 4, 3), (64, 64, 64, 4, 3), (64, 64, 16, 4, 3), (128, 64, 32, 8, 3),
              (128, 64, 64, 8, 3), (128, 64, 128, 8, 3), (64, 32, 32, 4, 4), (64, 128, 32, 4, 2)],
    "outer_gate_up": [(128, 64, 0, 8, 2), (128, 64, 0, 8, 3), (128, 64, 0, 8, 4),
                      (128, 32, 0, 8, 4), (128, 128, 0, 8, 2), (256, 64, 0, 8, 3),
                      (64, 64, 0, 4, 4)],
    "outer_down": [(128, 64, 0, 8, 2), (128, 64, 0, 8, 3), (128, 64, 0, 8, 4), (128, 64, 0, 4, 4),
                   (128, 128, 0, 8, 3), (256, 64, 0, 8, 3), (128, 128, 0, 4, 3)],
    "project": [(128, 32, 128, 8, 3), (128, 32, 128, 4, 3), (128, 32, 256, 8, 3),
                (128, 64, 128, 8, 2), (64, 32, 128, 4, 3)],
}  # fmt: skip


class Layer:
    """One layer's tensors in the layout of transformers' fused experts, and its step."""

    def __init__(
        self, shape: tuple[int, int, int, int], k: int, *, varying: bool = False, **kwargs: Any
    ) -> None:
        T, E, I, D = shape
        self.k, self.shape = k, shape
        torch.manual_seed(0)
        wide: Any = {**kwargs, "dtype": torch.float32}

        def leaf(values: Tensor) -> Tensor:
            return values.to(kwargs["dtype"]).requires_grad_()

        self.gate_up = leaf(torch.randn(E, 2 * I, D, **wide) / D**0.5)
        self.down = leaf(torch.randn(E, D, I, **wide) / (E * I) ** 0.5)
        self.inputs = [leaf(torch.randn(T, D, **wide)) for _ in range(NUM_INPUTS)]
        self.grads = [torch.randn(T, D, **wide).to(kwargs["dtype"]) for _ in range(NUM_INPUTS)]
        self.logits = [torch.randn(T, E, **wide).requires_grad_() for _ in range(NUM_INPUTS)]
        self.actives, self.weights = [], []
        for number, logits in enumerate(self.logits):
            # There, k varies by token, around its mean, and one expert is unused.
            vary = varying and number == 1
            counts = torch.full((T, 1), k, device=logits.device)
            if vary:
                counts = counts + torch.randint(-1, 2, (T, 1), device=logits.device)
            rank = logits.detach().argsort(-1, descending=True).argsort(-1)
            active = rank < counts
            if vary:
                active[:, 3] = False
            weights = (logits.detach().masked_fill(~active, -1e30)).softmax(-1)
            self.actives.append(active)
            self.weights.append((weights * active).requires_grad_())
        self.turn = itertools.count()

    def leaves(self, number: int) -> list[Tensor]:
        """What gradients are asked for."""
        return [self.inputs[number], self.gate_up, self.down, self.weights[number],
                self.logits[number]]  # fmt: skip

    def smk(self, kind: Any = "parameters") -> SmkStep:
        """The model card's rule."""
        rule = SmkRule(surprise=kind, direction="min", candidates="active")
        T = self.shape[0]
        return SmkStep(rule=rule, grad_scale=1 / T, loss_scale=float(T))

    def step(self, layer: Callable[..., Tensor], number: int | None, part: str) -> list[Tensor]:
        """Forward, or forward and backward."""
        n = next(self.turn) % NUM_INPUTS if number is None else number
        leaves = self.leaves(n)
        y = layer(*leaves, active_TE=self.actives[n], smk=self.smk())
        if part == "forward":
            return [y]
        return [y, *torch.autograd.grad(y, leaves, self.grads[n])]

    def mlp(self) -> Callable[..., Tensor]:
        """The dense MLP of the same neurons, as transformers writes it."""
        E, J, D = self.gate_up.shape
        gate, up = self.gate_up.detach().view(E, 2, J // 2, D).transpose(0, 1).flatten(1, 2)
        down = self.down.detach().transpose(0, 1).flatten(1, 2)
        weights = [w.contiguous().requires_grad_() for w in (gate, up, down)]

        def run(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
            return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

        run.weights = weights  # pyright: ignore[reportFunctionMemberAccess]
        return run

    def mlp_step(self, run: Callable[..., Tensor], weights: list[Tensor], part: str) -> object:
        """The dense MLP's step."""
        n = next(self.turn) % NUM_INPUTS
        y = run(self.inputs[n], *weights)
        if part == "forward":
            return y
        return torch.autograd.grad(y, [self.inputs[n], *weights], self.grads[n])


def expected(layer: Layer, number: int) -> list[Tensor]:
    """The textbook formula in float64, and the lesson by the dense path's definition."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in layer.leaves(number)]
    active = layer.actives[number]
    y = dense_masked.expert_layer(*leaves, activation=F.silu, active_TE=active, smk=layer.smk())
    grads = list(torch.autograd.grad(y, leaves, layer.grads[number].double()))
    grads[3] = grads[3] * active
    return [y.detach(), *grads]


def parity(arguments: argparse.Namespace, shape: tuple[int, int, int, int]) -> Iterator[dict]:
    """Gaps of outputs and gradients, relative to the largest norm's tensor."""
    dtypes = [torch.float32] if arguments.smoke else [torch.float32, torch.bfloat16]
    for case in itertools.product(dtypes, arguments.k, (True, False)):
        dtype, k, dense = cast(tuple[torch.dtype, int, bool], case)
        layer = Layer(shape, k, varying=True, dtype=dtype, device=arguments.device)
        path = partial(sparse.expert_layer, activation="silu", dense_sums=dense)
        for number in (0, 1):
            got, again = (layer.step(path, number, "both") for _ in range(2))
            gaps = {
                name: ((g.double() - e).norm() / e.norm()).item()
                for name, g, e in zip(NAMES, got, expected(layer, number), strict=True)
            }
            limits = dict.fromkeys(NAMES, LIMITS[dtype])
            # Where surprises tie within their rounding, another expert becomes the target.
            limits["logits"] = 0.1 if dtype == torch.bfloat16 else 1e-2
            yield {
                "parity": str(dtype),
                "k": k,
                "dense_sums": dense,
                "varying": number == 1,
                "gaps": gaps,
                "repeats": all(torch.equal(a, b) for a, b in zip(got, again, strict=True)),
                "ok": all(gaps[name] <= limits[name] for name in NAMES),
            }


def contenders(layer: Layer, part: str, compiled: bool) -> dict[str, Callable[[], object]]:
    """Everything that is timed, by name."""
    mlp: Any = layer.mlp()
    steps: dict[str, Callable[[], object]] = {
        "MLP": partial(layer.mlp_step, mlp, mlp.weights, part)
    }
    dense, rows = (
        partial(sparse.expert_layer, activation="silu", compiled=compiled, **options)
        for options in (
            {"dense_sums": True},
            {"dense_sums": False, "num_pairs": layer.shape[0] * layer.k},
        )
    )
    steps["sparse, dense sums"] = partial(layer.step, dense, None, part)
    steps["sparse, rows"] = partial(layer.step, rows, None, part)
    if compiled:
        fused: Any = torch.compile(layer.mlp())
        steps["MLP compiled"] = partial(layer.mlp_step, fused, mlp.weights, part)
        for name, path in (("dense masked", dense_masked), ("grouped", grouped)):
            old = partial(path.expert_layer, activation=F.silu, compiled=True)
            steps[name] = partial(layer.step, old, None, part)
    return steps


def median_ms(function: Callable[[], object], device: str, repeats: int) -> float:
    """By the device's own clock."""
    if device == "cpu":
        function()
        return 0.0
    for _ in range(NUM_INPUTS):
        function()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def graph_of(function: Callable[[], object]) -> Callable[[], object]:
    """The function captured, to replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def times(arguments: argparse.Namespace, shape: tuple[int, int, int]) -> Iterator[dict]:
    """Medians, each also of a captured step where nothing waits for the device."""
    for tokens, k in itertools.product(arguments.tokens, arguments.k):
        layer = Layer((tokens, *shape), k, dtype=arguments.dtype, device=arguments.device)
        for part in ("forward", "both"):
            steps = contenders(layer, part, compiled=not arguments.smoke)
            ms = {
                name: median_ms(step, arguments.device, arguments.repeats)
                for name, step in steps.items()
            }
            if arguments.captured and part == "both":
                for name in ("MLP", "MLP compiled", "sparse, dense sums", "sparse, rows"):
                    replay = graph_of(steps[name])
                    ms[f"{name}, captured"] = median_ms(replay, "cuda", arguments.repeats)
                    del replay
            shares = {name: round(v / (ms["MLP"] or 1), 3) for name, v in ms.items()}
            ms = {name: round(value, 4) for name, value in ms.items()}
            yield {"tokens": tokens, "k": k, "part": part, "ms": ms, "of MLP": shares}


def profile(arguments: argparse.Namespace, shape: tuple[int, int, int]) -> Iterator[dict]:
    """The kernels of one step, by time."""
    from torch.profiler import ProfilerActivity  # noqa: PLC0415

    for tokens, k in itertools.product(arguments.tokens, arguments.k):
        layer = Layer((tokens, *shape), k, dtype=arguments.dtype, device=arguments.device)
        steps = contenders(layer, "both", compiled=True)
        for name in ("MLP", "sparse, dense sums", "sparse, rows"):
            for _ in range(NUM_INPUTS):
                steps[name]()
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
                for _ in range(NUM_INPUTS):
                    steps[name]()
                torch.cuda.synchronize()
            kernels = sorted(found.key_averages(), key=lambda e: -e.device_time_total)
            rows = [
                (e.key[:60], e.count / NUM_INPUTS, round(e.device_time_total / NUM_INPUTS, 1))
                for e in kernels
                if e.device_time_total > 0
            ]
            yield {"profile": name, "tokens": tokens, "k": k,
                   "us": round(sum(row[2] for row in rows), 1), "kernels": rows[:18]}  # fmt: skip


def sweep(arguments: argparse.Namespace, shape: tuple[int, int, int]) -> Iterator[dict]:
    """One kernel's times by its tile."""
    from triton.runtime.errors import (  # noqa: PLC0415 # pyright: ignore[reportMissingImports]
        TritonError,
    )

    E, I, _ = shape
    for tokens, k in itertools.product(arguments.tokens, arguments.k):
        layer = Layer((tokens, *shape), k, dtype=arguments.dtype, device=arguments.device)
        x, gate_up, down, weights, _ = (leaf.detach() for leaf in layer.leaves(0))
        grad_y, active = layer.grads[0], layer.actives[0]
        for name, chosen in ((n, c) for n in arguments.sweep for c in CANDIDATES[n]):
            tile = Tile(**dict(zip(("rows", "depth", "columns", "warps", "stages"), chosen,
                                          strict=True)))  # fmt: skip
            dense = k / E >= sparse.DENSE_SHARE and name != "project"
            options = Options(
                activation="silu", smk=None, compiled=False,
                num_pairs=None if dense else tokens * k,
                tiles=dataclasses.replace(Tiles(), **{name: tile}),
            )  # fmt: skip
            lists = list_tokens(active, all_slots=dense)
            run = Launches(options, x, down, lists)
            pre = run.new(run.num_slots, 2 * I).normal_()
            hidden = run.new(run.num_slots, I).normal_()
            calls: dict[str, Callable[[], object]] = {
                "up": partial(run.up, gate_up, weights),
                "slope": partial(run.slope, grad_y, down, weights, pre),
                "outer_gate_up": partial(run.outer, pre, x, torch.empty_like(gate_up), "END", tile),
                "outer_down": partial(run.outer, hidden, x, torch.empty_like(down), "EDN", tile),
                "project": partial(run.sum_rows, pre, gate_up, "END"),
            }
            try:
                ms = round(median_ms(calls[name], arguments.device, arguments.repeats), 4)
            except TritonError as error:
                # A tile that does not fit is a result too.
                ms = type(error).__name__
            yield {"sweep": name, "tokens": tokens, "k": k, "tile": chosen, "ms": ms}


def main() -> None:
    """Parity, then what was asked for."""
    options = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--tokens", nargs="+", type=int, default=[32_768, 8192, 2048])
    options.add_argument("--k", nargs="+", type=int, default=[16, 4])
    options.add_argument("--repeats", type=int, default=20)
    options.add_argument("--only", choices=("parity", "times", "sweep", "profile"))
    options.add_argument("--captured", action="store_true")
    options.add_argument("--profile", action="store_true")
    options.add_argument("--sweep", nargs="+", choices=tuple(CANDIDATES), default=[])
    options.add_argument("--smoke", action="store_true")
    arguments = options.parse_args()
    arguments.dtype = torch.float32 if arguments.smoke else torch.bfloat16
    shape: tuple[int, int, int] = (32, 96, 1024)
    if arguments.smoke:
        arguments.tokens, arguments.k, shape = [40], [4], (8, 24, 48)
    torch._dynamo.config.recompile_limit = 64
    E, I, D = shape
    parts: dict[str, Iterator[dict]] = {
        "parity": parity(arguments, (40 if arguments.smoke else 1000, E, I, D)),
        "times": times(arguments, shape),
        "profile": profile(arguments, shape) if arguments.profile else iter(()),
        "sweep": sweep(arguments, shape),
    }
    for name, part in parts.items():
        if arguments.only in (None, name):
            for record in part:
                print(json.dumps(record), flush=True)
                if not record.get("ok", True):
                    sys.exit("parity failed: no time is reported")


if __name__ == "__main__":
    main()
