"""One sparse expert layer on a GPU, forward and backward with surprise, against the dense MLP.

    python -m benchmarks sparse_layer [--device cuda] [--tokens 32768 8192 2048] [--k 16 4]
        [--rule card default sampled] [--checked bfloat16] [--seconds 140] [--profile]
        [--sweep KERNEL] [--smoke]

Qwen3-0.6B's shape: hidden 1024, 32 experts of width 96, bfloat16. Contenders: the dense MLP as it
is and compiled, the dense-masked path with compiled regions, the grouped path, and the sparse path
with dense sums and with rows; what waits for nothing also runs captured in a CUDA graph. `card` is
the model card's rule, `default` the default recipe's, which surprises all experts, and `sampled`
does so on an eighth of the tokens. The kernels are those that repeat their bits, as in training.
Parity comes first, in the timed format (`--checked float32 bfloat16` checks both), against the
textbook formula in float64. The record is written anew after every row, and rows that the time
budget leaves no room for are named in it. `--profile` prints the kernels of a step, `--sweep` the
times of one kernel by its tile. Where the kernels cannot run (a CPU without Triton's interpreter)
the record says so, and the others are timed. `layer_peers` times other projects' layers. Imports
neither text nor transformers.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Deadline, check, measure, relative_gap, runnable
from benchmarks.registry import Goal, Option, Result, benchmark
from tiny_onn.device import ask_for_same_bits
from tiny_onn.ops import dense_masked, grouped, sparse
from tiny_onn.ops.regions import separate_compiled_code
from tiny_onn.ops.router_gradient import SmkStep
from tiny_onn.ops.sparse_launches import Launches, Options, Tile, Tiles, list_tokens
from tiny_onn.ops.surprise import SmkRule

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
NAMES = ("y", "x", "gate_up", "down", "weights", "logits")
NUM_INPUTS = 4
RULES = {
    "card": SmkRule(surprise="parameters", direction="min", candidates="active"),
    "default": SmkRule(surprise="gain", direction="max", candidates="all"),
    "sampled": SmkRule(surprise="gain", direction="max", candidates="all", lesson_share=1 / 8),
}
QWEN3, SMALL = (32, 96, 1024), (8, 24, 48)
CHECKED_TOKENS = 1000
# The ways to compute our layer.
OURS = ("dense", "grouped", "sparse", "sparse, rows")
# Of the time of the dense MLP, both captured.
AIMS = {(32_768, 16): 0.85, (32_768, 4): 0.4, (8192, 16): 1.0, (2048, 16): 1.0}
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

    def step(self, layer: Callable[..., Tensor], rule: str, number: int | None) -> list[Tensor]:
        """Output and gradients of one input, the next one if none is named."""
        n = next(self.turn) % NUM_INPUTS if number is None else number
        leaves, T = self.leaves(n), self.shape[0]
        grad_scale, loss_scale = 1 / T, float(T)
        if (device := self.gate_up.device).type == "cuda":
            # As in training: a captured graph reads them from the device.
            grad_scale, loss_scale = (
                torch.full((), scale, device=device) for scale in (grad_scale, loss_scale)
            )
        smk = SmkStep(rule=RULES[rule], grad_scale=grad_scale, loss_scale=loss_scale)
        y = layer(*leaves, active_TE=self.actives[n], smk=smk)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.grads[n])]

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

    def mlp_step(self, run: Callable[..., Tensor], weights: list[Tensor]) -> object:
        """The dense MLP's step."""
        n = next(self.turn) % NUM_INPUTS
        y = run(self.inputs[n], *weights)
        return torch.autograd.grad(y, [self.inputs[n], *weights], self.grads[n])


