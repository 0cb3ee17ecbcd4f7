"""The grouped path against the definition and the dense path, and the choice between them.

Low precision follows `test_expert_layer`'s criterion. Its plain formula is here the textbook one at
the same precision, expert by expert, which rounds each expert's output as this path does.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers.activations import ACT2FN

from expert_cases import (
    KINDS,
    PATTERNS,
    RULES,
    Case,
    Watch,
    bank_gradients,
    batch,
    by_definition,
    make_bank,
    make_case,
    smk_step,
)
from tiny import make_dense, make_student
from tiny_onn.config.checks import validate
from tiny_onn.config.routing_checks import path_refusal
from tiny_onn.config.schema import ExpertsConfig, RouterConfig, RunConfig, SmkConfig, TrainConfig
from tiny_onn.errors import UserError
from tiny_onn.model import expert_path
from tiny_onn.model.expert_path import (
    PathChoice,
    choose_path,
    computed_share,
    crossover_share,
    fastest_share,
    read_crossover,
    set_objective,
)
from tiny_onn.ops import decode, dense_masked, grouped, reference
from tiny_onn.ops.grouped import expert_layer, gather_mm, group_rows, outer_mm, scatter_mm
from tiny_onn.ops.router_gradient import SurpriseTally
from tiny_onn.ops.surprise import SmkRule

ROUTINGS = (*PATTERNS, "nobody")


def case_of(num_tokens, routing="mixed", seed=0) -> Case:
    """Return `make_case`'s tensors, or a routing in which no token has an expert."""
    if routing != "nobody":
        return make_case(num_tokens, routing, seed)
    case = make_case(num_tokens, "mixed", seed)
    return case._replace(weights=torch.zeros_like(case.weights))


def results(leaves, grad_y, layer=expert_layer, activation=F.silu, **options: Any) -> list[Tensor]:
    """Return output and all five gradients."""
    x, gate_up, down, weights, logits = leaves
    options.setdefault("smk", smk_step(len(x)))
    y = layer(x, gate_up, down, weights, logits, activation=activation, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


def defined(case: Case, activation=F.silu) -> list[Tensor]:
    """Return the definition's results, with gradients of 0 for inactive experts' weights."""
    *others, of_weights, of_logits = by_definition(case, activation, SmkRule())
    return [*others, of_weights * (case.weights != 0), of_logits]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("num_tokens", [1, 63])
def test_equals_the_definition_in_output_and_every_gradient(num_tokens, routing):
    case = case_of(num_tokens, routing)
    got = results(case.leaves(), case.grad_y)
    assert_close(got, defined(case), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "relu"])
def test_any_activation_equals_the_definition(name):
    case = make_case(41, seed=1)
    got = results(case.leaves(), case.grad_y, activation=ACT2FN[name])
    assert_close(got, defined(case, ACT2FN[name]), rtol=0, atol=1e-10)


