"""The decoding kernels against the definition and the torch path.

`triton_cases` says where they run.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2FN

from benchmarks.kernels_once import counted
from tiny import make_dense, make_ids, make_student
from tiny_onn.model.experts import ExpertBank, recorded_routings, selecting
from tiny_onn.model.router import RoutingRule, route
from tiny_onn.ops import decode, reference
from tiny_onn.ops.decode_launches import can_overlap, overlap_options
from triton_cases import (
    DEVICE,
    RUNS,
    assert_passes_in_the_interpreter,
    gpu,
    kernels,
    outside_the_interpreter,
)

DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=gpu)]
# The shapes (T, E, I, D) cover odd sizes, one expert, one neuron, and several blocks of each.
SHAPES = [(1, 5, 12, 40), (3, 4, 9, 33), (2, 1, 1, 8), (16, 3, 2, 16)]
# With these sizes all numbers of tokens take the kernel that computes an expert for all tokens.
TILES = decode.KernelBlocks(tile_tokens=1, tile_width=16, tile_hidden=32)
WAYS = {"tokens": decode.KernelBlocks(tile_tokens=17), "tiles": TILES}
per_way = pytest.mark.parametrize("blocks", WAYS.values(), ids=WAYS)
LARGE = [(1, 5, 48, 576), (2, 32, 96, 1024), (16, 3, 20, 1500)]
# On a GPU the other path's products round too.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")]
MODES = {
    "budget": RoutingRule(selection="budget"),
    "top_k": RoutingRule(selection="top_k"),
    "static": RoutingRule(selection="static"),
    "budget, shared": RoutingRule(selection="budget", num_shared=1),
    "top_k, shared": RoutingRule(selection="top_k", num_shared=1),
    "cumulative": RoutingRule(selection="budget", budget_form="cumulative"),
    "top_any": RoutingRule(selection="top_any"),
    "oracle": RoutingRule(selection="oracle"),
}


@outside_the_interpreter
def test_the_kernels_pass_in_the_interpreter():
    assert_passes_in_the_interpreter(__file__)


@pytest.mark.skipif(RUNS, reason="a CPU's torch takes the other paths")
def test_a_cpu_takes_the_other_paths():
    bank = make_bank(MODES["budget"])
    with torch.no_grad():
        assert not decode.can_decode(
            torch.zeros(1, 33),
            bank.experts.gate_up_proj,
            bank.experts.down_proj,
            bank.activation_name,
        )


def make_layer(shape, dtype=torch.float32, seed=0) -> list[Tensor]:
    """Return input, experts and weights of a layer; about half of the experts are active."""
    T, E, I, D = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    weights = 2 * torch.rand(T, E, generator=generator)
    weights *= torch.rand(T, E, generator=generator) < 0.5
    tensors = [normal(T, D), normal(E, 2 * I, D) / D**0.5, normal(E, D, I) / (E * I) ** 0.5]
    return [*(tensor.to(DEVICE, dtype) for tensor in tensors), weights.to(DEVICE)]


def defined(x, gate_up, down, weights, activation=F.silu) -> Tensor:
    """Return the definition's output in float64, without loops over tokens for large shapes."""
    x, gate_up, down, weights = (t.detach().double().cpu() for t in (x, gate_up, down, weights))
    gate, up = torch.einsum("td,ejd->tej", x, gate_up).chunk(2, dim=-1)
    return torch.einsum("tei,edi->td", activation(gate) * up * weights[..., None], down)


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Check equality up to float32's sums and the rounding of the output."""
    unit = 2.0**-8 if got.dtype == torch.bfloat16 else 2.0**-20
    assert not got.isnan().any()
    error, size = (got.double().cpu() - expected).abs(), expected.abs()
    assert (error <= unit * size + 2.0**-19 * size.max()).all(), error.max()


@kernels
@per_way
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + (LARGE if DEVICE == "cuda" else LARGE[:1]), ids=str)
def test_output_is_that_of_the_definition(shape, dtype, blocks):
    x, gate_up, down, weights = make_layer(shape, dtype)
    with torch.no_grad():
        y = decode.expert_layer(
            x, gate_up, down, weights, weights != 0, activation="silu", blocks=blocks
        )
    assert y.dtype == dtype
    assert_close(y, defined(x, gate_up, down, weights))
    if shape in SHAPES:
        exact = [t.double().cpu() for t in (x, gate_up, down, weights)]
        assert_close(y, reference.expert_layer(*exact, activation=F.silu))


