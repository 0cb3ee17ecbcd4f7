"""Other projects' expert layers on a GPU, forward and backward, beside ours and the dense MLP.

    python -m benchmarks layer_peers [--device cuda] [--tokens 32768 8192 2048] [--k 16 4]
        [--libraries sonicmoe liger transformers] [--tuned] [--seconds 100] [--smoke]

Qwen3-0.6B's shape: hidden 1024, 32 experts of width 96, bfloat16; the k largest of random logits
are active. Routing is given to all, and each returns the gradients of the input, of both weights
and of the routing weights. Ours computes surprise and the gate's gradient besides, by the model
card's rule, which no peer can; the faster of its two ways to sum counts. Peers: transformers'
experts implementations, Liger's fused MoE, and SonicMoE, which transformers loads from the hub as
`sonicmoe`, here from its package. Each peer's output and gradients are checked against the formula
in float64 before it is timed.

Every library runs in a process of its own, in which ours and the dense MLP are timed in turns with
it, launched by the host and then captured in a CUDA graph. Ours and the MLP run with kernels that
repeat their bits, as in training; peers as their users run them. A peer that is not installed,
fails, or takes longer than `--seconds` becomes a reason in the record, and what it had reached
stays. Liger's and SonicMoE's kernels choose their tiles by timing them; to compile all candidates
takes minutes, so that a few of each library's own candidates are tried (`tuning` in the settings),
or all with `--tuned`.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import ROOT, command_of, measure, relative_gap, runnable, told
from benchmarks.layer_libraries import LIBRARIES, NOT_CAPTURED, TUNING, Peer
from benchmarks.registry import Option, Result, benchmark
from benchmarks.sparse_layer import (
    CHECKED_TOKENS,
    NAMES,
    NUM_INPUTS,
    QWEN3,
    SMALL,
    Layer,
    expected,
)
from tiny_onn.device import ask_for_same_bits
from tiny_onn.ops import sparse

RULE = "card"
OURS = ("sparse", "sparse, rows")
# Relative norms of differences. Peers sum the outputs of a token's experts, and its gradients, in
# bfloat16; a wrong expert, weight or half of the gate moves a norm by more than a tenth.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


class Routed:
    """A layer's routing as peers take it, and their step."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        # Parameters, because transformers' module takes no other tensors.
        layer.gate_up, layer.down = nn.Parameter(layer.gate_up), nn.Parameter(layer.down)
        self.indices = [weights.topk(layer.k).indices for weights in layer.weights]
        self.weights = [
            weights.detach().gather(1, index).requires_grad_()
            for weights, index in zip(layer.weights, self.indices, strict=True)
        ]

    def step(self, peer: Peer, number: int | None) -> list[Tensor]:
        """Output and gradients of one input, the next one if none is named.

        The peer runs without the kernels that repeat their bits, which not all of them have.
        """
        layer = self.layer
        n = next(layer.turn) % NUM_INPUTS if number is None else number
        x, gate_up, down, weights = leaves = [*layer.leaves(n)[:3], self.weights[n]]
        asked = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        try:
            y = peer(x, gate_up, down, self.indices[n], weights)
            return [y.detach(), *torch.autograd.grad(y, leaves, layer.grads[n])]
        finally:
            torch.use_deterministic_algorithms(asked)

    def gap(self, peer: Peer) -> dict[str, float]:
        """The peer's distances from the formula in float64."""
        right = expected(self.layer, RULE, 0)
        right[4] = right[4].gather(1, self.indices[0])
        got = self.step(peer, 0)
        pairs = zip(NAMES, got, right, strict=False)
        return {name: relative_gap(g, e) for name, g, e in pairs}