# torch 2.13's inductor warns about torch itself when it is imported.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.compiled
def test_compiled_regions_equal_the_definition_for_any_number_of_rows():
    for num_tokens, routing in ((63, "mixed"), (41, "mixed"), (63, "nobody")):
        case = case_of(num_tokens, routing)
        got = results(case.leaves(), case.grad_y, compiled=True)
        assert_close(got, defined(case), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_surprise_of_active_experts_is_the_definition_and_of_others_zero(kind):
    case = make_case(23)
    seen: list[Tensor] = []
    step = smk_step(23, SmkRule(surprise=kind), loss_scale=3.0, capture=seen)
    results(case.leaves(), case.grad_y, smk=step)
    exact = reference.surprise(kind, *case[:3], case.grad_y, F.silu)
    scale = 1.0 if kind == "magnitude" else 3.0
    assert_close(seen[0], exact * case.weights * scale, rtol=0, atol=1e-9)


def test_masked_tokens_and_the_tally_are_as_in_the_dense_path():
    case = make_case(40)
    tallies = []
    for layer in (dense_masked.expert_layer, expert_layer):
        tally = SurpriseTally.of_layers(1, 5, torch.device("cpu"))[0]
        mask = torch.arange(40) % 3 != 0
        logits = case.leaves()[4]
        y = layer(
            case.x,
            case.gate_up,
            case.down,
            case.weights,
            logits,
            activation=F.silu,
            active_TE=case.weights != 0,
            token_mask_T=mask,
            smk=smk_step(40, tally=tally),
        )
        (of_logits,) = torch.autograd.grad(y, logits, case.grad_y)
        assert not of_logits[~mask].any()
        tallies.append([of_logits, *(getattr(tally, name) for name in tally._fields)])
    assert tallies[0][1][1] > 10
    assert_close(tallies[1], tallies[0])


def test_an_active_expert_of_weight_zero_is_still_taught():
    case = make_case(9)
    leaves = case._replace(weights=torch.zeros_like(case.weights)).leaves()
    active = torch.ones_like(case.weights, dtype=torch.bool)
    *_, of_weights, _ = results(leaves, case.grad_y, active_TE=active)
    exact = by_definition(case, F.silu, SmkRule())[4]
    assert_close(of_weights, exact, rtol=0, atol=1e-10)


def plain_grouped(leaves, activation) -> Tensor:
    """Compute expert by expert on its own tokens, in the leaves' own number formats."""
    x, gate_up, down, weights, _ = leaves
    y = torch.zeros_like(x)
    for e in range(down.shape[0]):
        tokens = weights[:, e].nonzero()[:, 0]
        gate, up = (x[tokens] @ rows.T for rows in gate_up[e].chunk(2))
        out = ((activation(gate) * up) @ down[e].T) * weights[tokens, e, None].to(x.dtype)
        y = y.index_add(0, tokens, out)
    return y


@pytest.mark.parametrize("seed", range(3))
def test_bf16_loses_no_more_than_bf16_itself(seed):
    half = make_case(123, seed=seed)
    half = Case(*(t.bfloat16() if i not in (3, 4) else t.float() for i, t in enumerate(half)))
    exact = [leaf.detach().double().requires_grad_() for leaf in half.leaves()]
    found = []
    for leaves in (exact, half.leaves()):
        y = plain_grouped(leaves, F.silu)
        grads = torch.autograd.grad(y, leaves[:4], half.grad_y.to(y.dtype))
        found.append([y.detach(), *grads])
    found.append(results(half.leaves(), half.grad_y)[:5])
    for name, gt, plain, got in zip(("y", "x", "gate_up", "down", "weights"), *found, strict=True):
        error, allowed = (got - gt).abs(), (plain - gt).abs()
        tol = 1e-7 * gt.abs().max()
        assert error.max() <= 3 * allowed.max() + tol, name
        assert error.mean() <= 1.1 * allowed.mean() + tol, name


def test_masters_in_float32_get_float32_gradients_from_bf16_products():
    case = make_case(63)
    x, gate_up, down, weights, logits = case.leaves(torch.float32)
    half = x.detach().bfloat16().requires_grad_()
    leaves = [half, gate_up, down, weights.detach().float().requires_grad_(), logits]
    _, of_x, of_gate_up, of_down, *_ = results(leaves, case.grad_y.bfloat16())
    assert (of_x.dtype, of_gate_up.dtype, of_down.dtype) == (torch.bfloat16, *[torch.float32] * 2)
    exact = defined(case)[3].float()
    assert (of_down - exact).norm() < 2.0**-6 * exact.norm()


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_kernels_rows_and_sums_are_the_loops(counts, dtype):
    # torch runs its grouped product on a CPU too, so that the kernel's branch runs in this test.
    num_tokens, D, I, E = 5, 8, 8, len(counts)
    generator = torch.Generator().manual_seed(sum(counts))
    active = torch.zeros(num_tokens, E, dtype=torch.bool)
    for e, count in enumerate(counts):
        active[torch.randperm(num_tokens, generator=generator)[:count], e] = True
    x = torch.randn(num_tokens, D, generator=generator).to(dtype)
    weight = torch.randn(E, 2 * I, D, generator=generator).to(dtype)
    loop, kernel = group_rows(active, kernel=False), group_rows(active, kernel=True)
    rows = torch.randn(int(active.sum()), 2 * I, generator=generator).to(dtype)
    near = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 0.3}
    assert_close(gather_mm(x, weight, kernel), gather_mm(x, weight, loop), **near)
    assert_close(outer_mm(rows, x, kernel, weight), outer_mm(rows, x, loop, weight), **near)
    summed = [scatter_mm(rows, weight, groups, num_tokens) for groups in (kernel, loop)]
    assert_close(*summed, **near)
    assert not summed[0][~active.any(1)].any()


def test_a_kernel_is_claimed_only_where_it_is_one():
    assert not grouped.has_kernel(torch.device("cpu"), torch.bfloat16, 96, 1024)


def test_repeats_bit_for_bit():
    case = make_case(63)
    leaves, grad_y = case.leaves(torch.float32), case.grad_y.float()
    once, again = results(leaves, grad_y), results(leaves, grad_y)
    assert_close(again, once, rtol=0, atol=0)


