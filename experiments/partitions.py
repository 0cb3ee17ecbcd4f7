"""How much of the teacher survives the cut, untrained: partitions, routers, gates, compensation.

SmolLM2-135M in 32 experts, 16 on. For each partition the distance to the teacher on held-out text
under four routers: `oracle` (largest true output norms), `ridge` (a linear gate fitted to log
norms), `static` (best mean norms) and `random`. On one partition also: `budget` (the ridge gate, 16
on average), other gates, experts that are always on, and what stands in for inactive experts.
The neuron oracle, which keeps each token's best half of single neurons, is the ceiling.

    python -m experiments.partitions [--only learned importance] [--num-shared 4] [--brief]

With `--num-shared S` each layer's first S experts are always on and hold the neurons of largest
energy; the 16 count them.

Calibration is 8,192 training tokens, evaluation 4,096 held-out tokens, both of the embedded text,
unless options say otherwise.
Ends in one JSON line.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.common import environment, report
from benchmarks.steps import random_dense, random_rows
from experiments.options import parser, results_folder
from tiny_onn.config.read import load_config, with_router
from tiny_onn.config.schema import RunConfig
from tiny_onn.conversion.gates import Ridge, expert_norms, fit_gates
from tiny_onn.conversion.partition import sample_inputs
from tiny_onn.conversion.pipeline import make_student, partition
from tiny_onn.data.packing import PackedRow
from tiny_onn.data.rows import calibration_rows, held_out_rows
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import gated_mlps, head_of, last_hidden_states
from tiny_onn.model.experts import ExpertBank, recorded_routings
from tiny_onn.model.exploration import Exploration
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.router import Router, Routing, RoutingRule, route, temporary_rules
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.ops.distillation_loss import distill
from tiny_onn.routing.budgets import fit_start_thresholds
from tiny_onn.teacher.load import load_dense, quiet_transformers

PARTITIONS = ("slices", "cluster", "coactivation", "importance", "learned")
DETAILED = "learned"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """The teacher, its text, and what it says about the held-out part."""

    config: RunConfig
    dense: PreTrainedModel
    inputs: MlpInputs
    held_out: Sequence[PackedRow]
    expected: Sequence[Tensor]

    @torch.no_grad()
    def distance(self, model: PreTrainedModel) -> dict[str, float]:
        """Forward KL and agreement over the held-out tokens that have a label; experts that are on.

        `k` is the mean over the tokens that a budget counts, `k_first` over the documents' first.
        """
        sums, count = torch.zeros(2, dtype=torch.float64), 0
        banks = model.banks() if isinstance(model, TinyOnnForCausalLM) else []
        active = {"k": [torch.zeros(0)], "k_first": [torch.zeros(0)]}
        for row, expected_TD in zip(self.held_out, self.expected, strict=True):
            with recorded_routings(banks) as routings:
                hidden_TD = last_hidden_states(model, row.input_ids, **packed_kwargs(row))[0]
            values = distill(
                hidden_TD,
                expected_TD,
                head_of(model),
                head_of(self.dense),
                row.labels[0],
                divergence="forward_kl",
                temperature=1.0,
                jsd_beta=0.5,
                chunk_tokens=512,
            )
            mask_T = row.loss_mask[0]
            for i, value_T in enumerate((values.forward_kl, values.agrees)):
                sums[i] += value_T[mask_T].double().sum().cpu()
            count += int(mask_T.sum())
            first_T = (row.position_ids[0] == 0) & mask_T
            for routing in routings:
                on_T = routing.active.sum(1).float()
                active["k"].append(on_T[row.router_mask[0]].cpu())
                active["k_first"].append(on_T[first_T].cpu())
        kl, agreement = (sums / count).tolist()
        ks = {name: torch.cat(on).mean().item() for name, on in active.items() if banks}
        return {"kl": kl, "agreement": agreement, **ks}


@contextmanager
def neuron_oracle(dense: PreTrainedModel, share: float) -> Iterator[None]:
    """Within the context the model keeps each token's neurons of largest `|h| |down|`."""

    def keep_best(down: nn.Linear, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        size = inputs[0].abs() * down.weight.norm(dim=0)
        best = size.topk(round(share * size.shape[-1]), dim=-1).indices
        return (inputs[0] * torch.zeros_like(size).scatter_(-1, best, 1.0),)

    handles = [m.down_proj.register_forward_pre_hook(keep_best) for m in gated_mlps(dense)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def routers(student: TinyOnnForCausalLM, make: Callable[[ExpertBank], Router]) -> Iterator[None]:
    """Within the context every bank has another router."""
    kept = [bank.router for bank in student.banks()]
    for bank in student.banks():
        bank.set_submodule("router", make(bank))
    try:
        yield
    finally:
        for bank, router in zip(student.banks(), kept, strict=True):
            bank.set_submodule("router", router)


def outputs(bank: ExpertBank, x_TD: Tensor) -> Iterator[Tensor]:
    """Every expert's output, one after another."""
    experts = bank.experts
    for gate_up_JD, down_DI in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        gate_ID, up_ID = gate_up_JD.chunk(2)
        yield (bank.activation(x_TD @ gate_ID.T) * (x_TD @ up_ID.T)) @ down_DI.T


GATES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "gate: log norm": lambda n, k: n.log(),
    "gate: log norm, mean removed": lambda n, k: n.log() - n.log().mean(1, keepdim=True),
    "gate: log share": lambda n, k: (n / n.norm(dim=1, keepdim=True)).log(),
    "gate: root norm": lambda n, k: n.sqrt(),
    "gate: share": lambda n, k: n.square() / n.square().sum(1, keepdim=True),
    "gate: membership": lambda n, k: torch.zeros_like(n).scatter_(1, n.topk(k, 1).indices, 1.0),
}


@torch.no_grad()
def set_gates(banks: Sequence[ExpertBank], inputs: Sequence[Tensor], name: str) -> None:
    """Ridge gates toward a function of the experts' norms."""
    for bank, x_TD in zip(banks, inputs, strict=True):
        norms_TE = expert_norms(bank, x_TD).clamp_min(1e-6)
        weight_DE, bias_E = Ridge(x_TD).fit(GATES[name](norms_TE, round(bank.router.rule.target_k)))
        bank.router.weight.copy_(weight_DE.T)
        bank.router.bias.copy_(bias_E)


class Representative(Router):
    """CMoE's gate (arXiv 2502.04416, 4.2): |h| of the neuron nearest to each expert's mean."""

    def __init__(self, bank: ExpertBank, x_TD: Tensor) -> None:
        E, D, I = bank.experts.down_proj.shape
        super().__init__(D, E, bank.router.rule)
        x_TD = x_TD.float()
        rows_E2ID = bank.experts.gate_up_proj.detach().view(E, 2, I, D)
        pre_TE2I = (x_TD @ rows_E2ID.view(-1, D).T).view(-1, E, 2, I)
        hidden_TEI = (bank.activation(pre_TE2I[:, :, 0]) * pre_TE2I[:, :, 1]).abs()
        rates_TEI = F.normalize(hidden_TEI, dim=0)
        nearest_E = (rates_TEI - rates_TEI.mean(2, keepdim=True)).norm(dim=0).argmin(1)
        self.rows_2ED = rows_E2ID[torch.arange(E), :, nearest_E].transpose(0, 1)
        self.activation = bank.activation

    def forward(
        self,
        x_TD: Tensor,
        given_TE: Tensor | None = None,
        *,
        exploration: Exploration | None = None,
    ) -> Routing:
        """The k experts whose representatives are largest."""
        gate_TE, up_TE = (x_TD.float() @ rows_ED.T for rows_ED in self.rows_2ED)
        return route((self.activation(gate_TE) * up_TE).abs(), self.rule, self.threshold)


@contextmanager
def compensated(
    student: TinyOnnForCausalLM, inputs: Sequence[Tensor], *, inactive_only: bool
) -> Iterator[None]:
    """Within the context an inactive expert gives its mean output (over tokens where inactive)."""
    stack = ExitStack()
    for bank, narrow_TD in zip(student.banks(), inputs, strict=True):
        x_TD = narrow_TD.float()
        off_TE = (~bank.router(x_TD).active).float()
        used_TE = off_TE if inactive_only else torch.ones_like(off_TE)
        share_TE = used_TE / used_TE.sum(0).clamp_min(1)
        means_ED = torch.stack(
            [share_TE[:, e] @ out_TD for e, out_TD in enumerate(outputs(bank, x_TD))]
        )

        routings = stack.enter_context(recorded_routings([bank]))
        stack.enter_context(bank.register_forward_hook(partial(_add_means, routings, means_ED)))
    with stack:
        yield


def _add_means(
    routings: list[Routing], means_ED: Tensor, _: nn.Module, inputs: object, y: Tensor
) -> Tensor:
    """As a forward hook, add the mean outputs of the experts that were inactive."""
    del inputs
    missing_TD = (~routings.pop().active).float() @ means_ED
    return y + missing_TD.view_as(y).to(y.dtype)


def details(bench: Bench, student: TinyOnnForCausalLM, add: Callable[..., None]) -> None:
    """Other gates, budgets and what stands in for inactive experts, on one partition."""
    banks, inputs = student.banks(), sample_inputs(bench.inputs, 8192)
    pairs = dict(zip(banks, inputs, strict=True))
    with routers(student, lambda bank: Representative(bank, pairs[bank])):
        add("gate: representatives", student)
    for name in GATES:
        set_gates(banks, inputs, name)
        add(name, student)
    fit_gates(bench.inputs, banks)
    for name, only in (("ridge, means", False), ("ridge, means where off", True)):
        with torch.no_grad(), compensated(student, inputs, inactive_only=only):
            add(name, student)
    every = [bank.router for bank in banks]
    budgets = [
        RoutingRule(
            selection="budget", target_k=router.rule.target_k, num_shared=router.rule.num_shared
        )
        for router in every
    ]
    with temporary_rules(every, budgets):
        fit_start_thresholds(bench.inputs, banks)
        add("ridge, budget", student)
        with torch.no_grad(), compensated(student, inputs, inactive_only=True):
            add("ridge, budget, means where off", student)


def measure_partition(bench: Bench, init: str, rows: list[dict], *, brief: bool) -> None:
    """One partition under all routers, and in detail where it is the one for that.

    `brief`: neither the details nor the random router.
    """
    start = time.perf_counter()
    order = partition(bench.config, bench.inputs)
    seconds = time.perf_counter() - start

    def add(router: str, model: PreTrainedModel) -> None:
        rows.append({"partition": init, "router": router, **bench.distance(model)})
        print(rows[-1], flush=True)

    print(init, f"{seconds:.1f} s", flush=True)
    make = partial(make_student, inputs=bench.inputs, order=order)
    student = make(with_router(bench.config, selection="top_k", objective="none"))
    rows_before = len(rows)
    add("ridge", student)
    for name in ("oracle", "static") if brief else ("oracle", "static", "random"):
        add(name, make(with_router(bench.config, selection=name, objective="none")))
    rows[rows_before]["partition_seconds"] = seconds
    if init == DETAILED and not brief:
        details(bench, student, add)


def prepare_bench(arguments, init: str) -> Bench:
    """The teacher and its text."""
    sets = [f"experts.calibration_tokens={arguments.calibration_tokens}", "train.compile=false"]
    sets += [f"data.eval_tokens={arguments.eval_tokens}", f'experts.init="{init}"']
    # The rows of the preset when the records were made; it has shorter ones now.
    sets += [f"experts.num_shared={arguments.num_shared}", "data.row_tokens=1024"]
    sets += arguments.set
    config = load_config(None, "demo", sets)
    device = torch.device(arguments.device)
    if arguments.smoke:
        config = load_config(
            None,
            "demo",
            [*sets, "experts.num_experts=8", "router.target_k=4", "data.row_tokens=64"],
        )
        dense = random_dense("tiny", config, device)
        calibration, held_out = (
            random_rows(512, 256, documents=(9, 30), seed=seed) for seed in (0, 1)
        )
    else:
        dense, tokenizer = load_dense(config.teacher, device)
        calibration = calibration_rows(config, tokenizer, device)
        held_out = held_out_rows(
            config.data, tokenizer, config.data.row_tokens, arguments.eval_tokens
        )
        held_out = [row.to(device) for row in held_out]
    with torch.no_grad():
        expected = [
            last_hidden_states(dense, row.input_ids, **packed_kwargs(row))[0] for row in held_out
        ]
    return Bench(
        config=config,
        dense=dense,
        inputs=MlpInputs(dense, calibration),
        held_out=held_out,
        expected=expected,
    )


def main() -> None:
    """Measure, print, write."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", default=list(PARTITIONS), choices=PARTITIONS)
    options.add_argument("--num-shared", type=int, default=0, help="experts that are always on")
    options.add_argument("--brief", action="store_true", help="no random router, no details")
    options.add_argument("--calibration-tokens", type=int, default=8192)
    options.add_argument("--eval-tokens", type=int, default=4096)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--set", action="append", default=[], help="SECTION.KEY=VALUE")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet_transformers()
    rows: list[dict] = []
    for number, init in enumerate(arguments.only):
        bench = prepare_bench(arguments, init)
        if number == 0:
            with neuron_oracle(bench.dense, 0.5):
                rows.append(
                    {"partition": "neurons", "router": "oracle"} | bench.distance(bench.dense)
                )
            print(rows[-1], flush=True)
        measure_partition(bench, init, rows, brief=arguments.brief)
    kl = {(row["partition"], row["router"]): row["kl"] for row in rows}
    ratios: dict[str, float | None] = {
        f"{init} / importance, KL of the {router} router": kl[init, router]
        / kl["importance", router]
        for init in arguments.only
        for router in ("oracle", "ridge")
        if ("importance", router) in kl
    }
    report(
        "partitions",
        rows,
        ratios or {"none": None},
        results_folder(arguments),
        settings={
            "smoke": arguments.smoke,
            "calibration_tokens": arguments.calibration_tokens,
            "eval_tokens": arguments.eval_tokens,
            "num_shared": arguments.num_shared,
            "set": arguments.set,
        },
        environment=environment(arguments.device),
    )


if __name__ == "__main__":
    main()
