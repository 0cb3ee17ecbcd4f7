"""Generating one token at a time: the expert layer and a whole model, against dense ones.

    python -m benchmarks decode [--device cuda] [--k 4 8 16 24 32] [--sweep] [--smoke]

A stack of feed-forward layers of Qwen3-0.6B's shape (hidden 1024, 32 experts x 96, bfloat16), as
many as exceed a GPU's L2 cache even at k = 4, each with an input of its own, captured in a CUDA
graph and replayed. Ours are `ExpertBank`s, gate and selection included: a budget whose thresholds
give k experts at these inputs. Peers: transformers' `Qwen3MLP`; the same with gate and up in one
product; its `Qwen3MoeSparseMoeBlock` with every experts implementation that can be captured
(`eager` reads the routing back, and is timed as it is). More tokens than one are compared with the
bank's own path that computes all experts.

The limit is the time in which a large tensor's worth of memory is read (the faster of a sum and a
copy, in the same run), for the bytes of the experts that any token chose and of the gate. The
model: Qwen3-0.6B with random weights against its student, greedy decoding with a static cache, one
captured step a token, of 1, 8 and 16 sequences at once.

Parity comes first: every way against the definition, a captured graph against the same calls
without one. On a CPU nothing is captured and ours is the path for all experts: only to see that it
runs. `--sweep` times other sizes of the kernels' programs. Ends in one JSON line.
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3MoeConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks.common import Deadline, captured, check, measure, relative_gap
from benchmarks.decode_model import whole_model
from benchmarks.registry import Option, Result, benchmark
from tiny_onn.model.experts import ExpertBank, recorded_routings, selecting
from tiny_onn.model.router import Routing, RoutingRule
from tiny_onn.ops import decode
from tiny_onn.routing.thresholds import exact_threshold

# Of the output's norm; bfloat16 keeps 8 bits.
LIMIT = 2e-2
SECONDS = 60
KS = (4, 8, 16, 24, 32)
MOE_KS = (4, 16)
TOKENS = (2, 4, 8, 16)
MOE = ("grouped_mm", "batched_mm")
REPLAYS = 5
SWEEP = [
    *(decode.KernelBlocks(width=width, warps=warps) for width in (4, 8, 16) for warps in (2, 4, 8)),
    *(decode.KernelBlocks(sum_hidden=hidden) for hidden in (8, 32, 64)),
    *(decode.KernelBlocks(sum_rows=rows) for rows in (64, 128, 512)),
]


class Stack:
    """Layers of every kind with the same weights, and an input for each."""

    def __init__(self, device: str, *, smoke: bool) -> None:
        self.device = device
        self.layers, self.D, self.E, self.I = (2, 64, 8, 16) if smoke else (56, 1024, 32, 96)
        self.dtype = torch.bfloat16
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, std: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=device) * std
            return values.to(self.dtype)

        D, E, I = self.D, self.E, self.I
        self.inputs = [draw(1, D) for _ in range(self.layers)]
        self.experts = [
            (draw(E, 2 * I, D, std=D**-0.5), draw(E, D, I, std=(E * I) ** -0.5))
            for _ in range(self.layers)
        ]
        self.gates = [draw(E, D, std=D**-0.5) for _ in range(self.layers)]

    def banks(self) -> list[ExpertBank]:
        """Ours; `budget` says how many experts are active."""
        rule = RoutingRule(selection="budget", budget_form="threshold", weighting="unit")
        banks = []
        for (gate_up, down), gate in zip(self.experts, self.gates, strict=True):
            with torch.device("meta"):
                bank = ExpertBank(self.D, self.E, self.I, "silu", rule)
            bank.router.to_empty(device=self.device)
            bank.router.reset(None)
            bank.router.weight.data.copy_(gate)
            bank.experts.gate_up_proj = nn.Parameter(gate_up)
            bank.experts.down_proj = nn.Parameter(down)
            bank.experts.store_by_neuron()
            banks.append(bank.train(False).requires_grad_(False))
        return banks

    @torch.no_grad()
    def budget(self, banks: list[ExpertBank], inputs: list[Tensor], k: int) -> None:
        """Set thresholds that give k experts on average at each layer's input."""
        for bank, x_TD in zip(banks, inputs, strict=True):
            scores_TE = bank.route(x_TD).scores
            everyone = torch.ones(len(x_TD), dtype=torch.bool, device=x_TD.device)
            bank.router.settled.copy_(exact_threshold(scores_TE, everyone, k))

    def mlps(self) -> list[nn.Module]:
        """Transformers' dense MLPs of the same neurons."""
        modules = []
        for gate_up, down in self.experts:
            with torch.device("meta"):
                config = Qwen3Config(hidden_size=self.D, intermediate_size=self.E * self.I)
                mlp = Qwen3MLP(config)
            for name, rows in zip(("gate_proj", "up_proj"), gate_up.chunk(2, dim=1), strict=True):
                getattr(mlp, name).weight = nn.Parameter(rows.flatten(0, 1))
            mlp.down_proj.weight = nn.Parameter(down.transpose(0, 1).flatten(1))
            modules.append(mlp.requires_grad_(False))
        return modules

    def fused(self, mlps: list[Any]) -> list[Callable[[Tensor], Tensor]]:
        """The dense MLPs with gate and up in one product."""

        def layer(gate_up_JD: Tensor, mlp: Any) -> Callable[[Tensor], Tensor]:
            def forward(x_TD: Tensor) -> Tensor:
                gate_TF, up_TF = nn.functional.linear(x_TD, gate_up_JD).chunk(2, -1)
                return mlp.down_proj(nn.functional.silu(gate_TF) * up_TF)

            return forward

        pairs = zip(self.experts, mlps, strict=True)
        return [
            layer(gate_up.view(self.E, 2, self.I, self.D).transpose(0, 1).flatten(0, 2), mlp)
            for (gate_up, _), mlp in pairs
        ]

    def blocks(self, k: int, implementation: str) -> list[nn.Module]:
        """Transformers' MoE blocks."""
        modules = []
        for (gate_up, down), gate in zip(self.experts, self.gates, strict=True):
            config = Qwen3MoeConfig(
                hidden_size=self.D,
                moe_intermediate_size=self.I,
                num_experts=self.E,
                num_experts_per_tok=k,
                norm_topk_prob=True,
            )
            config._experts_implementation = implementation
            with torch.device("meta"):
                block: Any = Qwen3MoeSparseMoeBlock(config).to(self.dtype)
            block = block.to_empty(device=self.device).requires_grad_(False)
            block.gate.weight.copy_(gate)
            block.experts.gate_up_proj.copy_(gate_up)
            block.experts.down_proj.copy_(down)
            modules.append(block)
        return modules

    def active_bytes(self, k: float) -> float:
        """What one token has to read of a layer: its experts, and the float32 gate."""
        return k * 3 * self.I * self.D * self.dtype.itemsize + self.E * (self.D + 1) * 4

    def defined(self, index: int, x_TD: Tensor, weights_TE: Tensor) -> Tensor:
        """A layer's output by the definition, in float64."""
        gate_up, down = (tensor.double() for tensor in self.experts[index])
        gate_TEI, up_TEI = torch.einsum("td,ejd->tej", x_TD.double(), gate_up).chunk(2, -1)
        hidden_TEI = nn.functional.silu(gate_TEI) * up_TEI * weights_TE.double()[..., None]
        return torch.einsum("tei,edi->td", hidden_TEI, down)