def test_only_what_is_asked_for_gets_a_gradient():
    case = make_case(9)
    together = results(case.leaves(), case.grad_y)[1:]
    for wanted in range(5):
        leaves = [leaf.detach() for leaf in case.leaves()]
        leaves[wanted].requires_grad_()
        expert_layer(*leaves, activation=F.silu, smk=smk_step(9)).backward(case.grad_y)
        got = leaves[wanted].grad
        assert got is not None
        assert torch.equal(got, together[wanted])
        assert [leaf.grad is None for leaf in leaves] == [i != wanted for i in range(5)]


def test_nothing_of_rows_x_hidden_is_made():
    tokens, experts, width, hidden = 40, 16, 2, 96
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, hidden), (experts, 2 * width, hidden), (experts, hidden, width))
    shapes += ((tokens, experts), (tokens, experts))
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    with Watch() as watch:
        expert_layer(*leaves, activation=F.silu, smk=smk_step(tokens)).sum().backward()
    # All experts are active, which makes 640 rows.
    assert watch.largest <= 2 * experts * width * hidden


def test_all_experts_as_candidates_are_refused():
    case = make_case(9)
    with pytest.raises(ValueError, match="computes no inactive expert"):
        results(case.leaves(), case.grad_y, smk=smk_step(9, SmkRule(candidates="all")))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_a_bank_learns_the_same_on_both_paths(rule, use_checkpoint):
    bank, x = make_bank(rule, coupled=rule == "top_k"), batch()
    dense = bank_gradients(bank, x)
    bank.set_execution(replace(bank.execution, path="grouped"))
    assert_close(bank_gradients(bank, x, use_checkpoint=use_checkpoint), dense)


def settings(**tables: Any) -> RunConfig:
    """Settings in which both paths can run, k = 4 of 32, changed by table."""
    config = RunConfig(
        experts=ExpertsConfig(num_experts=32),
        router=RouterConfig(target_k=4.0),
        smk=SmkConfig(candidates="active"),
    )
    return replace(
        config, **{name: replace(getattr(config, name), **t) for name, t in tables.items()}
    )


NEEDS_DENSE = {
    "smk.candidates": {"smk": {"candidates": "all"}},
    "smk.lesson_share": {"smk": {"candidates": "all", "lesson_share": 1.0}},
    "router.objective": {"router": {"objective": "task"}},
    "train.ffn_chunk_tokens": {"train": {"ffn_chunk_tokens": 64}},
}


@pytest.mark.parametrize("name", NEEDS_DENSE)
def test_settings_that_need_inactive_experts_keep_the_dense_path(name):
    config = settings(**NEEDS_DENSE[name])
    choice = choose_path(config, torch.device("cpu"), "silu")
    assert choice.path == "dense"
    assert name in choice.reason
    validate(config)
    asked = replace(config, train=replace(config.train, expert_path="grouped"))
    with pytest.raises(UserError, match=f'expert_path: got "grouped".*{name}'):
        validate(asked)


def test_the_same_settings_with_other_weights_or_objective_may_be_grouped():
    for tables in (
        {"router": {"objective": "task"}, "experts": {"weighting": "softmax"}},
        {"router": {"objective": "none"}, "smk": {"candidates": "all"}},
        {"smk": {"candidates": "all", "lesson_share": 0.5}},
    ):
        assert path_refusal(settings(**tables), "grouped") is None


@pytest.mark.parametrize(
    ("tables", "name"),
    [
        ({"smk": {"candidates": "all", "surprise": "input"}}, "smk.surprise"),
        ({"smk": {"surprise": "magnitude"}}, "smk.surprise"),
        ({"router": {"objective": "regression"}}, "router.objective"),
        ({"router": {"objective": "task"}}, "experts.weighting"),
        ({"train": {"ffn_chunk_tokens": 64}}, "train.ffn_chunk_tokens"),
    ],
)
def test_what_the_sparse_path_cannot_run_is_refused(tables, name):
    config = settings(**tables)
    validate(config)
    asked = replace(config, train=replace(config.train, expert_path="sparse"))
    with pytest.raises(UserError, match=f'expert_path: got "sparse".*{name}'):
        validate(asked)


