"""Routing against transformers' routers and per-token loops; the budget's controller on streams."""

from typing import Any, Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

from tiny_onn.config import Weighting
from tiny_onn.coupled_losses import load_balancing_loss, z_loss
from tiny_onn.router import (
    Router,
    RoutingRule,
    route,
    routing_weights,
)
from tiny_onn.thresholds import exact_threshold, steer

BudgetForm = Literal["cumulative", "threshold"]
FORMS: tuple[BudgetForm, ...] = ("cumulative", "threshold")
HIDDEN, NUM_EXPERTS = 12, 8

each_form = pytest.mark.parametrize("form", FORMS)


def normal(*shape, seed=0, scale=1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def everyone(num_tokens) -> Tensor:
    return torch.ones(num_tokens, dtype=torch.bool)


def router_of(family, top_k):
    """A transformers MoE router of our size."""
    if family == "mixtral":
        config: Any = MixtralConfig(
            hidden_size=HIDDEN, num_local_experts=NUM_EXPERTS, num_experts_per_tok=top_k
        )
        return modeling_mixtral.MixtralTopKRouter(config)
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, num_experts=NUM_EXPERTS, num_experts_per_tok=top_k, norm_topk_prob=True
    )
    return modeling_qwen3_moe.Qwen3MoeTopKRouter(config)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("top_k", [1, 2, 5, 8])
def test_top_k_routes_as_transformers(family, top_k):
    theirs = router_of(family, top_k)
    rule = RoutingRule(selection="top_k", weighting="softmax", target_k=float(top_k))
    ours = Router(HIDDEN, NUM_EXPERTS, rule)
    with torch.no_grad():
        theirs.weight.copy_(normal(NUM_EXPERTS, HIDDEN, seed=1))
        ours.weight.copy_(theirs.weight)
    x = normal(50, HIDDEN)
    _, their_weights, chosen = theirs(x)
    routing = ours(x)
    expected = torch.zeros(50, NUM_EXPERTS).scatter(1, chosen, their_weights)
    assert torch.equal(routing.active, expected > 0)
    torch.testing.assert_close(routing.weights, expected)
    # The same gate learns the same thing from the same gradient at the weights.
    pull = normal(50, NUM_EXPERTS, seed=2)
    (our_grad,) = torch.autograd.grad((routing.weights * pull).sum(), ours.weight)
    (their_grad,) = torch.autograd.grad((expected * pull).sum(), theirs.weight)
    torch.testing.assert_close(our_grad, their_grad)


@pytest.mark.parametrize("module", [modeling_mixtral, modeling_qwen3_moe])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
def test_load_balancing_loss_equals_transformers(module, masked, top_k):
    layers = tuple(normal(2 * 15, NUM_EXPERTS, seed=i).requires_grad_() for i in range(3))
    mask = torch.arange(30).view(2, 15) % 4 != 0 if masked else None
    theirs = module.load_balancing_loss_func(layers, NUM_EXPERTS, top_k, mask)
    ours = load_balancing_loss(layers, top_k, mask.flatten() if mask is not None else everyone(30))
    torch.testing.assert_close(ours, theirs)
    ours_grad, theirs_grad = torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers)
    torch.testing.assert_close(ours_grad, theirs_grad)
    assert all(grad.any() for grad in ours_grad)


def test_balanced_and_collapsed_gates_bound_the_load_balancing_loss():
    balanced = 9 * torch.eye(4).repeat(5, 1)
    collapsed = 99 * torch.eye(4)[:1].repeat(20, 1)
    assert load_balancing_loss([balanced], 1, everyone(20)).item() == pytest.approx(1)
    assert load_balancing_loss([collapsed], 1, everyone(20)).item() == pytest.approx(4)


def test_z_loss_is_the_mean_squared_log_partition_of_counted_tokens():
    logits = [normal(6, 4, seed=i) for i in range(2)]
    mask = torch.tensor([True, False, True, True, False, True])
    squares = [
        row.exp().sum().log().item() ** 2
        for layer in logits
        for row, counts in zip(layer, mask, strict=True)
        if counts
    ]
    assert z_loss(logits, mask).item() == pytest.approx(sum(squares) / 8)


