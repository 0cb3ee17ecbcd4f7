"""One expert layer, forward and backward with surprise, against a dense MLP and transformers' MoE.

    python -m benchmarks expert_layer [--device cuda] [--tokens 2048] [--dtype float32 bfloat16]
        [--k 2 4 8 16 32] [--write-crossover] [--smoke]

Qwen3-0.6B's shape: hidden 1024, 32 experts of width 96. Ours are whole `ExpertBank`s, router
included, on every path that runs here, taught by the model card's SMK rule. Peers, timed in turns
with them, on inputs that change: transformers' `Qwen3MLP` of the same width, as it is and compiled,
and its `Qwen3MoeSparseMoeBlock` with each experts implementation that runs here; those make no
surprise. Weights are in the compute format on all sides.

Parity comes first, at the timed size: with coupled routers every path gives the block's output and
gradients; all give the same surprise, and that of `ops/reference.py` on some tokens; all experts
on are the MLP. `--write-crossover` stores the share k / E up to which the grouped path is faster
than the dense one, and that up to which the sparse path is the fastest of all, which
`train.expert_path = "auto"` reads. Peak memory: with the time on a GPU; on a CPU in a process
of its own for each k of `MEMORY_KS`, in float32. Ends in one JSON line.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks.common import (
    Timing,
    check,
    environment,
    in_subprocess,
    measure,
    peak_bytes,
    relative_gap,
)
from benchmarks.registry import Option, Result, benchmark
from tiny_onn.model.expert_path import FILE, crossover_share, fastest_share
from tiny_onn.model.experts import Execution, ExpertBank, RowState, row_context
from tiny_onn.model.router import RoutingRule
from tiny_onn.ops import reference, sparse
from tiny_onn.ops.router_gradient import SmkStep
from tiny_onn.ops.surprise import SmkRule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Relative norms of differences; bf16 keeps 8 bits, and gradients pass through several roundings.
LIMITS = {"float32": 1e-4, "bfloat16": 3e-2}
PATHS = ("dense", "grouped")
QWEN3 = {"hidden": 1024, "num_experts": 32, "expert_dim": 96}
SMALL = {"hidden": 64, "num_experts": 8, "expert_dim": 16}
MEMORY_KS = (4, 16)
CHECKED_TOKENS = 3
# That times are taken on, in turns.
NUM_INPUTS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One comparison."""

    device: str
    dtype: str
    tokens: int
    hidden: int
    num_experts: int
    expert_dim: int
    k: int
    compiled: bool


