"""The dense-masked expert layer against its definition, one token and one expert at a time.

Low precision follows one criterion: with gt the float64 result of the same rounded inputs,
|gt - layer| <= c |gt - plain| + tol, where plain is the dense formula at the same low precision and
c is 3 for the maximum and 1.1 for the mean (over 20 seeds and all tensors the ratios came to at
most 2.65, one element of a small gradient, and 1.02).
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from expert_cases import (
    COEF,
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
from tiny_onn.ops import reference
from tiny_onn.ops.dense_masked import expert_layer
from tiny_onn.ops.router_gradient import SurpriseTally
from tiny_onn.ops.surprise import SmkRule


def layer(leaves, activation, **options: Any) -> Tensor:
    """Return the layer's output for the five leaves."""
    x, gate_up, down, weights, logits = leaves
    return expert_layer(x, gate_up, down, weights, logits, activation=activation, **options)


def assert_parity(case: Case, activation, compiled=False) -> None:
    leaves = case.leaves()
    y = layer(leaves, activation, smk=smk_step(len(case.x)), compiled=compiled)
    got = [y.detach(), *torch.autograd.grad(y, leaves, case.grad_y)]
    torch.testing.assert_close(got, by_definition(case, activation, SmkRule()), rtol=0, atol=1e-10)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("num_tokens", [1, 63])
def test_equals_the_definition_in_output_and_every_gradient(num_tokens, pattern):
    assert_parity(make_case(num_tokens, pattern), F.silu)


def test_equal_experts_share_the_target():
    # Small integers and relu round nothing, so that copies of an expert tie exactly.
    case = Case(*((3 * t).round() for t in make_case(63, "unit")))
    case.gate_up[3], case.down[3] = case.gate_up[1], case.down[1]
    case = case._replace(weights=torch.ones_like(case.weights))
    assert_parity(case, F.relu)
    # The gradient at the logits is softmax minus target, so softmax minus gradient is the target.
    leaves = case.leaves()
    y = layer(leaves, F.relu, smk=smk_step(63))
    (of_logits,) = torch.autograd.grad(y, leaves[4:], case.grad_y)
    targets = leaves[4].softmax(-1) - of_logits * 63 / COEF
    halves = torch.isclose(targets, torch.full_like(targets, 0.5))
    assert halves[:, (1, 3)].all(-1).sum() > 5


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh", "relu"])
def test_any_activation_equals_the_definition(name):
    assert_parity(make_case(123, seed=1), ACT2FN[name])


# torch 2.13's inductor warns about torch itself when it is imported.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.compiled
def test_compiled_regions_equal_the_definition_for_any_number_of_tokens():
    # The second size makes the number of tokens symbolic.
    for num_tokens in (63, 123):
        assert_parity(make_case(num_tokens), F.silu, compiled=True)


def plain_layer(leaves, activation) -> Tensor:
    """Return the dense formula's output in the leaves' own number formats."""
    x, gate_up, down, weights, _ = leaves
    gate, up = torch.einsum("td,ejd->tej", x, gate_up).chunk(2, dim=-1)
    routed = activation(gate) * up * weights[..., None].to(x.dtype)
    return torch.einsum("tei,edi->td", routed, down)


@pytest.mark.parametrize("seed", range(3))
def test_bf16_loses_no_more_than_bf16_itself(seed):
    half = make_case(123, seed=seed)
    half = Case(*(t.bfloat16() if i not in (3, 4) else t.float() for i, t in enumerate(half)))
    exact = half.leaves(torch.float64)
    exact[3:] = [t.detach().double().requires_grad_() for t in exact[3:]]
    results = []
    for leaves, function in ((exact, plain_layer), (half.leaves(), plain_layer)):
        y = function(leaves, F.silu)
        grads = torch.autograd.grad(y, leaves[:4], half.grad_y.to(y.dtype))
        results.append([y.detach(), *grads])
    leaves = half.leaves()
    y = layer(leaves, F.silu)
    results.append([y.detach(), *torch.autograd.grad(y, leaves[:4], half.grad_y)])
    for name, gt, plain, got in zip(
        ("y", "x", "gate_up", "down", "weights"), *results, strict=True
    ):
        error, allowed = (got - gt).abs(), (plain - gt).abs()
        tol = 1e-7 * gt.abs().max()
        assert error.max() <= 3 * allowed.max() + tol, name
        assert error.mean() <= 1.1 * allowed.mean() + tol, name


def test_bf16_surprise_is_close_to_that_of_exact_arithmetic():
    case = make_case(63)
    half = Case(*(t.bfloat16() if i not in (3, 4) else t.float() for i, t in enumerate(case)))
    for kind in KINDS:
        rule = SmkRule(surprise=kind, candidates="all")
        captured = [capture_surprise(c, rule) for c in (half, Case(*(t.double() for t in half)))]
        # 2^-8 is bf16's unit roundoff; a surprise is a product of a few rounded factors.
        error = (captured[0] - captured[1]).norm() / captured[1].norm()
        assert error < 2.0**-7, kind


