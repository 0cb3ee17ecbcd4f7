"""Routing against transformers' routers and per-token loops; the budget's controller on streams."""

import math
import sys
from typing import Any, Literal, get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

from tiny import normal
from tiny_onn.config.schema import Selection, Weighting
from tiny_onn.model.exploration import Exploration
from tiny_onn.model.router import Router, RoutingRule, route, routing_weights

BudgetForm = Literal["cumulative", "threshold"]
FORMS: tuple[BudgetForm, ...] = ("cumulative", "threshold")
HIDDEN, NUM_EXPERTS = 12, 8
E, S = NUM_EXPERTS, 2

each_form = pytest.mark.parametrize("form", FORMS)


def everyone(num_tokens) -> Tensor:
    return torch.ones(num_tokens, dtype=torch.bool)


def router_of(family, top_k):
    """Return a transformers MoE router of our size."""
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
    # Equal gates get equal gradients from equal gradients at the weights.
    pull = normal(50, NUM_EXPERTS, seed=2)
    (our_grad,) = torch.autograd.grad((routing.weights * pull).sum(), ours.weight)
    (their_grad,) = torch.autograd.grad((expected * pull).sum(), theirs.weight)
    torch.testing.assert_close(our_grad, their_grad)


def budget_by_loop(logits: list[float], form: BudgetForm, threshold: float) -> set[int]:
    """Return a token's active experts in float64; their mass stops at 1 - threshold."""
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


def test_weights_by_hand():
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    active = torch.tensor([[False, True, False, True]])
    sigmoid = logits.sigmoid()[0]
    share = 1 / (1 + torch.tensor(2.0).exp()).item()
    cases: tuple[tuple[Weighting, list[float]], ...] = (
        ("unit", [0, 1, 0, 1]),
        ("mean", [0, 0.5, 0, 0.5]),
        ("softmax", [0, share, 0, 1 - share]),
        ("sigmoid", [0, sigmoid[1].item(), 0, sigmoid[3].item()]),
    )
    for weighting, expected in cases:
        weights = routing_weights(logits, active, weighting)
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


LINEAR: tuple[Selection, ...] = ("budget", "top_k", "static", "random", "oracle")


def routed_by_hand(logits, rule: RoutingRule, threshold, bias):
    """Return a token's active experts and their weights, by the definition."""
    others = range(rule.num_shared, len(logits))
    biased = {e: logits[e] + bias[e] for e in others}
    order = sorted(others, key=lambda e: (-biased[e], e))
    total = sum(math.exp(biased[e]) for e in others)
    probs = [math.exp(biased[e]) / total for e in order]
    if rule.has_budget:
        scores = [p * (1 - rank * 2.0**-20) for rank, p in enumerate(probs)]
        if rule.budget_form == "cumulative":
            scores = [sum(probs[rank:]) for rank in range(len(order))]
        # No score is so near the threshold that rounding decides.
        assume(all(abs(score - threshold) > 1e-9 for score in scores))
        chosen = [
            e
            for rank, (e, score) in enumerate(zip(order, scores, strict=True))
            if rank == 0 or score > threshold
        ]
    else:
        chosen = order[: int(rule.target_k) - rule.num_shared]
    mass = sum(math.exp(logits[e]) for e in chosen)
    log_threshold = math.log(max(threshold, sys.float_info.min))
    weight = {
        "unit": lambda e: 1.0,
        "softmax": lambda e: math.exp(logits[e]) / mass,
        "sigmoid": lambda e: 1 / (1 + math.exp(-logits[e])),
        "mean": lambda e: 1 / len(chosen),
        "ramp": lambda e: math.tanh(max(0.0, 4 * (biased[e] - math.log(total) - log_threshold))),
    }[rule.weighting]
    weights = [0.0] * len(logits)
    for e in range(len(logits)):
        if e < rule.num_shared:
            weights[e] = 1.0
        elif e in chosen:
            weights[e] = weight(e)
    return [e < rule.num_shared or e in chosen for e in range(len(logits))], weights


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 999),
    num_shared=st.integers(0, 5),
    more=st.integers(1, 3),
    selection=st.sampled_from(LINEAR),
    weighting=st.sampled_from(get_args(Weighting)),
    form=st.sampled_from(["cumulative", "threshold"]),
    oracle_budget=st.booleans(),
    threshold=st.floats(-0.1, 1.1),
    ties=st.booleans(),
    biased=st.booleans(),
)
def test_routing_is_the_definition_for_every_selection(  # noqa: PLR0917
    seed, num_shared, more, selection, weighting, form, oracle_budget, threshold, ties, biased
):
    rule = RoutingRule(
        selection=selection,
        weighting=weighting,
        target_k=float(num_shared + more),
        budget_form=form,
        oracle_budget=oracle_budget,
        num_shared=num_shared,
    )
    logits = normal(5, E, seed=seed, dtype=torch.float64)
    # Sums of halves are exact, so that equal logits stay equal.
    logits = logits.mul(2).round().div(2) if ties else logits
    bias = normal(E, seed=seed + 1, dtype=torch.float64).round() * biased
    routing = route(logits, rule, torch.tensor(threshold, dtype=torch.float64), bias)
    assert torch.equal(routing.router_logits, logits)
    for t in range(len(logits)):
        active, weights = routed_by_hand(logits[t].tolist(), rule, threshold, bias.tolist())
        assert routing.active[t].tolist() == active
        assert routing.weights[t].tolist() == pytest.approx(weights, abs=1e-12)
    assert routing.scores[:, :num_shared].isposinf().all()


@given(st.integers(0, 99), st.integers(0, 5), st.floats(0, 1))
def test_exploration_swaps_no_shared_expert(seed, num_shared, fraction):
    rule = RoutingRule(selection="top_k", target_k=num_shared + 2.0, num_shared=num_shared)
    logits, zero = normal(20, E, seed=seed), torch.tensor(0.0)
    plain = route(logits, rule, zero)
    tried = route(logits, rule, zero, exploration=Exploration(fraction=fraction, seed=seed))
    assert tried.active[:, :num_shared].all()
    assert torch.equal(tried.active.sum(-1), plain.active.sum(-1))
    # One routed expert is swapped for another.
    changed = (tried.active != plain.active).sum(-1)
    assert set(changed.tolist()) <= {0, 2}
    assert fraction < 1 or (changed == 2).all()


@pytest.mark.parametrize("weighting", get_args(Weighting))
def test_the_main_loss_leaves_shared_logits_alone(weighting):
    selection = "budget" if weighting == "ramp" else "top_k"
    rule = RoutingRule(selection=selection, weighting=weighting, target_k=5.0, num_shared=S)
    logits = normal(20, E).requires_grad_()
    weights = route(logits, rule, torch.tensor(0.1)).weights
    (weights * normal(20, E, seed=1)).sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad[:, :S], torch.zeros(20, S))
    assert (logits.grad[:, S:] != 0).any(0).all()