class Layers:
    """All contenders with the same weights, and their input."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(0)
        D, E, I = case.hidden, case.num_experts, case.expert_dim
        kwargs: Any = {"device": case.device, "dtype": DTYPES[case.dtype]}
        self.gate_up_EJD = 0.02 * torch.randn(E, 2 * I, D, **kwargs)
        self.down_EDI = 0.02 * torch.randn(E, D, I, **kwargs)
        self.router_ED = torch.randn(E, D, **kwargs) / D**0.5
        self.x_TD = torch.randn(case.tokens, D, **kwargs).requires_grad_()
        self.grad_y_TD = torch.randn(case.tokens, D, **kwargs)
        rule = SmkRule(surprise="parameters", direction="min", candidates="active")
        self.smk = SmkStep(rule=rule, grad_scale=1 / case.tokens, loss_scale=float(case.tokens))

    def bank(
        self, path: Any, *, k: int | None = None, weighting: Any = "softmax", coupled: bool = False
    ) -> ExpertBank:
        """Ours, with renormalised softmax weights of the k largest logits."""
        case = self.case
        rule = RoutingRule(selection="top_k", weighting=weighting, target_k=float(k or case.k))
        bank = ExpertBank(case.hidden, case.num_experts, case.expert_dim, "silu", rule)
        bank = bank.to(case.device)
        bank.experts.gate_up_proj = nn.Parameter(self.gate_up_EJD.clone())
        bank.experts.down_proj = nn.Parameter(self.down_EDI.clone())
        bank.router.weight.data.copy_(self.router_ED)
        bank.set_execution(Execution(path=path, compiled=case.compiled, coupled=coupled))
        return bank

    def block(self, implementation: str) -> Qwen3MoeSparseMoeBlock:
        """Transformers' MoE block."""
        case = self.case
        config = Qwen3MoeConfig(
            hidden_size=case.hidden,
            moe_intermediate_size=case.expert_dim,
            num_experts=case.num_experts,
            num_experts_per_tok=case.k,
            norm_topk_prob=True,
        )
        config._experts_implementation = implementation
        block: Any = Qwen3MoeSparseMoeBlock(config).to(case.device, DTYPES[case.dtype])
        with torch.no_grad():
            block.gate.weight.copy_(self.router_ED)
            block.experts.gate_up_proj.copy_(self.gate_up_EJD)
            block.experts.down_proj.copy_(self.down_EDI)
        return block

    def mlp(self) -> nn.Module:
        """Transformers' dense MLP of the same neurons."""
        case = self.case
        width = case.num_experts * case.expert_dim
        mlp = Qwen3MLP(Qwen3Config(hidden_size=case.hidden, intermediate_size=width))
        mlp = mlp.to(case.device, DTYPES[case.dtype])
        with torch.no_grad():
            gate_EID, up_EID = self.gate_up_EJD.chunk(2, dim=1)
            mlp.gate_proj.weight.copy_(gate_EID.flatten(0, 1))
            mlp.up_proj.weight.copy_(up_EID.flatten(0, 1))
            mlp.down_proj.weight.copy_(self.down_EDI.transpose(0, 1).flatten(1))
        return mlp

    def step(
        self, module: nn.Module, *, taught: bool = True, capture: list[Tensor] | None = None
    ) -> Tensor:
        """Forward and backward; gradients are new each time.

        A bank's gate is taught by surprise, unless told otherwise, which `capture` receives.
        """
        self.x_TD.grad = None
        module.zero_grad(set_to_none=True)
        banks = [module] if isinstance(module, ExpertBank) else []
        smk = replace(self.smk, capture=capture) if taught else None
        with row_context(banks, [RowState(smk=smk) for _ in banks]):
            y_TD = module(self.x_TD[None])[0]
            y_TD.backward(self.grad_y_TD)
        return y_TD


def paths_of(case: Case) -> tuple[str, ...]:
    """The paths that can run the case."""
    device = torch.device(case.device).type
    lack = sparse.obstacle(device, DTYPES[case.dtype], case.num_experts, "silu")
    return PATHS if lack is not None else (*PATHS, "sparse")


