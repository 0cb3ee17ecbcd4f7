"""How the expert layer's cost grows with tokens, with experts and with active experts.

    python -m benchmarks layer_scaling [--device cuda] [--rule default card] [--smoke]

Qwen3-0.6B's width: hidden 1024, 3072 neurons, bfloat16; forward and backward pass with surprise and
the gate's gradient. Three sweeps, each of one number: tokens (32 experts, 16 active), experts of
the same 3072 neurons (half of them active), and active experts of 32. The dense-masked path and,
where its kernels run, the sparse path are timed in turns with the dense MLP of the same neurons at
every point, on a GPU as replayed CUDA graphs, as in training. `default` is the default recipe's
rule, which surprises all experts, and `card` is the model card's, which surprises active ones; the
sweeps of tokens and of experts run the first rule that is given. A point that belongs to several
sweeps is timed once. On a GPU the kernels are those that repeat their bits, as in training.

Cost is fitted as `time = a * number ^ exponent` by least squares of logarithms, over the longest
range of neighbouring points that the fit meets within 10 % (the one of larger numbers where two are
as long). A power of an offset cost is no power: small numbers are left out, and the range says so.

Parity comes first, at every point's sizes on 256 tokens: outputs and all gradients of both paths
against the formula in float64. On a CPU only `--smoke` is small enough. Points that the time budget
leaves no room for are named in the record, which is written anew after every point. Ends in one
JSON line.
"""

import argparse
import gc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import Deadline, captured, check, measure, relative_gap, told
from benchmarks.registry import Option, Result, benchmark
from benchmarks.sparse_layer import LIMITS, NAMES, NUM_INPUTS, RULES, Layer, expected
from tiny_onn.device import ask_for_same_bits
from tiny_onn.ops import dense_masked, sparse

WIDTH, HIDDEN = 3072, 1024
SMALL_WIDTH, SMALL_HIDDEN = 64, 32
BASE_EXPERTS = 32
CHECKED_TOKENS = 256
# The largest distance of a point to the fitted line.
WITHIN = 0.1
FEWEST_POINTS = 3
WAYS = ("MLP", "dense", "sparse")


