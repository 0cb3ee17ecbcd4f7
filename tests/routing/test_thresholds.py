"""Thresholds that meet a target: exact ones on a batch, and steered ones on streams."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import make_dense, make_student, normal
from tiny_onn.model.router import Router, RoutingRule, route
from tiny_onn.routing.thresholds import corrected_targets, exact_threshold, update_thresholds

BudgetForm = Literal["cumulative", "threshold"]
FORMS: tuple[BudgetForm, ...] = ("cumulative", "threshold")
HIDDEN, NUM_EXPERTS, S = 12, 8, 2

each_form = pytest.mark.parametrize("form", FORMS)


def everyone(num_tokens):
    return torch.ones(num_tokens, dtype=torch.bool)


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
            update_thresholds([router], exact[None], 0.1)


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
        update_thresholds([router], exact[None], 0.1)
    # The first batch is routed by a flat gate's threshold. A batch is a sample with noise of its
    # own, so that what holds is the mean of some.
    held = torch.stack(means[5:]).view(2, 15).mean(1)
    assert ((held / target_k - 1).abs() < 0.02).all()


def test_steering_is_a_mean_at_first_and_then_a_moving_one():
    router = Router(HIDDEN, NUM_EXPERTS, RoutingRule(target_k=4.0))
    for value, expected in ((0.2, 0.2), (0.4, 0.3), (0.7, 0.5), (0.1, 0.3)):
        update_thresholds([router], torch.tensor([value]), rate=0.5)
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
        update_thresholds([router], exact[None], 0.1)
    assert abs(sum(means[20:]) / 100 / 16 - 1) < 0.1


@pytest.mark.parametrize("form", ["cumulative", "threshold"])
def test_a_budget_counts_shared_experts(form):
    logits, mask = normal(40, NUM_EXPERTS), torch.arange(40) % 3 != 0
    for target_k in (3.0, 4.5, 7.0, 8.0):
        rule = RoutingRule(budget_form=form, target_k=target_k, num_shared=S)
        scores = route(logits, rule, torch.tensor(0.0)).scores
        threshold = exact_threshold(scores, mask, target_k)
        active = route(logits, rule, threshold).active[mask]
        assert active[:, :S].all()
        assert active.sum().item() == round(int(mask.sum()) * target_k)


@pytest.mark.parametrize("form", ["cumulative", "threshold"])
def test_a_fresh_threshold_fits_a_flat_gate(form):
    student = make_student(make_dense(), budget_form=form, num_shared=S, gate_init="zeros")
    router = student.banks()[0].router
    assert router(normal(9, 32)).active.sum(-1).tolist() == [4] * 9
    router.rule = RoutingRule(target_k=4.0, num_shared=S)
    router.correction.fill_(0.9)
    assert corrected_targets([router]) == S + 1