def contenders(layers: Layers) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules to time, by name, and why an implementation of transformers is not among them."""
    modules: dict[str, nn.Module] = {path: layers.bank(path) for path in paths_of(layers.case)}
    modules |= {"Qwen3MLP": layers.mlp()}
    if layers.case.compiled:
        compiled = layers.mlp()
        compiled.compile()
        modules["Qwen3MLP compiled"] = compiled
    skipped = {}
    for name in ("eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())):
        if (reason := why_not(name, layers.case)) is None:
            modules[f"MoE {name}"] = layers.block(name)
        else:
            skipped[name] = reason
    return modules, skipped


def why_not(implementation: str, case: Case) -> str | None:
    """Why an experts implementation cannot be timed here; None if it can."""
    if implementation in ("deepgemm", "sonicmoe"):
        return "needs kernels from the hub; layer_peers times SonicMoE from its package"
    if implementation == "batched_mm":
        # Its weights, gathered for every token and expert, and their gradients.
        size = DTYPES[case.dtype].itemsize * 6 * case.expert_dim * case.hidden
        needed = size * case.tokens * case.k
        if case.device == "cpu":
            free = psutil.virtual_memory().available
        else:
            free, _ = torch.cuda.mem_get_info(case.device)
        if needed > 0.6 * free:
            return f"needs {needed / 2**30:.0f} GiB for gathered weights"
    return None


def parity(layers: Layers) -> dict[str, Any]:
    """Every path against the block, each other, the definition and the MLP.

    Raises:
        SystemExit: one is off: nothing is timed.
    """
    case, limit = layers.case, LIMITS[layers.case.dtype]
    block: Any = layers.block("eager")
    theirs = [layers.step(block), layers.x_TD.grad, block.gate.weight.grad]
    theirs += [block.experts.gate_up_proj.grad, block.experts.down_proj.grad]
    gaps: dict[str, Any] = {}
    surprises: list[Tensor] = []
    for path in paths_of(case):
        bank = layers.bank(path, coupled=True)
        ours = [layers.step(bank, taught=False), layers.x_TD.grad, bank.router.weight.grad]
        ours += [bank.experts.gate_up_proj.grad, bank.experts.down_proj.grad]
        for name, got, expected in zip(
            ("y", "grad x", "grad router", "grad gate_up", "grad down"), ours, theirs, strict=True
        ):
            assert got is not None and expected is not None
            # Where two experts tie for the last place, bf16 logits choose otherwise than float32's.
            loose = 10 * limit if case.dtype == "bfloat16" else limit
            gaps[f"{path}: {name}"] = check(f"{path}, {name}", relative_gap(got, expected), loose)
        layers.step(layers.bank(path), capture=surprises)
    for path, surprise in zip(paths_of(case)[1:], surprises[1:], strict=True):
        gap = relative_gap(surprise, surprises[0])
        gaps[f"surprise: {path}, dense"] = check(f"surprise, {path}", gap, limit)
    gap = relative_gap(surprises[0][:CHECKED_TOKENS], defined_surprise(layers))
    gaps["surprise: dense, definition"] = check("surprise of the definition", gap, limit)
    whole = layers.bank("dense", k=case.num_experts, weighting="unit")
    gap = relative_gap(layers.step(whole), layers.step(layers.mlp()))
    gaps["all experts, Qwen3MLP"] = check("all experts, Qwen3MLP", gap, limit)
    return gaps


def defined_surprise(layers: Layers) -> Tensor:
    """Surprise of the first tokens by the definition, in float64, routed as the layer routes."""
    x, grad_y = (t[:CHECKED_TOKENS].detach() for t in (layers.x_TD, layers.grad_y_TD))
    weights = layers.bank("dense").router(x).weights.detach().cpu().double()
    x, gate_up, down, grad_y = (
        t.cpu().double() for t in (x, layers.gate_up_EJD, layers.down_EDI, grad_y)
    )
    surprise = reference.surprise("parameters", x, gate_up, down, grad_y, nn.functional.silu)
    return surprise * weights * layers.case.tokens


def on_changing_inputs(
    layers: Layers, modules: dict[str, nn.Module]
) -> dict[str, Callable[[], object]]:
    """Each module's step, every one on another input: in training the groups' sizes change."""
    inputs = itertools.cycle(
        [torch.randn_like(layers.x_TD).requires_grad_() for _ in range(NUM_INPUTS)]
    )

    def step(module: nn.Module) -> None:
        layers.x_TD = next(inputs)
        layers.step(module)

    return {name: partial(step, module) for name, module in modules.items()}


def compare(case: Case, *, repeats: int, warmup: int) -> dict[str, Any]:
    """Times (and on a GPU peak memory) of everything that runs for one k."""
    layers = Layers(case)
    gaps = parity(layers)
    modules, skipped = contenders(layers)
    times = measure(
        on_changing_inputs(layers, modules), repeats=repeats, warmup=warmup, device=case.device
    )
    peaks = {}
    if case.device != "cpu":
        for name, module in modules.items():
            module.zero_grad(set_to_none=True)
            layers.x_TD.grad = None
            peaks[name] = peak_bytes(partial(layers.step, module), case.device)
            module.zero_grad(set_to_none=True)
    return {
        "dtype": case.dtype,
        "k": case.k,
        "timings": times,
        "peak_bytes": peaks,
        "skipped": skipped,
        "parity": gaps,
    }


def memory_case(whole: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of one contender, in this process."""
    let_regions_meet_many_shapes()
    case, name = Case(**whole["case"]), whole["name"]
    layers = Layers(case)
    modules, _ = contenders(layers)
    step = partial(layers.step, modules[name])
    step()
    layers.x_TD.grad = None
    modules[name].zero_grad(set_to_none=True)
    return {"bytes": peak_bytes(step, case.device)}