class Comparison:
    """One library's peers beside ours, in this process."""

    def __init__(self, case: Mapping[str, Any]) -> None:
        self.case, self.device = case, torch.device(case["device"])
        self.dtype = torch.float32 if case["smoke"] else torch.bfloat16
        self.shape = SMALL if case["smoke"] else QWEN3
        self.failed: dict[str, str] = {}

    def layer(self, tokens: int, k: int) -> Layer:
        """A layer of some tokens."""
        return Layer((tokens, *self.shape), k, dtype=self.dtype, device=self.device)

    def peers(self, layer: Layer) -> Iterator[tuple[str, Peer | str]]:
        """The library's peers for a layer."""
        return LIBRARIES[self.case["library"]](layer, tuned=self.case["tuned"])

    def records(self) -> Iterator[dict[str, Any]]:
        """Parity, times as the host launches, and times as captured, each as soon as it is known.

        A graph that cannot be captured can leave the device in disorder, so that graphs come last.
        """
        case, sizes = self.case, [*itertools.product(self.case["tokens"], self.case["k"])]
        for k in case["k"]:
            routed = Routed(self.layer(min(CHECKED_TOKENS, max(case["tokens"])), k))
            for name, peer in self.peers(routed.layer):
                yield from self.parity(routed, name, peer, k)
        for graphs in (False, True) if self.device.type == "cuda" else (False,):
            for tokens, k in sizes:
                yield from self.times(tokens, k, graphs=graphs)

    def parity(
        self, routed: Routed, name: str, peer: Peer | str, k: int
    ) -> Iterator[dict[str, Any]]:
        """The peer's gaps, or why it is not timed at all."""
        if isinstance(peer, str):
            return
        try:
            gaps = routed.gap(peer)
        except (RuntimeError, ImportError, TypeError, ValueError, AttributeError) as error:
            self.failed[name] = told(error)
            return
        off = {what: gap for what, gap in gaps.items() if not gap <= LIMITS[self.dtype]}
        if off:
            self.failed[name] = f"parity, k = {k}: {off}"
        yield {"peer": name, "k": k, "parity": gaps}

    def times(self, tokens: int, k: int, *, graphs: bool) -> Iterator[dict[str, Any]]:
        """Medians of every peer, of ours and of the dense MLP, or reasons."""
        routed = Routed(layer := self.layer(tokens, k))
        mlp: Any = layer.mlp()
        steps: dict[str, Callable[[], object]] = {"MLP": partial(layer.mlp_step, mlp, mlp.weights)}
        if sparse.obstacle(self.device.type, self.dtype, self.shape[0], "silu") is None:
            for name, options in zip(
                OURS, ({"dense_sums": True}, {"dense_sums": False, "num_active": k}), strict=True
            ):
                compiled = not self.case["smoke"]
                run = partial(sparse.expert_layer, activation="silu", compiled=compiled, **options)
                steps[name] = partial(layer.step, run, RULE, None)
        reasons: dict[str, str] = {}
        for name, peer in self.peers(layer):
            if isinstance(peer, str) or name in self.failed:
                reasons[name] = peer if isinstance(peer, str) else self.failed[name]
            elif graphs and name in NOT_CAPTURED:
                reasons[name] = NOT_CAPTURED[name]
            else:
                steps[name] = partial(routed.step, peer, None)
        ready, broken = runnable(steps, str(self.device), graphs=graphs)
        reasons |= broken
        self.failed |= broken
        where = {"tokens": tokens, "k": k, "captured": graphs}
        yield from ({"peer": name, **where, "reason": why} for name, why in reasons.items())
        medians = {
            name: timing.p50_ms
            for name, timing in measure(
                ready, repeats=self.case["repeats"], warmup=NUM_INPUTS, device=self.device
            ).items()
        }
        own = {name: medians.pop(name) for name in ("MLP", *OURS) if name in medians}
        ours = min((own[name] for name in OURS if name in own), default=None)
        for name, ms in medians.items():
            more = {} if ours is None else {"ours_ms": ours}
            yield {"peer": name, **where, "peer_ms": ms, "mlp_ms": own["MLP"], **more}
        if self.device.type == "cuda":
            del ready, steps, routed, layer
            torch.cuda.empty_cache()


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """Print one library's records, each as one line."""
    ask_for_same_bits(torch.device(case["device"]))
    for record in Comparison(case).records():
        print(json.dumps(record), flush=True)
    return {"library": case["library"], "ended": True}


def in_a_process(case: Mapping[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
    """The records of a library's process, as they come, and why it did not end if it did not."""
    command = command_of("layer_peers", "--case", json.dumps(dict(case)))
    late, ended = threading.Event(), False
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as said,
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True,
            start_new_session=True,
        ) as process,
    ):  # fmt: skip

        def stop() -> None:
            late.set()
            _kill_all(process.pid)

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            for line in process.stdout or ():
                record = json.loads(line) if line.startswith("{") else {"ended": ended}
                if "ended" in record:
                    ended = record["ended"]
                else:
                    yield record
            process.wait()
        finally:
            timer.cancel()
            _kill_all(process.pid)
        said.seek(0)
        last = ([line.strip() for line in said if line.strip()] or ["no output"])[-1]
    if not ended:
        told = f"exit status {process.returncode}: {last[:300]}"
        why = f"took more than {seconds:g} s" if late.is_set() else told
        yield {"peer": case["library"], "reason": f"its process did not end well: {why}"}


def _kill_all(session: int) -> None:
    """Kill a process and those that it started, such as compilers, which hold its pipes open."""
    with suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


@benchmark(
    "Time of other projects' expert layers on a GPU, beside the sparse layer and the dense MLP.",
    case=compare,
    tokens=Option([32_768, 8192, 2048], smoke=[40]),
    k=Option([16, 4], smoke=[4]),
    libraries=Option(list(LIBRARIES), choices=tuple(LIBRARIES)),
    tuned=Option(False, "let the libraries try all their candidates, which takes minutes"),
    repeats=Option(10, smoke=1),
    seconds=Option(100.0, "time budget of each library"),
)
def run(arguments: argparse.Namespace) -> Result:
    """Every library in its process, one after the other."""
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    gaps: dict[str, float] = {}
    names = ("device", "tokens", "k", "tuned", "repeats", "smoke")
    settings = {name: getattr(arguments, name) for name in names if name != "smoke"}
    settings |= {"rule": RULE, "tuning": "all candidates" if arguments.tuned else TUNING}

    def result() -> Result:
        return Result(rows=rows, ratios=ratios_of(rows), parity=gaps, settings=settings,
                      more={"skipped": skipped})  # fmt: skip

    for library in arguments.libraries:
        case = {name: getattr(arguments, name) for name in names} | {"library": library}
        for record in in_a_process(case, arguments.seconds):
            print(json.dumps(record), flush=True)
            if "parity" in record:
                label = f"{record['peer']}, k={record['k']}"
                gaps[label] = max(record["parity"].values())
            else:
                (skipped if "reason" in record else rows).append(record)
            arguments.keep(result())
    return result()


def ratios_of(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Peers and ours as shares of the dense MLP's time of the same turns."""
    ratios: dict[str, float | None] = {}
    for row in rows:
        how = ", captured" if row["captured"] else ""
        where = f"{row['tokens']} tokens, k={row['k']}{how}"
        ratios[f"{row['peer']} / MLP, {where}"] = row["peer_ms"] / row["mlp_ms"]
        if "ours_ms" in row:
            ratios[f"ours / {row['peer']}, {where}"] = row["ours_ms"] / row["peer_ms"]
    return ratios