def points(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every point of every sweep: its tokens, experts, active experts and rule."""
    first, E = arguments.rule[0], BASE_EXPERTS
    base = {"tokens": arguments.base_tokens, "experts": E, "k": E // 2, "rule": first}
    for tokens in arguments.tokens:
        yield {"sweep": "tokens", **base, "tokens": tokens}
    for rule in arguments.rule:
        for k in arguments.k:
            yield {"sweep": "k", **base, "k": k, "rule": rule}
    for experts in arguments.experts:
        yield {"sweep": "experts", **base, "experts": experts, "k": experts // 2}


def paths(layer: Layer, *, compiled: bool, reason: str | None) -> dict[str, Callable[..., Any]]:
    """The expert layer's paths that run here."""
    found = {"dense": partial(dense_masked.expert_layer, activation=F.silu, compiled=compiled)}
    if reason is None:
        options: dict[str, Any] = {"activation": "silu", "num_active": layer.k}
        found["sparse"] = partial(sparse.expert_layer, compiled=compiled, **options)
    return found


class Sizes:
    """What all points have in common."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        small, self.device = arguments.smoke, arguments.device
        self.width, self.hidden = (SMALL_WIDTH, SMALL_HIDDEN) if small else (WIDTH, HIDDEN)
        self.dtype = torch.float32 if small else torch.bfloat16
        self.compiled, self.repeats = not small, arguments.repeats

    def layer(self, point: Mapping[str, Any], tokens: int) -> Layer:
        """A layer of a point's sizes."""
        E = point["experts"]
        shape = (tokens, E, self.width // E, self.hidden)
        return Layer(shape, point["k"], dtype=self.dtype, device=self.device)

    def obstacle(self, point: Mapping[str, Any]) -> str | None:
        """Why the sparse path does not run at a point."""
        device = torch.device(self.device).type
        return sparse.obstacle(device, self.dtype, point["experts"], "silu")

    def parity(self, point: Mapping[str, Any]) -> dict[str, float]:
        """Each path's largest gap to the formula in float64, the gate's gradient apart.

        Raises:
            SystemExit: one is above its limit: nothing is timed.
        """
        layer, rule = self.layer(point, CHECKED_TOKENS), point["rule"]
        right = expected(layer, rule, 0)
        worst: dict[str, float] = {}
        found = paths(layer, compiled=self.compiled, reason=self.obstacle(point))
        for name, path in found.items():
            got = layer.step(path, rule, 0)
            # The paths differ in what they return for the weights of inactive experts.
            got[4] = got[4] * layer.actives[0]
            for what, g, e in zip(NAMES, got, right, strict=True):
                limit = LIMITS[self.dtype]
                if what == "logits":
                    # Where surprises tie within their rounding, another expert is the target. A
                    # share s of such tokens moves the gradient by sqrt(2 s), and ties are the more
                    # frequent the more experts there are: here 1 % at 32 experts in bfloat16.
                    experts = max(1.0, point["experts"] / BASE_EXPERTS)
                    limit = math.sqrt(0.02 * experts) if self.dtype == torch.bfloat16 else 1e-2
                gap = relative_gap(g, e)
                check(f"layer_scaling, {dict(point)}, {name}, {what}", gap, limit)
                key = f"{name}, {'logits' if what == 'logits' else 'others'}"
                worst[key] = max(gap, worst.get(key, 0.0))
        return worst

    def forget_other_sizes(self) -> None:
        """Drop compiled code, so that the next point gets code for its own number of experts.

        A model has one number of experts. The compiler would otherwise make code for any number
        once it has seen two, which took almost twice the time.
        """
        if self.compiled:
            torch._dynamo.reset()

    def times(self, point: Mapping[str, Any]) -> dict[str, float]:
        """Median milliseconds of the dense MLP and of each path."""
        layer = self.layer(point, point["tokens"])
        mlp: Any = layer.mlp()
        steps: dict[str, Callable[[], object]] = {"MLP": partial(layer.mlp_step, mlp, mlp.weights)}
        found = paths(layer, compiled=self.compiled, reason=self.obstacle(point))
        for name, path in found.items():
            steps[name] = partial(layer.step, path, point["rule"], None)
        steps = {name: captured(step, self.device) for name, step in steps.items()}
        timings = measure(steps, repeats=self.repeats, warmup=NUM_INPUTS, device=self.device)
        return {name: timing.p50_ms for name, timing in timings.items()}


def fit(numbers: Sequence[float], times: Sequence[float]) -> dict[str, float] | None:
    """The exponent of `time = a * number ^ exponent` and the longest range that it holds in.

    Args:
        numbers: rising.
        times: the time of each.

    Returns:
        `exponent`, the range's ends `low` and `high`, its number of points, and `off`, the largest
        relative distance of a point to the fit; None if no three neighbours lie within `WITHIN`.
    """
    logs = [[math.log(value) for value in values] for values in (numbers, times)]
    count = len(numbers)
    for size in range(count, FEWEST_POINTS - 1, -1):
        for start in range(count - size, -1, -1):
            xs, ys = (values[start : start + size] for values in logs)
            line = statistics.linear_regression(xs, ys)
            gaps = [y - line.intercept - line.slope * x for x, y in zip(xs, ys, strict=True)]
            off = max(abs(math.expm1(gap)) for gap in gaps)
            if off <= WITHIN:
                low, high = numbers[start], numbers[start + size - 1]
                return {"exponent": line.slope, "low": low, "high": high, "points": size,
                        "off": off}  # fmt: skip
    return None


def fits(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The fit of every way in every sweep and rule."""
    found = []
    keys = dict.fromkeys((row["sweep"], row["rule"]) for row in rows)
    for sweep, rule in keys:
        for way in WAYS:
            some = [r for r in rows if (r["sweep"], r["rule"]) == (sweep, rule) and way in r]
            some.sort(key=lambda row: row[sweep])
            law = fit([row[sweep] for row in some], [row[way] for row in some])
            if law is not None:
                found.append({"sweep": sweep, "rule": rule, "way": way, **law})
    return found


@benchmark(
    "How the expert layer's time grows with tokens, experts and active experts, and exponents.",
    tokens=Option([2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072], smoke=[16, 32, 64]),
    experts=Option([8, 16, 32, 64, 128, 256], "parts of the same neurons", smoke=[8, 16, 32]),
    k=Option([1, 2, 4, 8, 16, 24, 32], "active experts of 32", smoke=[1, 8, 32]),
    base_tokens=Option(32_768, "tokens of the other two sweeps", smoke=32),
    rule=Option(["default", "card"], choices=tuple(RULES)),
    repeats=Option(10, smoke=2),
    seconds=Option(170.0, "after so many no further point is begun"),
)
def run(arguments: argparse.Namespace) -> Result:
    """Parity at every point, then its times; the fits at the end."""
    torch._dynamo.config.recompile_limit = 64
    # Before the GPU is first used, as in training.
    ask_for_same_bits(torch.device(arguments.device))
    sizes, deadline = Sizes(arguments), Deadline(arguments.seconds)
    gpu = torch.device(arguments.device).type == "cuda"
    settings = {"width": sizes.width, "hidden": sizes.hidden, "repeats": sizes.repeats,
                "dtype": str(sizes.dtype).removeprefix("torch."), "captured": gpu,
                "deterministic": torch.are_deterministic_algorithms_enabled()}  # fmt: skip
    rows, skipped, gaps = [], [], {}
    timed: dict[tuple[Any, ...], dict[str, float]] = {}
    experts = BASE_EXPERTS

    def result() -> Result:
        more = {"fits": fits(rows), "skipped": skipped}
        return Result(rows=rows, ratios=ratios(rows), parity=gaps, settings=settings, more=more)

    for point in points(arguments):
        known = tuple(value for key, value in point.items() if key != "sweep")
        if known not in timed and not deadline.left():
            skipped.append({**point, "reason": "time budget"})
            continue
        if known not in timed:
            if point["experts"] != experts:
                sizes.forget_other_sizes()
                experts = point["experts"]
            try:
                for name, gap in sizes.parity(point).items():
                    gaps[name] = max(gap, gaps.get(name, 0.0))
                timed[known] = sizes.times(point)
            except RuntimeError as error:
                skipped.append({**point, "reason": told(error)})
                continue
            gc.collect()
            if gpu:
                torch.cuda.empty_cache()
        rows.append({**point, **timed[known]})
        print(rows[-1], flush=True)
        if (reason := sizes.obstacle(point)) is not None:
            skipped.append({**point, "way": "sparse", "reason": reason})
        arguments.keep(result())
    for law in fits(rows):
        print(law, flush=True)
    return result()


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Each path's time as a share of the dense MLP's, at every point."""
    return {
        f"{way} / MLP, {row['sweep']}={row[row['sweep']]}, {row['rule']}": row[way] / row["MLP"]
        for row in rows
        for way in WAYS[1:]
        if way in row
    }