def cpu_memory(results: list[dict[str, Any]], cases: list[Case]) -> None:
    """Add the peak memory on a CPU, each in a process of its own."""
    for result, case in zip(results, cases, strict=True):
        if case.k in MEMORY_KS and case.dtype == "float32":
            for name in result["timings"]:
                whole = {"name": name, "case": {s: getattr(case, s) for s in case.__slots__}}
                result["peak_bytes"][name] = in_subprocess("expert_layer", whole)["bytes"]


def row_of(result: dict[str, Any]) -> dict[str, Any]:
    """One line of the table: medians in milliseconds, and the ratios of the goals."""
    medians = {name: timing.p50_ms for name, timing in result["timings"].items()}
    ours = min(medians[path] for path in (*PATHS, "sparse") if path in medians)
    best = min(value for name, value in medians.items() if name.startswith("MoE "))
    return {
        "dtype": result["dtype"],
        "k": result["k"],
        **medians,
        "ours / Qwen3MLP": ours / medians["Qwen3MLP"],
        "dense / Qwen3MLP": medians["dense"] / medians["Qwen3MLP"],
        "ours / best MoE": ours / best,
    }


def write_crossover(results: list[dict[str, Any]], case: Case, where: dict[str, Any]) -> None:
    """Store the measured crossover of every number format that was timed."""
    table = json.loads(FILE.read_text("utf-8"))
    for dtype in {result["dtype"] for result in results}:
        timings: dict[int, dict[str, Timing]] = {
            result["k"]: result["timings"] for result in results if result["dtype"] == dtype
        }
        times = {
            path: {k: timing[path].p50_ms for k, timing in timings.items() if path in timing}
            for path in (*PATHS, "sparse")
        }
        # The dense path's time does not depend on k: the middle of all.
        dense = sorted(times["dense"].values())[len(timings) // 2]
        entry: dict[str, Any] = {
            "share": round(crossover_share(dense, times["grouped"], case.num_experts), 3),
            "machine": f"{where.get('gpu', where['machine'])}, {where['threads']} threads",
            "torch": where["versions"]["torch"],
            "tokens": case.tokens,
        }
        if times["sparse"] and "capability" in where:
            share = fastest_share(dense, times["grouped"], times["sparse"], case.num_experts)
            same = {key: entry[key] for key in ("machine", "torch", "tokens")}
            entry["sparse"] = {"share": round(share, 3), "capability": where["capability"], **same}
        table[f"{torch.device(case.device).type} {dtype}"] = entry
    text = json.dumps(dict(sorted(table.items())), indent=2)
    Path(str(FILE)).write_text(f"{text}\n", encoding="utf-8")


def let_regions_meet_many_shapes() -> None:
    """Allow one region two paths, two formats, and row counts that grow with k."""
    torch._dynamo.config.recompile_limit = 64


@benchmark(
    "Time and memory of one expert layer, surprise included, against a dense MLP and other MoEs.",
    case=memory_case,
    tokens=Option(2048, smoke=64),
    dtype=Option(list(DTYPES), choices=tuple(DTYPES)),
    k=Option([2, 4, 8, 16, 32], smoke=[2, 8]),
    repeats=Option(9, smoke=2),
    write_crossover=Option(False, "store the measured crossover in the package"),
)
def run(arguments: argparse.Namespace) -> Result:
    """Compare at every k in every format."""
    let_regions_meet_many_shapes()
    device, smoke = arguments.device, arguments.smoke
    shape: dict[str, Any] = {"tokens": arguments.tokens, "compiled": not smoke}
    shape |= SMALL if smoke else QWEN3
    cases = [
        Case(device=device, dtype=dtype, k=k, **shape)
        for dtype in arguments.dtype
        for k in arguments.k
    ]
    repeats, warmup = arguments.repeats, 1 if smoke else 3
    results = [compare(case, repeats=repeats, warmup=warmup) for case in cases]
    if device == "cpu" and not smoke:
        cpu_memory(results, cases)
    if arguments.write_crossover:
        write_crossover(results, cases[0], environment(device))
    rows = [row_of(result) for result in results]
    return Result(
        rows=rows,
        ratios={
            f"{name}, {row['dtype']}, k={row['k']}": row[name]
            for row in rows
            for name in ("ours / Qwen3MLP", "ours / best MoE")
        },
        settings={"shape": shape, "repeats": repeats, "warmup": warmup},
        more={"cases": results},
    )
