"""The dense-masked expert layer against its definition, one token and one expert at a time.

Low precision follows one criterion: with gt the float64 result of the same rounded inputs,
|gt - layer| <= c |gt - plain| + tol, where plain is the dense formula at the same low precision and
c is 3 for the maximum and 1.1 for the mean (over 20 seeds and all tensors the ratios came to at
most 2.65, one element of a small gradient, and 1.02).
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from tiny_onn.experts import Execution, ExpertBank, RowState, row_context
from tiny_onn.ops import reference
from tiny_onn.ops.dense_masked import expert_layer
from tiny_onn.ops.teaching import SmkStep, SurpriseTally
from tiny_onn.router import RoutingRule
from tiny_onn.surprise import SmkRule, smk_loss, smk_targets

D, E, I = 7, 5, 3
COEF = 0.7
KINDS = ("parameters", "input", "output", "gain", "magnitude", "relative")
PATTERNS = ("mixed", "empty_expert", "one_expert", "none_active", "unit", "zero_rows")


class Case(NamedTuple):
    """The tensors of one call and the gradient of its output."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    weights: Tensor
    logits: Tensor
    grad_y: Tensor

    def leaves(self, dtype=None) -> list[Tensor]:
        """Fresh copies that want a gradient, logits and weights never below float32."""
        return [
            t.detach().to(dtype if i < 3 else None).clone().requires_grad_()
            for i, t in enumerate(self[:5])
        ]


def make_case(num_tokens, pattern="mixed", seed=0) -> Case:
    """Random tensors; about half of the experts are active, with weights between 0 and 2."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = 2 * torch.rand(num_tokens, E, generator=generator, dtype=torch.float64)
    weights *= torch.rand(num_tokens, E, generator=generator) < 0.5
    x, gate_up, down = normal(num_tokens, D), normal(2, E, I, D), normal(E, I, D)
    if pattern == "empty_expert":
        weights[:, 1] = 0
    if pattern == "one_expert":
        weights = torch.zeros_like(weights).index_fill_(1, torch.tensor([2]), 1.5)
    if pattern == "none_active":
        weights[::2] = 0
    if pattern == "unit":
        weights = torch.ones_like(weights)
    grad_y = normal(num_tokens, D)
    if pattern == "zero_rows":
        x[::2], grad_y[::3] = 0, 0
    return Case(x, gate_up, down, weights, normal(num_tokens, E), grad_y)


def smk_step(num_tokens, rule=None, **options: Any) -> SmkStep:
    """A step whose SMK loss is a mean over these tokens."""
    return SmkStep(rule=rule or SmkRule(), grad_scale=COEF / num_tokens, **options)


def layer(leaves, activation, **options: Any) -> Tensor:
    """The layer's output for the five leaves."""
    x, gate_up, down, weights, logits = leaves
    return expert_layer(x, gate_up, down, weights, logits, activation=activation, **options)


def by_definition(case: Case, activation, rule: SmkRule) -> list[Tensor]:
    """Output and all five gradients: autograd of the loops and of the explicit SMK loss."""
    leaves = case.leaves()
    x, gate_up, down, weights, logits = leaves
    y = reference.expert_layer(x, gate_up, down, weights, activation)
    surprise = reference.surprise(
        rule.surprise, case.x, case.gate_up, case.down, case.grad_y, activation
    )
    active = case.weights != 0
    everyone = torch.ones(len(case.x), dtype=torch.bool)
    targets = smk_targets(surprise * case.weights, active, everyone, rule)
    main = torch.autograd.grad(y, leaves[:4], case.grad_y)
    (of_logits,) = torch.autograd.grad(smk_loss(logits, targets).mean() * COEF, logits)
    return [y.detach(), *main, of_logits]


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
    # Small integers and relu: no rounding, so that copies of an expert tie exactly.
    case = Case(*((3 * t).round() for t in make_case(63, "unit")))
    case.gate_up[:, 3], case.down[3] = case.gate_up[:, 1], case.down[1]
    case = case._replace(weights=torch.ones_like(case.weights))
    assert_parity(case, F.relu)
    # The gradient at the logits is softmax minus target: what is left is the target.
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
    """The dense formula in the leaves' own number formats."""
    x, gate_up, down, weights, _ = leaves
    gate, up = torch.einsum("td,jeid->jtei", x, gate_up)
    routed = activation(gate) * up * weights[..., None].to(x.dtype)
    return torch.einsum("tei,eid->td", routed, down)


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
    """The surprise that the backward pass saw."""
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
    """All five gradients of the layer itself, together."""
    leaves = case.leaves()
    return torch.autograd.grad(layer(leaves, F.silu, smk=smk_step(9)), leaves, case.grad_y)