@kernels
@pytest.mark.parametrize("name", decode.ACTIVATIONS)
def test_every_activation_is_that_of_transformers(name):
    x, gate_up, down, weights = make_layer((2, 3, 8, 32))
    gate_up *= 3
    y = decode.expert_layer(x, gate_up, down, weights, weights != 0, activation=name)
    assert_close(y, defined(x, gate_up, down, weights, ACT2FN[name]))


@kernels
@per_way
@pytest.mark.parametrize("num_active", range(6))
def test_only_active_experts_are_read(num_active, blocks):
    x, gate_up, down, weights = make_layer((1, 5, 12, 40))
    active = torch.zeros(1, 5, dtype=torch.bool, device=DEVICE)
    active[:, torch.randperm(5)[:num_active]] = True
    weights += 1
    expected = defined(x, gate_up, down, weights * active)
    # Weights that are not read may hold anything.
    gate_up[~active[0]], down[~active[0]] = float("nan"), float("nan")
    y = decode.expert_layer(x, gate_up, down, weights, active, activation="silu", blocks=blocks)
    assert_close(y, expected)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if DEVICE == "cuda" else DTYPES)
def test_master_weights_need_no_rounding(dtype):
    x, _, _, weights = make_layer((2, 3, 12, 40), dtype)
    _, gate_up, down, _ = make_layer((2, 3, 12, 40))
    y = decode.expert_layer(x, gate_up, down, weights, weights != 0, activation="silu")
    assert y.dtype == dtype
    assert_close(y, defined(x, gate_up, down, weights))