def capture_surprise(case: Case, rule: SmkRule) -> Tensor:
    """Return the surprise that the backward pass computed."""
    seen: list[Tensor] = []
    layer(case.leaves(), F.silu, smk=smk_step(len(case.x), rule, capture=seen)).backward(
        case.grad_y
    )
    return seen[0]


def test_only_what_is_asked_for_gets_a_gradient():
    case = make_case(9)
    for wanted in range(5):
        leaves = [leaf.detach() for leaf in case.leaves()]
        leaves[wanted].requires_grad_()
        layer(leaves, F.silu, smk=smk_step(9)).backward(case.grad_y)
        got = leaves[wanted].grad
        assert got is not None
        assert torch.equal(got, by_definition_fast(case)[wanted])
        assert [leaf.grad is None for leaf in leaves] == [i != wanted for i in range(5)]


def by_definition_fast(case: Case) -> tuple[Tensor, ...]:
    """Check all five gradients of the layer together."""
    leaves = case.leaves()
    return torch.autograd.grad(layer(leaves, F.silu, smk=smk_step(9)), leaves, case.grad_y)


def test_without_smk_the_logits_get_no_gradient():
    leaves = make_case(9).leaves()
    layer(leaves, F.silu).sum().backward()
    assert leaves[0].grad is not None
    assert leaves[4].grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("candidates", ["active", "all"])
def test_no_loop_over_experts_or_tokens_and_nothing_of_tokens_x_experts_x_hidden(kind, candidates):
    hidden, width = 96, 2
    generator = torch.Generator().manual_seed(0)
    calls = set()
    for tokens, experts in ((40, 2), (40, 16), (7, 16)):
        leaves = [
            torch.randn(shape, generator=generator).requires_grad_()
            for shape in (
                (tokens, hidden),
                (experts, 2 * width, hidden),
                (experts, hidden, width),
                (tokens, experts),
                (tokens, experts),
            )
        ]
        step = smk_step(
            tokens,
            SmkRule(surprise=kind, candidates=candidates),
            tally=SurpriseTally.of_layers(1, experts, torch.device("cpu"))[0],
        )
        with Watch() as watch:
            layer(leaves, F.silu, smk=step).sum().backward()
        calls.add(watch.calls)
        assert watch.largest <= max(tokens, 2 * experts * width) * hidden
    assert len(calls) == 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("coupled", [False, True])
def test_gradient_checkpointing_changes_no_bit(rule, coupled):
    bank, x = make_bank(rule, coupled=coupled), batch()
    plain, recomputed = bank_gradients(bank, x), bank_gradients(bank, x, use_checkpoint=True)
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_two_half_batches_sum_to_the_whole(rule):
    bank, x = make_bank(rule), batch()
    halves, whole = bank_gradients(bank, x, parts=2), bank_gradients(bank, x)
    torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-6)
    assert whole[1]["counts_4"][1] > 10


def test_loss_scale_frees_surprise_of_the_batch_size():
    bank, x = make_bank(), batch(10)
    once: list[Tensor] = []
    thrice: list[Tensor] = []
    bank_gradients(bank, x, capture=once)
    bank_gradients(bank, torch.cat((x, x, x)), capture=thrice)
    torch.testing.assert_close(thrice[0], once[0].repeat(3, 1))


@pytest.mark.parametrize("rule", RULES)
def test_decoupled_systems_get_no_gradient_from_each_other(rule):
    bank, x = make_bank(rule), batch()
    taught, _ = bank_gradients(bank, x)
    bank.zero_grad()
    x = x.clone().requires_grad_()
    (bank(x).square().sum() / 20).backward()
    # Without SMK the gate gets no gradient; those of experts and input stay as they are.
    assert bank.router.weight.grad is None or not bank.router.weight.grad.any()
    for name, alone in (
        ("x", x.grad),
        ("experts.gate_up_proj", bank.experts.gate_up_proj.grad),
        ("experts.down_proj", bank.experts.down_proj.grad),
    ):
        assert alone is not None
        torch.testing.assert_close(taught[name], alone, rtol=0, atol=0)


def test_coupled_gate_gets_the_main_loss_through_the_weights():
    bank, x = make_bank("top_k", coupled=True), batch().requires_grad_()
    (bank(x).square().sum() / 20).backward()
    again = x.detach().clone().requires_grad_()
    routing = bank.router(again)
    weights = (bank.experts.gate_up_proj, bank.experts.down_proj)
    y = reference.expert_layer(again, *weights, routing.weights, F.silu)
    wanted = torch.autograd.grad(
        y.square().sum() / 20, (again, bank.router.weight, bank.router.bias)
    )
    got = (x.grad, bank.router.weight.grad, bank.router.bias.grad)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