def test_without_smk_the_logits_get_no_gradient():
    leaves = make_case(9).leaves()
    layer(leaves, F.silu).sum().backward()
    assert leaves[0].grad is not None
    assert leaves[4].grad is None


class Watch(TorchDispatchMode):
    """Counts operations and keeps the size of the largest tensor they return."""

    calls = 0
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


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
                (2, experts, width, hidden),
                (experts, width, hidden),
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


RULES = {
    "top_k": RoutingRule(selection="top_k", weighting="softmax", target_k=3.0),
    "budget": RoutingRule(selection="budget", budget_form="cumulative", target_k=3.0),
}


def make_bank(rule="budget", *, coupled=False, seed=0) -> ExpertBank:
    bank = ExpertBank(16, 6, 4, "silu", RULES[rule])
    generator = torch.Generator().manual_seed(seed)
    bank.reset(generator, std=0.3)
    bank.router.reset(generator, std=0.3)
    bank.router.threshold.fill_(0.3)
    bank.set_execution(Execution(coupled=coupled))
    return bank


def batch(num_tokens=20, seed=1) -> Tensor:
    return torch.randn(num_tokens, 16, generator=torch.Generator().manual_seed(seed))


def bank_gradients(bank: ExpertBank, x: Tensor, parts=1, use_checkpoint=False, **options: Any):
    """Gradients of the mean squared output over the batch, in parts; the tally; the input's."""
    num_tokens = len(x)
    tally = SurpriseTally.of_layers(1, 6, x.device)[0]
    smk = smk_step(num_tokens, loss_scale=float(num_tokens), tally=tally, **options)
    bank.zero_grad()
    x = x.clone().requires_grad_()
    for part in x.chunk(parts):
        row = RowState(token_mask=torch.arange(len(part)) % 5 != 0, smk=smk)
        with row_context([bank], [row]):
            y = checkpoint(bank, part, use_reentrant=False) if use_checkpoint else bank(part)
            assert isinstance(y, Tensor)
            (y.square().sum() / num_tokens).backward()
    grads = {name: p.grad for name, p in bank.named_parameters()} | {"x": x.grad}
    assert all(g is not None and bool(g.any()) for g in grads.values())
    sums = {name: getattr(tally, name) for name in tally._fields}
    return grads, sums


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
    # Without SMK the gate gets nothing from the main loss; experts and input lose nothing.
    assert bank.router.weight.grad is None or not bank.router.weight.grad.any()
    for name, alone in (
        ("x", x.grad),
        ("gate_up_proj", bank.gate_up_proj.grad),
        ("down_proj", bank.down_proj.grad),
    ):
        assert alone is not None
        torch.testing.assert_close(taught[name], alone, rtol=0, atol=0)


def test_coupled_gate_gets_the_main_loss_through_the_weights():
    bank, x = make_bank("top_k", coupled=True), batch().requires_grad_()
    (bank(x).square().sum() / 20).backward()
    again = x.detach().clone().requires_grad_()
    routing = bank.router(again)
    y = reference.expert_layer(again, bank.gate_up_proj, bank.down_proj, routing.weights, F.silu)
    wanted = torch.autograd.grad(
        y.square().sum() / 20, (again, bank.router.weight, bank.router.bias)
    )
    got = (x.grad, bank.router.weight.grad, bank.router.bias.grad)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