def expected(layer: Layer, rule: str, number: int) -> list[Tensor]:
    """The textbook formula in float64, by the dense path, which is tested against it."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in layer.leaves(number)]
    active, T = layer.actives[number], layer.shape[0]
    smk = SmkStep(rule=RULES[rule], grad_scale=1 / T, loss_scale=float(T))
    y = dense_masked.expert_layer(*leaves, activation=F.silu, active_TE=active, smk=smk)
    grads = list(torch.autograd.grad(y, leaves, layer.grads[number].double()))
    grads[3] = grads[3] * active
    return [y.detach(), *grads]


def parity(arguments: argparse.Namespace, shape: tuple[int, int, int, int]) -> dict[str, float]:
    """The largest gap of outputs and gradients, by number format and rule.

    Raises:
        SystemExit: one is above its limit, or two runs differ: nothing is timed.
    """
    formats = ["float32"] if arguments.smoke else arguments.checked
    dtypes = [getattr(torch, name) for name in formats]
    worst: dict[str, float] = {}
    ks: list[int] = arguments.k
    cases = ((dtype, k) for dtype in dtypes for k in ks)
    for dtype, k in cases:
        layer = Layer(shape, k, varying=True, dtype=dtype, device=arguments.device)
        for rule, dense, number in itertools.product(arguments.rule, (True, False), (0, 1)):
            path = partial(sparse.expert_layer, activation="silu", dense_sums=dense)
            got, again = (layer.step(path, rule, number) for _ in range(2))
            label = f"{str(dtype).removeprefix('torch.')}, {rule}"
            for name, g, e in zip(NAMES, got, expected(layer, rule, number), strict=True):
                limit = LIMITS[dtype]
                if name == "logits":
                    # Where surprises tie within their rounding, another expert is the target. A
                    # share s of such tokens moves the gradient by sqrt(2 s): 0.15 is 1 %.
                    limit = 0.15 if dtype == torch.bfloat16 else 1e-2
                gap = relative_gap(g, e)
                check(f"sparse, {label}, k = {k}, {name}", gap, limit)
                key = f"{label}, {'logits' if name == 'logits' else 'others'}"
                worst[key] = max(gap, worst.get(key, 0.0))
            if not all(torch.equal(a, b) for a, b in zip(got, again, strict=True)):
                raise SystemExit(f"sparse, {label}, k = {k}: two runs differ; no time is reported")
    return worst


def contenders(
    layer: Layer, rule: str, *, compiled: bool, with_sparse: bool
) -> dict[str, Callable[[], object]]:
    """Everything that is timed, by name."""
    mlp: Any = layer.mlp()
    steps: dict[str, Callable[[], object]] = {"MLP": partial(layer.mlp_step, mlp, mlp.weights)}
    if compiled:
        separate_compiled_code()
        fused: Any = torch.compile(layer.mlp())
        steps["MLP compiled"] = partial(layer.mlp_step, fused, mlp.weights)
    old = {"dense": dense_masked} | ({"grouped": grouped} if rule != "default" else {})
    for name, path in old.items():
        run = partial(path.expert_layer, activation=F.silu, compiled=compiled)
        steps[name] = partial(layer.step, run, rule, None)
    if with_sparse:
        for name, options in (
            ("sparse", {"dense_sums": True}),
            ("sparse, rows", {"dense_sums": False, "num_active": layer.k}),
        ):
            run = partial(sparse.expert_layer, activation="silu", compiled=compiled, **options)
            steps[name] = partial(layer.step, run, rule, None)
    return steps


def times(
    arguments: argparse.Namespace,
    shape: tuple[int, int, int],
    deadline: Deadline,
    *,
    with_sparse: bool,
) -> Iterator[dict[str, Any]]:
    """Medians of every contender, and of a replayed graph of those that wait for nothing.

    A contender that fails and what the time budget leaves no room for are rows with a reason.
    """
    for tokens, k in itertools.product(arguments.tokens, arguments.k):
        layer = Layer((tokens, *shape), k, dtype=arguments.dtype, device=arguments.device)
        for rule in arguments.rule:
            if not deadline.left():
                yield {"tokens": tokens, "k": k, "rule": rule, "reason": "time budget"}
                continue
            steps = contenders(layer, rule, compiled=not arguments.smoke, with_sparse=with_sparse)
            where = {"tokens": tokens, "k": k, "rule": rule}
            ready, failed = runnable(steps, arguments.device)
            if arguments.device != "cpu":
                free = {n: s for n, s in ready.items() if n.startswith(("MLP", "dense", "sparse"))}
                graphs, uncaptured = runnable(free, arguments.device, graphs=True)
                ready |= {f"{name}, captured": graph for name, graph in graphs.items()}
                failed |= {f"{name}, captured": reason for name, reason in uncaptured.items()}
            for name, reason in failed.items():
                yield {**where, "way": name, "reason": reason}
            timings = measure(
                ready, repeats=arguments.repeats, warmup=NUM_INPUTS, device=arguments.device
            )
            yield where | {name: timing.p50_ms for name, timing in timings.items()}
            del ready
            del steps


def ratios_of(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """The sparse path, the dense one and the fastest of ours as shares of the dense MLP's time."""
    ratios: dict[str, float | None] = {}
    for row in rows:
        where = f"{row['rule']}, {row['tokens']} tokens, k={row['k']}"
        for how in ("", ", captured"):
            paths = {
                "sparse": [row[n + how] for n in ("sparse", "sparse, rows") if n + how in row],
                "dense": [row[n + how] for n in ("dense",) if n + how in row],
                "ours": [row[n + how] for n in OURS if n + how in row],
            }
            for (path, ours), peer in itertools.product(paths.items(), ("MLP", "MLP compiled")):
                if ours and peer + how in row:
                    ratios[f"{path} / {peer}{how}, {where}"] = min(ours) / row[peer + how]
    return ratios