def through(
    layers: list[Any], inputs: list[Tensor], outputs: list[Tensor], *, three_d: bool = False
) -> Callable[[], None]:
    """A call of every layer on its own input; leaves the outputs behind."""

    def call() -> None:
        outputs[:] = [
            layer(x[None])[0] if three_d else layer(x)
            for layer, x in zip(layers, inputs, strict=True)
        ]

    return call


def recorded(
    banks: list[ExpertBank], call: Callable[[], None], routings: list[Routing]
) -> Callable[[], None]:
    """The call, which leaves the banks' routings behind; a graph of it writes them anew."""

    def recorded_call() -> None:
        with recorded_routings(banks) as found:
            call()
        routings[:] = found

    return recorded_call


def bandwidth(device: str, *, smoke: bool) -> dict[str, float]:
    """Bytes a second of a large read and a large copy (read and written)."""
    size = 2**20 if smoke else 2**30
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    ways = {
        "read": lambda: [source.sum() for _ in range(REPLAYS)],
        "copy": lambda: [target.copy_(source) for _ in range(REPLAYS)],
    }
    times = measure(ways, repeats=10, warmup=2, device=device)
    moved = {"read": REPLAYS * size, "copy": 2 * REPLAYS * size}
    return {name: moved[name] / (times[name].p50_ms / 1e3) for name in ways}