def test_the_sparse_path_sees_inactive_experts_but_not_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = settings(smk={"candidates": "all"}, train={"expert_path": "sparse"})
    validate(config)
    with pytest.raises(UserError, match=r'got "sparse".*the device is cpu; set train') as caught:
        choose_path(config, torch.device("cpu"), "silu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("capability", "k", "activation", "wanted"),
    [
        ("9.0", 16.0, "silu", "sparse"),
        ("9.0", 17.0, "silu", "dense"),
        ("8.6", 16.0, "silu", "dense"),
        ("9.0", 16.0, "relu", "dense"),
    ],
)
def test_auto_is_sparse_up_to_the_measured_share_on_the_measured_kind_of_gpu(
    monkeypatch, capability, k, activation, wanted
):
    entry = {"share": 0.5, "capability": "9.0", "machine": "a GPU"}
    table = {"cuda float32": {"share": 0.0, "machine": "a GPU", "sparse": entry}}
    monkeypatch.setattr(expert_path, "read_crossover", lambda: table)
    monkeypatch.setattr(expert_path, "_capability", lambda device: capability)
    monkeypatch.setattr(decode, "_HAS_TRITON", True)
    config = settings(router={"target_k": k}, teacher={"dtype": "float32"})
    choice = choose_path(config, torch.device("cuda"), activation)
    assert choice.path == wanted
    if wanted == "sparse":
        assert "k/E = 0.5 is at most 0.5" in choice.reason


def test_the_computed_share_counts_inactive_experts_that_are_surprised():
    assert computed_share(settings()) == (4 / 32, "k/E")
    for lesson_share, share in ((1.0, 1.0), (0.5, 0.5625)):
        config = settings(smk={"candidates": "all", "lesson_share": lesson_share})
        assert computed_share(config)[0] == share


def test_auto_compares_the_share_with_the_measured_one(monkeypatch):
    monkeypatch.setattr(expert_path, "_capability", lambda device: None)
    for device, entry in ((key.split()[0], value) for key, value in read_crossover().items()):
        assert 0 <= entry["share"] <= 1
        for dtype in ("float32", "bfloat16"):
            share = read_crossover().get(f"{device} {dtype}", {"share": 0})["share"]
            for k in (1.0, 8.0, 32.0):
                config = settings(router={"target_k": k}, teacher={"dtype": dtype})
                wanted = "grouped" if k / 32 < share else "dense"
                assert choose_path(config, torch.device(device), "silu").path == wanted
    config = settings(teacher={"dtype": "float32"})
    unknown = choose_path(config, torch.device("meta"), "silu")
    assert unknown.path == "dense"
    assert "no crossover is measured for meta float32" in unknown.reason


def test_an_explicit_path_is_taken():
    for path in ("dense", "grouped"):
        config = settings(train={"expert_path": path, "compile": False})
        reason = f'train.expert_path = "{path}"'
        chosen = choose_path(config, torch.device("cpu"), "silu")
        assert chosen == PathChoice(path=path, reason=reason)
        student = make_student(make_dense())
        set_objective(student.banks(), config)
        assert {bank.execution.path for bank in student.banks()} == {path}
    assert TrainConfig().expert_path == "auto"


def test_the_crossover_is_where_the_lines_cross():
    # The line from 60 at k = 16 to 120 at k = 32 is at 100 where k = 16 + 16 * 40 / 60.
    assert crossover_share(100.0, {4: 20.0, 16: 60.0, 32: 120.0}, 32) == pytest.approx(0.8333333)
    assert crossover_share(100.0, {4: 20.0, 16: 60.0}, 32) == 0.5
    assert crossover_share(100.0, {4: 200.0, 16: 60.0}, 32) == 0.0


def test_the_sparse_path_is_fastest_up_to_the_dense_one_unless_the_grouped_one_is_faster():
    sparse = {4: 20.0, 16: 60.0, 32: 120.0}
    assert fastest_share(100.0, {4: 30.0, 16: 70.0, 32: 90.0}, sparse, 32) == pytest.approx(5 / 6)
    assert fastest_share(100.0, {4: 19.0, 16: 70.0, 32: 90.0}, sparse, 32) == 0.0
    assert fastest_share(200.0, {4: 30.0, 16: 70.0, 32: 130.0}, sparse, 32) == 1.0


@pytest.mark.parametrize("size", [4, 64])
def test_rounded_up_groups_in_bfloat16_are_the_dense_path(size, monkeypatch):
    monkeypatch.setattr(grouped, "ROUND_ROWS", size)
    case = make_case(40)
    num_rows = (case.weights != 0).sum(0)
    assert (num_rows % 4 != 0).sum() >= 2
    found = []
    for layer in (dense_masked.expert_layer, expert_layer):
        leaves = [t.bfloat16().requires_grad_() for t in (case.x, case.gate_up, case.down)]
        x, gate_up, down = leaves
        logits = torch.zeros_like(case.weights, dtype=torch.float32)
        weights = case.weights.bfloat16()
        active = case.weights != 0
        y = layer(x, gate_up, down, weights, logits, activation=F.silu, active_TE=active)
        grads = torch.autograd.grad(y, leaves, case.grad_y.bfloat16())
        found.append([tensor.double() for tensor in (y, *grads)])
    for got, expected in zip(found[1], found[0], strict=True):
        assert (got - expected).norm() < 2e-2 * expected.norm()
