"""Surprise, SMK targets and the gate's gradient against brute force; one test per known failure."""

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tiny_onn.model.experts import ExpertBank, RowState, recorded_routings, row_context
from tiny_onn.model.router import Router, Routing, RoutingRule, route
from tiny_onn.ops import reference
from tiny_onn.ops.dense_masked import expert_layer
from tiny_onn.ops.router_gradient import SmkStep, SurpriseTally
from tiny_onn.ops.surprise import SmkRule, smk_logits_grad, smk_loss, smk_targets

KINDS = ("parameters", "input", "output", "gain", "magnitude", "relative")
Direction = Literal["min", "max"]
DIRECTIONS: tuple[Direction, ...] = ("min", "max")
SELECTIONS = {
    "top_k": RoutingRule(selection="top_k", target_k=3.0),
    "cumulative": RoutingRule(selection="budget", budget_form="cumulative", target_k=3.0),
    "threshold": RoutingRule(selection="budget", budget_form="threshold", target_k=3.0),
}


def normal(*shape, seed=0, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def backward_pass(*tensors: Tensor, activation=F.silu, **options: Any):
    """Return the surprise and the tally of one backward pass, and the gradient at the logits."""
    x, gate_up, down, weights, logits, grad_y = tensors
    seen: list[Tensor] = []
    tally = SurpriseTally.of_layers(1, len(down), x.device)[0]
    kwargs = {name: options.pop(name) for name in ("token_mask_T",) if name in options}
    step = SmkStep(**({"grad_scale": 1.0, "rule": SmkRule(), "tally": tally} | options))
    step.capture = seen
    logits = logits.clone().requires_grad_()
    y = expert_layer(x, gate_up, down, weights, logits, activation=activation, smk=step, **kwargs)
    y.backward(grad_y)
    return seen[0], tally, logits.grad


def make_layer(num_tokens=11, num_experts=5, seed=0):
    """Return input, experts, weights (about half of them 0), logits, and the output's gradient."""
    weights = normal(num_tokens, num_experts, seed=seed).clamp_min(0)
    shapes = (
        (num_tokens, 6),
        (num_experts, 2 * 3, 6),
        (num_experts, 6, 3),
        (num_tokens, num_experts),
        (num_tokens, 6),
    )
    x, gate_up, down, logits, grad_y = (
        normal(*shape, seed=seed + i + 1) for i, shape in enumerate(shapes)
    )
    return x, gate_up, down, weights, logits, grad_y


@pytest.mark.parametrize("kind", KINDS)
def test_surprise_equals_per_token_autograd(kind):
    x, gate_up, down, weights, logits, grad_y = make_layer()
    x[2], grad_y[5] = 0, 0
    truth = reference.surprise(kind, x, gate_up, down, grad_y, F.silu)
    for rule, expected in (
        (SmkRule(surprise=kind, candidates="all"), truth),
        (SmkRule(surprise=kind, candidates="active"), truth * weights),
    ):
        got, *_ = backward_pass(x, gate_up, down, weights, logits, grad_y, rule=rule)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_scale_undoes_the_divisor_of_the_loss(kind):
    x, gate_up, down, weights, logits, grad_y = make_layer()
    rule = SmkRule(surprise=kind)
    whole, *_ = backward_pass(x, gate_up, down, weights, logits, grad_y, rule=rule)
    scaled, *_ = backward_pass(
        x, gate_up, down, weights, logits, grad_y / 4096, rule=rule, loss_scale=4096.0
    )
    torch.testing.assert_close(scaled, whole)


def test_surprise_by_hand():
    # x = (3, 4), gate (1, 0), up (0, 1), down (1, 0), relu: gate 3, up 4, hidden 12, y = (12, 0).
    x, gate_up = torch.tensor([[3.0, 4.0]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    down, one = torch.tensor([[[1.0], [0.0]]]), torch.ones(1, 1)

    def values(grad_y):
        return {
            kind: backward_pass(
                *(x, gate_up, down, one, one, grad_y),
                activation=F.relu,
                rule=SmkRule(surprise=kind),
            )[0].item()
            for kind in KINDS
        }

    # Gradient at hidden 0.5, at gate 2, at up 1.5; 5^2 (2^2 + 1.5^2) + 12^2 0.5^2 = 192.25.
    assert values(torch.tensor([[0.5, 0.0]])) == pytest.approx(
        {
            "parameters": math.sqrt(192.25),
            "input": 2.5,
            "output": 0.5,
            "gain": -6.0,
            "magnitude": 12.0,
            "relative": math.sqrt(192.25) / 12,
        }
    )
    # Surprise is a norm, no inner product: a gradient orthogonal to the output moves weights too.
    assert values(torch.tensor([[0.0, 1.0]])) == pytest.approx(
        {
            "parameters": 12.0,
            "input": 0.0,
            "output": 1.0,
            "gain": 0.0,
            "magnitude": 12.0,
            "relative": 1.0,
        }
    )


def brute_force_targets(surprise, active, mask, rule: SmkRule) -> list[list[float]]:
    """Return the targets by a loop over tokens and sorted lists."""
    rows = []
    for values, is_active, counts in zip(surprise, active, mask, strict=True):
        sign = 1 if rule.direction == "min" else -1
        ranked = sorted(
            (sign * value, e)
            for e, value in enumerate(values)
            if rule.candidates == "all" or is_active[e]
        )
        chosen: list[int] = []
        if counts and len({value for value, _ in ranked}) > 1:
            if rule.targets == "single":
                chosen = [e for value, e in ranked if value == ranked[0][0]]
            else:
                half = math.ceil(len(ranked) / 2)
                num = min(rule.num_targets, len(ranked)) if rule.candidates == "all" else half
                chosen = [e for _, e in ranked[:num]]
        rows.append([1 / len(chosen) if e in chosen else 0.0 for e in range(len(values))])
    return rows


@st.composite
def batches(draw):
    """Draw surprise of few values (so that ties are common), active experts and a mask."""
    num_tokens, num_experts = draw(st.integers(1, 4)), draw(st.integers(1, 6))

    def rows(elements):
        row = st.lists(elements, min_size=num_experts, max_size=num_experts)
        return draw(st.lists(row, min_size=num_tokens, max_size=num_tokens))

    surprise = rows(st.sampled_from([-1.5, 0.0, 0.0, 1.0, 2.0]))
    mask = draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    return surprise, rows(st.booleans()), mask


@given(
    batch=batches(),
    direction=st.sampled_from(DIRECTIONS),
    candidates=st.sampled_from(["active", "all"]),
    targets=st.sampled_from(["single", "set"]),
    num_targets=st.integers(1, 6),
)
def test_targets_equal_a_loop_over_tokens(batch, **fields):
    surprise, active, mask = batch
    rule = SmkRule(**fields)
    got = smk_targets(torch.tensor(surprise), torch.tensor(active), torch.tensor(mask), rule)
    expected = torch.tensor(brute_force_targets(surprise, active, mask, rule))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("targets", ["single", "set"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_that_say_nothing_give_no_target(direction, targets):
    rule = SmkRule(direction=direction, targets=targets)
    surprise = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    active = torch.tensor([[True] * 3, [False, True, False], [False] * 3, [True] * 3])
    mask = torch.tensor([True, True, True, False])
    assert not smk_targets(surprise, active, mask, rule).any()
    # These rows have targets once candidates differ, compete and count.
    assert smk_targets(surprise[1:2], active[3:], mask[:1], rule).sum() == 1


def test_ties_share_the_target_and_a_set_of_active_experts_is_the_better_half():
    surprise, everyone = torch.tensor([[2.0, 1.0, 1.0, 5.0, 4.0]]), torch.ones(1, 5) > 0
    mask = torch.tensor([True])
    tied = smk_targets(surprise, everyone, mask, SmkRule())
    half = smk_targets(surprise, everyone, mask, SmkRule(targets="set", direction="max"))
    assert tied.tolist() == [[0, 0.5, 0.5, 0, 0]]
    torch.testing.assert_close(half, torch.tensor([[1, 0, 0, 1, 1]]) / 3)


@given(batch=batches(), seed=st.integers(0, 99))
def test_gradient_equals_autograd_of_the_loss(batch, seed):
    surprise, active, mask = (torch.tensor(part) for part in batch)
    targets = smk_targets(surprise.double(), active, mask, SmkRule(targets="set"))
    logits = normal(*surprise.shape, seed=seed).requires_grad_()
    (expected,) = torch.autograd.grad(smk_loss(logits, targets).sum(), logits)
    torch.testing.assert_close(smk_logits_grad(logits.detach(), targets), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("candidates", ["active", "all"])
@pytest.mark.parametrize("targets", ["single", "set"])
def test_layer_returns_the_gradient_of_the_explicit_smk_loss(kind, direction, candidates, targets):
    x, gate_up, down, weights, logits, grad_y = make_layer(num_tokens=6)
    rule = SmkRule(
        surprise=kind, direction=direction, candidates=candidates, targets=targets, num_targets=2
    )
    mask = torch.arange(6) != 4
    truth = reference.surprise(kind, x, gate_up, down, grad_y, F.silu)
    if kind == "output":
        # `output` is equal for all experts by definition, so its roundings must not differ either.
        truth = grad_y.norm(dim=-1, keepdim=True).expand_as(weights)
    routed = truth * weights if candidates == "active" else truth
    wanted = smk_targets(routed, weights != 0, mask, rule)
    leaf = logits.clone().requires_grad_()
    (smk_loss(leaf, wanted).sum() / mask.sum() * 0.7).backward()
    *_, got = backward_pass(
        *(x, gate_up, down, weights, logits, grad_y),
        rule=rule,
        grad_scale=0.7 / 5,
        token_mask_T=mask,
    )
    torch.testing.assert_close(got, leaf.grad, rtol=0, atol=1e-12)


# Each of these tests guards against a fault of an earlier public attempt at this idea.


def make_bank(
    rule: RoutingRule, *, seed=0, direction: Direction = "min", **options: Any
) -> tuple[ExpertBank, SmkStep]:
    """Return eight experts with a random gate whose budget lets about three of them pass."""
    bank = ExpertBank(12, 8, 4, "silu", rule)
    generator = torch.Generator().manual_seed(seed)
    bank.experts.reset(generator, std=0.3)
    bank.router.reset(generator, std=0.3)
    bank.router.threshold.fill_(0.35 if rule.budget_form == "cumulative" else 0.12)
    options = {"rule": SmkRule(direction=direction), "grad_scale": 1.0} | options
    return bank, SmkStep(**options)


def taught(
    bank: ExpertBank, smk: SmkStep, x: Tensor, backward: Callable[[Tensor], None]
) -> Routing:
    """Return the routing of x, after a backward pass that teaches the gate."""
    with row_context([bank], [RowState(smk=smk)]):
        with recorded_routings([bank]) as routings:
            y = bank(x)
        backward(y)
    return routings[0]


def selection_rate(router: Router, x: Tensor) -> Tensor:
    """Count how often each expert is selected for x when Gumbel noise shakes its logits."""
    logits = router(x).router_logits.detach()
    uniform = torch.rand(4096, 8, generator=torch.Generator().manual_seed(0))
    noise = -torch.log(-torch.log(uniform.clamp(1e-6, 1 - 1e-6)))
    return route(logits + noise, router.rule, router.threshold).active.float().mean(0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_router_step_makes_the_target_more_likely_to_be_selected(selection, direction, seed):
    seen: list[Tensor] = []
    bank, smk = make_bank(SELECTIONS[selection], seed=seed, direction=direction, capture=seen)
    x = normal(1, 12, seed=seed, dtype=torch.float32)
    grad_y = normal(1, 12, seed=seed + 100, dtype=torch.float32)
    routing = taught(bank, smk, x, lambda y: y.backward(grad_y))
    active = routing.active[0]
    assert 1 < active.sum() < 8
    ranked = seen[0][0].masked_fill(~active, math.inf if direction == "min" else -math.inf)
    target = int(ranked.argmin() if direction == "min" else ranked.argmax())
    before, probs = selection_rate(bank.router, x), routing.router_logits[0].softmax(-1)
    with torch.no_grad():
        for parameter in bank.router.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=0.02)
    after = selection_rate(bank.router, x)
    assert bank.router(x).router_logits[0].softmax(-1)[target] > probs[target]
    assert after[target] > before[target]


def test_gate_gets_a_gradient_though_everything_around_it_is_detached():
    seen: list[Tensor] = []
    bank, smk = make_bank(SELECTIONS["top_k"], grad_scale=0.25, capture=seen)
    x = normal(9, 12, dtype=torch.float32)
    routing = taught(bank, smk, x, lambda y: y.square().sum().backward())
    logits, active = routing.router_logits, routing.active
    everyone = torch.ones(9, dtype=torch.bool)
    error = logits.softmax(-1) - smk_targets(seen[0], active, everyone, SmkRule())
    torch.testing.assert_close(bank.router.weight.grad, 0.25 * error.T @ x)
    torch.testing.assert_close(bank.router.bias.grad, 0.25 * error.sum(0))


def test_tokens_whose_gradients_cancel_in_the_batch_still_surprise():
    x, gate_up, down, weights, logits, grad_y = make_layer(num_tokens=2)
    x, weights = x[:1].expand(2, -1), torch.ones_like(weights)
    grad_y = torch.stack((grad_y[0], -grad_y[0]))
    gate_up, down = gate_up.requires_grad_(), down.requires_grad_()
    y = expert_layer(x, gate_up, down, weights, logits, activation=F.silu)
    for summed in torch.autograd.grad(y, (gate_up, down), grad_y):
        torch.testing.assert_close(summed, torch.zeros_like(summed))
    surprise, *_ = backward_pass(x, gate_up, down, weights, logits, grad_y)
    assert (surprise > 0.01).all()
    torch.testing.assert_close(surprise[0], surprise[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokens_surprise_is_its_own(kind):
    x, gate_up, down, weights, logits, grad_y = make_layer()
    rule = SmkRule(surprise=kind)
    together, *_ = backward_pass(x, gate_up, down, weights, logits, grad_y, rule=rule)
    for t in range(3):
        row = slice(t, t + 1)
        alone, *_ = backward_pass(
            *(x[row], gate_up, down, weights[row], logits[row], grad_y[row]), rule=rule
        )
        torch.testing.assert_close(alone[0], together[t])


@pytest.mark.parametrize("kind", ["parameters", "input", "output", "gain", "relative"])
def test_tokens_without_a_gradient_teach_nothing(kind):
    x, gate_up, down, weights, logits, grad_y = make_layer()
    grad_y[::2] = 0
    rule = SmkRule(surprise=kind, candidates="all")
    _, tally, grad = backward_pass(x, gate_up, down, weights, logits, grad_y, rule=rule)
    assert grad is not None
    assert not grad[::2].any()
    taught = 0 if kind == "output" else 5
    assert int(grad.any(-1).sum()) == taught == int(tally.num_targets)
    assert int(tally.num_tokens) == 11


@pytest.mark.parametrize("num_active", [1, 8])
def test_a_dead_model_counts_no_agreement(num_active):
    # With gradients of 0, or an expert that always wins, there is no target: 0 of 0 agree.
    x, gate_up, down, _, logits, grad_y = make_layer(num_tokens=50, num_experts=8)
    weights = torch.zeros(50, 8, dtype=torch.float64)
    weights[:, :num_active] = 1
    logits[:, 0] += 100
    grad_y = grad_y * (num_active == 1)
    _, tally, grad = backward_pass(x, gate_up, down, weights, logits, grad_y)
    assert grad is not None
    assert not grad.any()
    numbers = (tally.num_tokens, tally.num_targets, tally.num_agree, tally.chance)
    assert [float(n) for n in numbers] == [50, 0, 0, 0]


@pytest.mark.parametrize(
    ("options", "chance"),
    [
        ({"candidates": "all"}, 1 / 8),
        ({"candidates": "active"}, 1 / 4),
        ({"candidates": "all", "targets": "set", "num_targets": 4}, 1 / 2),
        ({"candidates": "active", "targets": "set"}, 1 / 2),
    ],
)
def test_agreement_is_reported_against_chance(options, chance):
    x, gate_up, down, _, logits, grad_y = make_layer(num_tokens=600, num_experts=8)
    keep = normal(600, 8, seed=9).argsort(-1) < 4
    tensors = (x, gate_up, down, keep.double())
    mask = torch.arange(600) % 3 != 0
    rule = SmkRule(**options)
    surprise, tally, _ = backward_pass(*tensors, logits, grad_y, rule=rule, token_mask_T=mask)
    assert int(tally.num_tokens) == int(tally.num_targets) == 400
    assert float(tally.chance) == pytest.approx(400 * chance)
    torch.testing.assert_close(tally.surprise_E.double(), surprise[mask].sum(0))
    # A random gate agrees as often as chance, within 4 standard deviations; a taught one always.
    spread = math.sqrt(400 * chance * (1 - chance))
    assert abs(float(tally.num_agree) - 400 * chance) < 4 * spread
    _, taught, _ = backward_pass(*tensors, -surprise, grad_y, rule=rule, token_mask_T=mask)
    assert int(taught.num_agree) == 400
