"""The layer's part of `decode_step.py`: ways of our kernels, and peers, for some tokens at once."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import captured, check, relative_gap
from benchmarks.decode import Stack, bandwidth, through, timed
from tiny_onn.model.experts import ExpertBank
from tiny_onn.model.router import route
from tiny_onn.ops.decode import KernelBlocks

# Of the output's norm; bfloat16 keeps 8 bits.
LIMIT = 2e-2
CHECKED_LAYERS = 3
# Every choice is written out, so that a row means the same whatever the defaults are.
TOKENS = KernelBlocks(tile_tokens=17, overlap=False)
WAYS = {
    "tokens": TOKENS,
    "tokens, overlap": replace(TOKENS, overlap=True),
    "tiles": replace(TOKENS, tile_tokens=2),
}


def ways_for(tokens: int, names: list[str]) -> dict[str, KernelBlocks]:
    """The ways among `names` that differ for a number of tokens."""
    return {name: WAYS[name] for name in names if tokens > 1 or name != "tiles"}


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
    device: str, tokens: list[int], ks: list[int], names: list[str], *, smoke: bool
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
            ways, errors, gaps = layer_ways(stack, banks, inputs, names)
            for k in ks:
                # The captured graphs read the thresholds, so that they follow them.
                stack.budget(banks, inputs, k)
                pairs = list(zip(banks, inputs, strict=True))
                chosen = sum(int(bank.route(x).active.any(0).sum()) for bank, x in pairs)
                limit = stack.active_bytes(chosen / len(banks)) / rate * 1e6
                whole = stack.active_bytes(stack.E) / rate * 1e6
                micro = timed(ways, stack, 2 if smoke else 20)
                yield {
                    "tokens": number,
                    "k": k,
                    "us_per_layer": micro,
                    "chosen_experts": chosen / len(banks),
                    "limit_us": limit,
                    "share_of_bandwidth": {
                        name: (limit if name in WAYS else whole) / value
                        for name, value in micro.items()
                    },
                    "parity": gaps,
                    **({"error": errors} if errors else {}),
                }


def layer_ways(
    stack: Stack, banks: list[ExpertBank], inputs: list[Tensor], names: list[str]
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
        **{name: kernels(blocks) for name, blocks in ways_for(len(inputs[0]), names).items()},
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
        found = []
        for index in range(min(CHECKED_LAYERS, len(outputs))):
            given = ones if name.startswith("dense") else weights[index]
            expected = stack.defined(index, inputs[index], given)
            found.append(relative_gap(outputs[index], expected))
        # The median: rounding can move a score across the threshold in one of the layers.
        gaps[name] = check(name, sorted(found)[len(found) // 2], LIMIT)["gap"]
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