def profile(arguments: argparse.Namespace, shape: tuple[int, int, int]) -> Iterator[dict]:
    """The kernels of one step, by time."""
    from torch.profiler import ProfilerActivity  # noqa: PLC0415

    for tokens, k in itertools.product(arguments.tokens, arguments.k):
        layer = Layer((tokens, *shape), k, dtype=arguments.dtype, device=arguments.device)
        steps = contenders(layer, arguments.rule[0], compiled=True, with_sparse=True)
        for name in ("MLP", "sparse", "sparse, rows"):
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
        for name, chosen in ((arguments.sweep, c) for c in CANDIDATES[arguments.sweep]):
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
                timings = measure(
                    {name: calls[name]}, repeats=arguments.repeats, warmup=NUM_INPUTS,
                    device=arguments.device,
                )  # fmt: skip
                ms = timings[name].p50_ms
            except TritonError as error:
                # A tile that does not fit is a result too.
                ms = type(error).__name__
            yield {"sweep": name, "tokens": tokens, "k": k, "tile": chosen, "ms": ms}


@benchmark(
    "Time of the sparse expert layer on a GPU, surprise included, against the dense MLP.",
    tokens=Option([32_768, 8192, 2048], smoke=[40]),
    k=Option([16, 4], smoke=[4]),
    rule=Option(list(RULES), choices=tuple(RULES)),
    checked=Option(["bfloat16"], "formats of the parity check", choices=("float32", "bfloat16")),
    repeats=Option(20, smoke=1),
    seconds=Option(140.0, "after so many no further row is begun"),
    profile=Option(False, "print the kernels of a step by their time"),
    sweep=Option(None, "print the times of a kernel by its tile", choices=tuple(CANDIDATES)),
)
def run(arguments: argparse.Namespace) -> Result:
    """Parity, then times, then what else was asked for."""
    torch._dynamo.config.recompile_limit = 64
    # Before the GPU is first used, as in training.
    ask_for_same_bits(torch.device(arguments.device))
    deadline = Deadline(arguments.seconds)
    arguments.dtype = torch.float32 if arguments.smoke else torch.bfloat16
    E, I, D = shape = SMALL if arguments.smoke else QWEN3
    device = torch.device(arguments.device).type
    reason = sparse.obstacle(device, arguments.dtype, E, "silu")
    checked = arguments.tokens[0] if arguments.smoke else CHECKED_TOKENS
    gaps = parity(arguments, (checked, E, I, D)) if reason is None else {}
    settings = {"experts": E, "width": I, "hidden": D, "repeats": arguments.repeats,
                "deterministic": torch.are_deterministic_algorithms_enabled()}  # fmt: skip
    skipped = [] if reason is None else [{"way": "sparse", "reason": reason}]
    rows: list[dict[str, Any]] = []

    def result() -> Result:
        ratios = ratios_of(rows)
        return Result(
            rows=rows,
            ratios=ratios,
            goals={
                name: Goal(at_most=aim)
                for (tokens, k), aim in AIMS.items()
                for rule in RULES
                if (name := f"ours / MLP, captured, {rule}, {tokens} tokens, k={k}") in ratios
            },
            parity=gaps,
            settings=settings,
            more={"skipped": skipped},
        )

    for row in times(arguments, shape, deadline, with_sparse=reason is None):
        (skipped if "reason" in row else rows).append(row)
        print(row, flush=True)
        arguments.keep(result())
    if reason is None and arguments.profile:
        for record in profile(arguments, shape):
            print(json.dumps(record), flush=True)
    if reason is None and arguments.sweep is not None:
        for record in sweep(arguments, shape):
            print(json.dumps(record), flush=True)
    return result()