def budget_by_loop(logits: list[float], form: BudgetForm, threshold: float) -> set[int]:
    """One token's active experts, in float64; the probability mass stops at 1 - threshold."""
    probs = torch.tensor(logits, dtype=torch.float64).softmax(-1).tolist()
    ranked = sorted(range(len(probs)), key=lambda e: (-probs[e], e))
    active, mass = {ranked[0]}, 0.0
    for e in ranked:
        quantity = 1 - mass if form == "cumulative" else probs[e]
        assume(abs(quantity - threshold) > 1e-4)
        if quantity > threshold:
            active.add(e)
        mass += probs[e]
    return active


@given(
    logits=st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.0, 0.5, 3.0]), min_size=1, max_size=9),
    form=st.sampled_from(FORMS),
    threshold=st.floats(-0.5, 1.5),
)
def test_budget_equals_a_loop_over_experts(logits, form, threshold):
    expected = budget_by_loop(logits, form, threshold)
    rule = RoutingRule(selection="budget", budget_form=form)
    routing = route(torch.tensor([logits]), rule, torch.tensor(threshold))
    assert set(routing.active[0].nonzero().flatten().tolist()) == expected


@given(
    st.sampled_from(FORMS),
    st.floats(-1, 2),
    st.floats(0, 200),
    st.integers(0, 99),
)
def test_at_least_one_expert_is_active_and_weights_are_finite(form, threshold, scale, seed):
    for weighting in ("unit", "softmax", "sigmoid", "mean"):
        rule = RoutingRule(selection="budget", budget_form=form, weighting=weighting)
        logits = normal(5, 6, seed=seed, scale=scale)
        routing = route(logits, rule, torch.tensor(threshold))
        assert routing.active.any(-1).all()
        assert routing.active.gather(1, logits.argmax(-1, keepdim=True)).all()
        assert routing.weights.isfinite().all()
        assert not routing.weights[~routing.active].any()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("num_layers", [None, 1, 3])
def test_exact_threshold_lies_between_the_sorted_scores_on_either_side(num_layers, ties):
    shape = (13, 8) if num_layers is None else (num_layers, 13, 8)
    scores = normal(*shape).softmax(-1)
    scores = (8 * scores).round() / 8 if ties else scores
    for mask in (torch.arange(13) % 3 != 0, torch.zeros(13, dtype=torch.bool)):
        for target_k in (0.0, 0.05, 1.0, 3.3, 8.0):
            expected = []
            for layer in scores.view(-1, 13, 8):
                falling = [*sorted(layer[mask].flatten().tolist(), reverse=True), -1.0]
                n = round(int(mask.sum()) * target_k)
                expected.append((falling[max(n - 1, 0)] + falling[n]) / 2)
            got = exact_threshold(scores, mask, target_k)
            assert got.shape == shape[:-2]
            torch.testing.assert_close(got.flatten(), torch.tensor(expected))
            if num_layers is not None:
                targets = torch.full((num_layers,), target_k)
                assert torch.equal(exact_threshold(scores, mask, targets), got)