def timed(ways: dict[str, Callable[[], object]], stack: Stack, repeats: int) -> dict[str, float]:
    """Median microseconds per layer."""

    def several(function: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            for _ in range(REPLAYS):
                function()

        return call

    functions = {name: several(function) for name, function in ways.items()}
    times = measure(functions, repeats=repeats, warmup=2, device=stack.device)
    return {name: t.p50_ms * 1e3 / REPLAYS / stack.layers for name, t in times.items()}


def records(
    device: str, deadline: Deadline, *, smoke: bool, ks: tuple[int, ...] = KS
) -> Iterator[dict]:
    """Records, one as soon as it is known: bandwidth, the stack by k and by tokens, the model."""
    ks = (2, 8) if smoke else ks
    rates = bandwidth(device, smoke=smoke)
    yield {"kind": "bandwidth", **{f"{name}_bytes_per_s": rate for name, rate in rates.items()}}
    stack = Stack(device, smoke=smoke)
    with torch.no_grad():
        yield from by_k(stack, ks, max(rates.values()), deadline, smoke=smoke)
        yield from by_tokens(stack, max(rates.values()), deadline, smoke=smoke)
        yield from by_moe(stack, deadline, smoke=smoke)
    del stack
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    if not deadline.left():
        yield {"kind": "model", "skipped": "time budget"}
        return
    yield from whole_model(device, smoke=smoke)


def by_k(
    stack: Stack, ks: tuple[int, ...], rate: float, deadline: Deadline, *, smoke: bool
) -> Iterator[dict]:
    """One token: ours at each k against the dense peers and, at some k, transformers' MoE."""
    banks, inputs, device = stack.banks(), stack.inputs, stack.device
    mlps = stack.mlps()
    outputs: dict[str, list[Tensor]] = {"ours": [], "Qwen3MLP": [], "Qwen3MLP fused": []}
    layers = {"ours": banks, "Qwen3MLP": mlps, "Qwen3MLP fused": stack.fused(mlps)}
    calls = {name: through(layers[name], inputs, outputs[name]) for name in layers}
    routings: list[Routing] = []
    calls["ours"] = recorded(banks, calls["ours"], routings)
    ways = {name: captured(call, device) for name, call in calls.items()}
    repeats = 2 if smoke else 20
    for k in ks:
        if not deadline.left():
            yield {"kind": "stack", "k": k, "skipped": "time budget"}
            continue
        # The captured graph reads the thresholds, so that it follows them.
        stack.budget(banks, inputs, k)
        for way in ways.values():
            way()
        gaps = parity(stack, banks, routings, outputs)
        mean_k = sum(int(routing.active.sum()) for routing in routings) / len(banks)
        micro = timed(ways, stack, repeats)
        limit = stack.active_bytes(mean_k) / rate * 1e6
        dense = min(micro["Qwen3MLP"], micro["Qwen3MLP fused"])
        yield {
            "kind": "stack",
            "k": k,
            "mean_k": mean_k,
            "parity": gaps,
            "us_per_layer": micro,
            "ours / Qwen3MLP": micro["ours"] / micro["Qwen3MLP"],
            "ours / best dense": micro["ours"] / dense,
            "limit_us": limit,
            "share_of_bandwidth": limit / micro["ours"],
            "dense_share_of_bandwidth": stack.active_bytes(stack.E) / rate * 1e6 / dense,
        }


def by_moe(stack: Stack, deadline: Deadline, *, smoke: bool) -> Iterator[dict]:
    """One token: ours against transformers' MoE at some k."""
    banks = stack.banks()
    for k in (2,) if smoke else MOE_KS:
        if not deadline.left():
            yield {"kind": "moe", "k": k, "skipped": "time budget"}
            continue
        stack.budget(banks, stack.inputs, k)
        gaps: dict[str, float] = {}
        ways, reasons = moe_ways(stack, k, gaps)
        ways["ours"] = captured(through(banks, stack.inputs, []), stack.device)
        micro = timed(ways, stack, 2 if smoke else 20)
        yield {"kind": "moe", "k": k, "parity": gaps, "us_per_layer": micro, "eager": reasons}


def parity(
    stack: Stack,
    banks: list[ExpertBank],
    routings: list[Routing],
    outputs: dict[str, list[Tensor]],
) -> dict[str, float]:
    """Worst gaps over the layers, of what the graphs just left.

    Raises:
        SystemExit: one is too wide: nothing is timed.
    """
    gaps = {}
    ones = torch.ones(1, stack.E, device=stack.device)
    for name, values in outputs.items():
        worst = 0.0
        for index, x_TD in enumerate(stack.inputs):
            weights_TE = routings[index].weights if name == "ours" else ones
            gap = relative_gap(values[index], stack.defined(index, x_TD, weights_TE))
            worst = max(worst, gap)
        gaps[name] = check(f"decode, {name}", worst, LIMIT)["gap"]
    for index, (bank, x_TD) in enumerate(zip(banks, stack.inputs, strict=True)):
        gap = float(not torch.equal(bank(x_TD), outputs["ours"][index]))
        gaps["captured, not captured"] = check("decode, captured", gap, 0.0)["gap"]
        # Logits are summed in another order, so that a score at the threshold may pass or not.
        differ = routings[index].active != bank.router(x_TD).active
        gaps["routing"] = check("decode, routing", differ.float().mean().item(), 1 / stack.E)["gap"]
    return gaps


def moe_ways(
    stack: Stack, k: int, gaps: dict[str, float]
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Transformers' MoE, captured where that works; why not elsewhere."""
    ways: dict[str, Callable[[], object]] = {}
    reasons = {"eager": "reads the routing back; timed without a graph"}
    for name in (*MOE, "eager"):
        outputs: list[Tensor] = []
        call = through(stack.blocks(k, name), stack.inputs, outputs, three_d=True)
        call()
        gaps[f"MoE {name}"] = moe_gap(stack, k, outputs)
        if name == "eager":
            ways["MoE eager"] = call
            continue
        try:
            ways[f"MoE {name}"] = captured(call, stack.device)
        except RuntimeError as error:
            reasons[name] = str(error).partition("\n")[0]
            ways[f"MoE {name}"] = call
    return ways, reasons


def moe_gap(stack: Stack, k: int, outputs: list[Tensor]) -> float:
    """The median layer's gap to the definition: near ties are chosen otherwise in bfloat16."""
    gaps = []
    for index, (x_TD, gate_ED) in enumerate(zip(stack.inputs, stack.gates, strict=True)):
        probs_TE = (x_TD.double() @ gate_ED.double().T).softmax(-1)
        kept = probs_TE.topk(k, dim=-1)
        weights_TE = torch.zeros_like(probs_TE).scatter_(-1, kept.indices, kept.values)
        weights_TE /= weights_TE.sum(-1, keepdim=True)
        gaps.append(relative_gap(outputs[index], stack.defined(index, x_TD, weights_TE)))
    return check("decode, MoE", sorted(gaps)[len(gaps) // 2], LIMIT)["gap"]


def by_tokens(stack: Stack, rate: float, deadline: Deadline, *, smoke: bool) -> Iterator[dict]:
    """More tokens at once, half of the experts active: ours against its path for all experts."""
    k = stack.E // 2
    banks = stack.banks()
    mlps = stack.mlps()
    for tokens in (2,) if smoke else TOKENS:
        if not deadline.left():
            yield {"kind": "tokens", "tokens": tokens, "skipped": "time budget"}
            continue
        generator = torch.Generator(stack.device).manual_seed(tokens)
        inputs = [
            torch.randn(tokens, stack.D, generator=generator, device=stack.device).to(stack.dtype)
            for _ in range(stack.layers)
        ]
        stack.budget(banks, inputs, k)
        ours: list[Tensor] = []
        every: list[Tensor] = []
        dense: list[Tensor] = []
        ways = {"ours": captured(through(banks, inputs, ours), stack.device)}
        # With gradients enabled, though nothing wants one, a bank computes all experts.
        with torch.enable_grad():
            ways["all experts"] = captured(through(banks, inputs, every), stack.device)
        ways["Qwen3MLP"] = captured(through(mlps, inputs, dense), stack.device)
        for way in ways.values():
            way()
        gaps = sorted(relative_gap(a, b) for a, b in zip(ours, every, strict=True))
        gap = check("decode, tokens", gaps[len(gaps) // 2], LIMIT)["gap"]
        micro = timed(ways, stack, 2 if smoke else 10)
        # Every expert that some token chose has to be read once.
        pairs = zip(banks, inputs, strict=True)
        chosen = sum(int(bank.route(x_TD).active.any(0).sum()) for bank, x_TD in pairs)
        limit = stack.active_bytes(chosen / len(banks)) / rate * 1e6
        yield {
            "kind": "tokens",
            "tokens": tokens,
            "k": k,
            "us_per_layer": micro,
            "parity": gap,
            "chosen_experts": chosen / len(banks),
            "limit_us": limit,
            "share_of_bandwidth": limit / micro["ours"],
        }


def sweep(stack: Stack, ks: tuple[int, ...]) -> Iterator[dict]:
    """Ours at other sizes of the kernels' programs."""
    banks = stack.banks()
    for k in ks:
        stack.budget(banks, stack.inputs, k)
        for blocks in SWEEP:

            def call(blocks: decode.KernelBlocks = blocks) -> None:
                for bank, x_TD in zip(banks, stack.inputs, strict=True):
                    router = bank.router
                    rule = selecting(router.rule)
                    assert rule is not None
                    gate = (router.weight, router.bias, router.selection_bias, router.settled)
                    decode.routed_expert_layer(
                        x_TD,
                        bank.experts.gate_up_proj,
                        bank.experts.down_proj,
                        decode.Gate(*gate),
                        rule=rule,
                        activation="silu",
                        blocks=blocks,
                    )

            micro = timed({"ours": captured(call, stack.device)}, stack, 10)
            yield {"kind": "sweep", "k": k, "blocks": str(blocks), "us_per_layer": micro}


def row_of(record: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    return {
        "k": record["k"],
        **record["us_per_layer"],
        "ours / Qwen3MLP": record["ours / Qwen3MLP"],
        "limit": record["limit_us"],
        "share of bandwidth": record["share_of_bandwidth"],
    }


@benchmark(
    "Time of one decoded token in the expert layer and in a whole model, against dense ones.",
    k=Option(list(KS)),
    sweep=Option(False, "only other sizes of the kernels' programs"),
)
def run(arguments: argparse.Namespace) -> Result | None:
    """Check, then time the stack and the model."""
    device, smoke = arguments.device, arguments.smoke
    if arguments.sweep:
        with torch.no_grad():
            for record in sweep(Stack(device, smoke=smoke), tuple(arguments.k)):
                print(record, flush=True)
        return None
    found = list(records(device, Deadline(SECONDS), smoke=smoke, ks=tuple(arguments.k)))
    stacks = [r for r in found if r["kind"] == "stack" and "us_per_layer" in r]
    return Result(
        rows=[row_of(record) for record in stacks],
        ratios={
            **{f"ours / Qwen3MLP, k={r['k']}": r["ours / Qwen3MLP"] for r in stacks},
            **{
                f"tokens/s, {name}, {record['batch']} at once / dense": ratio
                for record in found
                if record["kind"] == "model" and "ratio" in record
                for name, ratio in record["ratio"].items()
                if name != "dense"
            },
        },
        settings={"replays": REPLAYS},
        more={"records": found},
    )