@kernels
@settings(max_examples=60 if DEVICE == "cuda" else 25, deadline=None)
@given(data=st.data())
def test_routing_is_that_of_the_router(data):
    E, T = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    rule = RoutingRule(
        selection=data.draw(st.sampled_from(("budget", "top_k", "static", "random"))),
        weighting=data.draw(st.sampled_from(("unit", "mean", "softmax", "sigmoid"))),
        target_k=float(k := data.draw(st.integers(1, E))),
        num_shared=data.draw(st.integers(0, k - 1)),
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    # With small whole numbers logits are exact in any order of summation, and many are equal.
    high = data.draw(st.integers(1, 3))
    x = torch.randint(-1, 2, (T, 6), generator=generator).float()
    gate, bias = (torch.randint(-high, high + 1, (E, n), generator=generator) for n in (6, 1))
    bias = bias[:, 0].float()
    selection_bias = torch.randint(-2, 3, (E,), generator=generator) / 2
    logits = x @ gate.float().T + bias
    free = route(logits, rule, torch.tensor(0.0), selection_bias)
    # The threshold lies between two scores that occur, or beyond their ends.
    ordered = torch.cat((free.scores.clamp(max=1).flatten(), torch.tensor([-0.5]))).sort().values
    number = data.draw(st.integers(0, len(ordered) - 2))
    threshold = ordered[number : number + 2].mean()
    want = route(logits, rule, threshold, selection_bias)
    _, gate_up, down, _ = make_layer((T, E, 2, 6))
    inputs = [t.float().to(DEVICE) for t in (gate, bias, selection_bias, threshold)]
    kernel_rule = selecting(rule)
    assert kernel_rule is not None
    got = decode.routed_expert_layer(
        x.to(DEVICE),
        gate_up,
        down,
        decode.Gate(*inputs),
        rule=kernel_rule,
        activation="silu",
        blocks=data.draw(st.sampled_from(list(WAYS.values()))),
    )
    assert torch.equal(got.logits_TE.cpu(), logits)
    S = rule.num_shared
    order = (logits + selection_bias)[:, S:].argsort(dim=-1, descending=True, stable=True)
    in_order = got.active_TE[:, S:].cpu().gather(-1, order).int()
    assert (in_order.diff(dim=-1) <= 0).all(), "equal logits are ordered by expert"
    assert in_order[:, 0].all()
    # A GPU's exponential is off by some units in the last place, and so are its scores.
    unit = 2.0**-19 if DEVICE == "cuda" else 2.0**-22
    if not rule.has_budget or (want.scores - threshold).abs().min() > unit * threshold.abs():
        assert torch.equal(got.active_TE.cpu(), want.active)
        torch.testing.assert_close(got.weights_TE.cpu(), want.weights)
    torch.testing.assert_close(got.scores_TE.cpu(), want.scores)
    assert_close(got.y_TD, defined(x, gate_up, down, got.weights_TE))


@kernels
@pytest.mark.parametrize("E", [5, 32])
def test_a_flat_gate_activates_as_many_as_its_threshold_says(E):
    for k in range(1, E + 1) if DEVICE == "cuda" else {1, 2, E // 2, E - 1, E}:
        rule = RoutingRule(target_k=float(k))
        bank = make_bank(rule, E=E, I=1, D=8, gate_std=None)
        with torch.no_grad(), recorded_routings([bank]) as routings:
            bank(torch.ones(1, 8, device=DEVICE))
        assert routings[0].active[0].tolist() == [e < k for e in range(E)]


def make_bank(
    rule, *, E=5, I=12, D=33, seed=0, gate_std: float | None = 0.3, **options: Any
) -> ExpertBank:
    """Return a bank with every correction at work, ready for evaluation."""
    bank = ExpertBank(D, E, I, options.pop("activation", "silu"), rule, **options)
    generator = torch.Generator().manual_seed(seed)
    bank.experts.reset(generator, std=0.3)
    bank.router.reset(None if gate_std is None else generator, std=gate_std or 0.0)
    if gate_std is not None:
        bank.router.settled.fill_(0.7 / E)
        bank.router.threshold.fill_(2.0)
        bank.router.selection_bias.copy_(torch.randn(E, generator=generator) * 0.1)
    with torch.no_grad():
        if bank.mean_outputs is not None:
            bank.mean_outputs.copy_(torch.randn(E, D, generator=generator))
        if bank.expert_scale is not None:
            bank.expert_scale.copy_(torch.rand(E, generator=generator))
    return bank.to(DEVICE).train(False)


class Watch(TorchDispatchMode):
    """Counts torch's own matrix products with the experts."""

    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm)
        return out


@kernels
@per_way
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("corrected", [False, True])
def test_a_bank_decodes_what_its_other_path_computes(mode, corrected, blocks):
    rule = replace(MODES[mode], target_k=2.0)
    bank = make_bank(rule, compensated=corrected, scaled=corrected)
    bank.set_execution(replace(bank.execution, decode_blocks=blocks))
    x = torch.randn(2, 3, 33, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with recorded_routings([bank]) as routings:
        want = bank(x).detach()
        with torch.no_grad():
            got = bank(x)
    by_router, ours = routings
    assert got.shape == x.shape
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for name in ("router_logits", "scores", "active", "weights"):
        torch.testing.assert_close(getattr(ours, name), getattr(by_router, name).detach())
    with torch.no_grad(), Watch() as watch:
        bank(x)
    assert len(routings) == 2
    assert mode.partition(",")[0] not in ("budget", "top_k", "static") or watch.products == 0


@kernels
def test_what_the_kernels_do_not_know_takes_the_other_paths():
    x = torch.randn(2, 33, device=DEVICE)
    cases = {
        "gradients": (make_bank(MODES["budget"]), x),
        "many tokens": (make_bank(MODES["budget"]), x.repeat(9, 1)),
        "activation": (make_bank(MODES["budget"], activation="relu"), x),
        "format": (make_bank(MODES["budget"]).double(), x.double()),
        "training": (make_bank(MODES["budget"]).train(), x),
        "experts": (make_bank(MODES["budget"], E=decode.MAX_EXPERTS + 1, I=1), x),
    }
    for name, (bank, inputs) in cases.items():
        with torch.set_grad_enabled(name == "gradients"), Watch() as watch:
            y = bank(inputs)
        assert watch.products > 0, name
        # A CPU without gradients takes a third path, whose sums differ.
        torch.testing.assert_close(y, bank(inputs), rtol=1e-4, atol=1e-4)


@kernels
@per_way
def test_results_repeat_bit_for_bit(blocks):
    bank = make_bank(MODES["budget"], compensated=True)
    bank.set_execution(replace(bank.execution, decode_blocks=blocks))
    x = torch.randn(3, 33, device=DEVICE)
    with torch.no_grad():
        assert torch.equal(bank(x), bank(x))


@kernels
@pytest.mark.compiled
@per_way
@pytest.mark.parametrize("mode", ["budget", "top_k", "cumulative"])
def test_a_compiled_bank_calls_the_kernels_without_a_graph_break(mode, blocks):
    rule = replace(MODES[mode], target_k=2.0)
    bank = make_bank(rule, compensated=True, scaled=True)
    bank.set_execution(replace(bank.execution, decode_blocks=blocks))
    x = torch.randn(2, 33, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    called = []

    def backend(graph, _):
        called.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(bank, backend=backend, fullgraph=True)
    with torch.no_grad(), recorded_routings([bank]) as routings:
        want, got = bank(x), compiled(x)
    # Nothing but the graph was compiled, so that the bits are those of a plain call.
    assert torch.equal(got, want)
    for name in ("router_logits", "scores", "active", "weights"):
        assert torch.equal(getattr(routings[1], name), getattr(routings[0], name))
    kind = "decode_experts" if mode == "cumulative" else "decode_routed_experts"
    assert sum(kind in str(target) for target in called) == 1


@kernels
@pytest.mark.parametrize(("number", "experts"), [(7, "experts_kernel"), (8, "tile_kernel")])
def test_eight_tokens_are_enough_to_compute_experts_for_all_tokens_at_once(number, experts):
    x, gate_up, down, weights = make_layer((number, 3, 2, 16))
    with counted() as (_, launched):
        decode.expert_layer(x, gate_up, down, weights, weights != 0, activation="silu")
    assert launched == {experts, "combine_kernel"}


@gpu
def test_only_launches_for_few_tokens_overlap():
    blocks = decode.KernelBlocks()
    overlaps = [overlap_options(torch.ones(n, 1, device=DEVICE), blocks) for n in (1, 7, 8, 16)]
    few = can_overlap(torch.device(DEVICE))
    assert [options["OVERLAP"] for options in overlaps] == [few, few, False, False]


@gpu
def test_overlapping_launches_change_no_bit():
    bank = make_bank(replace(MODES["budget"], target_k=7.0), E=32, I=96, D=1024)
    bank.experts.store_for_generation()
    x = torch.randn(4, 1024, device=DEVICE)
    outputs = []
    for overlap in (False, True):
        given = decode.KernelBlocks(overlap=overlap)
        bank.set_execution(replace(bank.execution, decode_blocks=given))
        with torch.no_grad():
            outputs.append([bank(x * scale) for scale in range(50)])
    assert all(map(torch.equal, *outputs))


@gpu
@pytest.mark.parametrize("mode", ["budget", "top_k", "cumulative"])
def test_a_captured_graph_follows_the_routing_of_its_input(mode):
    rule = replace(MODES[mode], target_k=7.0)
    bank = make_bank(rule, E=32, I=24, D=64, gate_std=1.0, compensated=True).bfloat16()
    bank.router.float()
    static, stream = torch.randn(1, 64, device=DEVICE).bfloat16(), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            bank(static)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph), recorded_routings([bank]) as routings:
            out = bank(static)
    routing, counts = routings[0], set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 64, generator=generator) * seed
        static.copy_(x)
        graph.replay()
        with torch.no_grad(), recorded_routings([bank]) as routings:
            assert torch.equal(out, bank(static))
        assert torch.equal(routing.active, routings[0].active)
        counts.add(int(routing.active.sum()))
    assert mode == "top_k" or len(counts) > 2


@kernels
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_a_student_s_logits_are_those_of_its_other_path(family):
    student = make_student(make_dense(family)).train(False)
    student.to(DEVICE)  # pyright: ignore[reportArgumentType] - transformers hides Module.to
    ids = make_ids(1, 12).to(DEVICE)
    want = student(ids, use_cache=False).logits.detach()
    with torch.no_grad():
        got = student(ids, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_rounding_the_experts_for_generation_changes_no_bit():
    student = make_student(make_dense(dtype="bfloat16"), compensation="mean").train(False)
    ids = make_ids()
    assert student.banks()[0].experts.gate_up_proj.dtype == torch.float32
    with torch.no_grad():
        want = student(ids, use_cache=False).logits
        student.round_experts()
        got = student(ids, use_cache=False).logits
    assert student.banks()[0].experts.gate_up_proj.dtype == torch.bfloat16
    assert student.banks()[0].router.weight.dtype == torch.float32
    assert torch.equal(got, want)