@each_form
@pytest.mark.parametrize("target_k", [1.0, 4.0, 16.0, 24.5, 32.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_exact_threshold_meets_the_target_on_its_batch(form, target_k, scale):
    logits, mask = normal(64, 32, scale=scale), torch.arange(64) % 4 != 0
    rule = RoutingRule(selection="budget", budget_form=form, target_k=target_k)
    scores = route(logits, rule, torch.tensor(0.0)).scores
    threshold = exact_threshold(scores, mask, target_k)
    active = route(logits, rule, threshold).active
    # A whole number of pairs: 48 counted tokens times 24.5 is one.
    assert int(active[mask].sum()) == 48 * target_k
    moved = exact_threshold(torch.where(mask[:, None], scores, 7.0), mask, target_k)
    assert torch.equal(moved, threshold)


@each_form
@pytest.mark.parametrize("num_experts", [30, 32])
def test_a_flat_gate_starts_on_target_and_stays(form, num_experts):
    for target_k in (1, 7, num_experts // 2, num_experts):
        rule = RoutingRule(selection="budget", budget_form=form, target_k=float(target_k))
        router = Router(HIDDEN, num_experts, rule)
        for _ in range(30):
            routing = router(normal(9, HIDDEN))
            assert (routing.active.sum(-1) == target_k).all()
            exact = exact_threshold(routing.scores, everyone(9), rule.target_k)
            steer([router], exact[None], 0.1)


@settings(max_examples=12, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    target_k=st.sampled_from([5.5, 16.0, 27.25]),
    scale=st.sampled_from([0.01, 0.3, 1.0, 4.0]),
    skew=st.sampled_from([0.0, 1.0, 4.0]),
    seed=st.integers(0, 99),
)
def test_steering_holds_the_mean_k_within_two_percent(form, target_k, scale, skew, seed):
    generator = torch.Generator().manual_seed(seed)
    rule = RoutingRule(selection="budget", budget_form=form, target_k=target_k)
    router = Router(HIDDEN, 32, rule)
    favourites = torch.randn(32, generator=generator) * skew
    means = []
    for _ in range(35):
        logits = torch.randn(512, 32, generator=generator) * scale + favourites
        routing = route(logits, rule, router.threshold)
        means.append(routing.active.sum(-1).float().mean())
        exact = exact_threshold(routing.scores, everyone(512), target_k)
        steer([router], exact[None], 0.1)
    # The first batch is routed by a flat gate's threshold. A batch is a sample with noise of its
    # own, so that what holds is the mean of some.
    held = torch.stack(means[5:]).view(2, 15).mean(1)
    assert ((held / target_k - 1).abs() < 0.02).all()


def test_steering_is_a_mean_at_first_and_then_a_moving_one():
    router = Router(HIDDEN, NUM_EXPERTS, RoutingRule(target_k=4.0))
    for value, expected in ((0.2, 0.2), (0.4, 0.3), (0.7, 0.5), (0.1, 0.3)):
        steer([router], torch.tensor([value]), rate=0.5)
        assert router.threshold.item() == pytest.approx(expected)


@each_form
def test_steering_follows_a_gate_that_sharpens(form):
    rule = RoutingRule(selection="budget", budget_form=form, target_k=16.0)
    router = Router(HIDDEN, 32, rule)
    means = []
    for step in range(120):
        logits = normal(256, 32, seed=step, scale=0.5 * 1.01**step)
        routing = route(logits, rule, router.threshold)
        means.append(routing.active.sum(-1).float().mean().item())
        exact = exact_threshold(routing.scores, everyone(256), 16.0)
        steer([router], exact[None], 0.1)
    assert abs(sum(means[20:]) / 100 / 16 - 1) < 0.1


def test_weights_by_hand():
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    active = torch.tensor([[False, True, False, True]])
    probs = logits.softmax(-1)
    sigmoid = logits.sigmoid()[0]
    share = 1 / (1 + torch.tensor(2.0).exp()).item()
    cases: tuple[tuple[Weighting, list[float]], ...] = (
        ("unit", [0, 1, 0, 1]),
        ("mean", [0, 0.5, 0, 0.5]),
        ("softmax", [0, share, 0, 1 - share]),
        ("sigmoid", [0, sigmoid[1].item(), 0, sigmoid[3].item()]),
    )
    for weighting, expected in cases:
        weights = routing_weights(logits, probs, active, weighting)
        torch.testing.assert_close(weights, torch.tensor([expected]).float())


@pytest.mark.parametrize(("weighting", "divisor"), [("unit", 1), ("mean", 3)])
def test_weights_without_logits_pass_their_gradient_straight_to_the_softmax(weighting, divisor):
    logits, pull = normal(4, 6).requires_grad_(), normal(4, 6, seed=1)
    rule = RoutingRule(selection="top_k", weighting=weighting, target_k=3.0)
    weights = route(logits, rule, torch.tensor(0.0)).weights
    (got,) = torch.autograd.grad((weights * pull).sum(), logits)
    surrogate = 6 * logits.softmax(-1) * pull / divisor
    (expected,) = torch.autograd.grad(surrogate.sum(), logits)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("selection", ["top_k", "static", "random"])
def test_fixed_selections_take_the_k_largest_and_the_first_of_equals(selection):
    rule = RoutingRule(selection=selection, target_k=2.0)
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    active = route(logits, rule, torch.tensor(0.0)).active
    assert active.tolist() == [[False, True, False, True], [True, True, False, False]]


def test_routing_runs_in_float32_whatever_the_input():
    rule = RoutingRule(selection="budget", target_k=4.0)
    router = Router(HIDDEN, NUM_EXPERTS, rule)
    router.reset(torch.Generator().manual_seed(0), std=1.0)
    x = normal(20, HIDDEN).bfloat16()
    routing = router(x)
    assert routing.router_logits.dtype == routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.router_logits, x.float() @ router.weight.T)
