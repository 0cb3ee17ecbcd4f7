"""What routers change without a gradient: budgets, balance, revival, exploration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import CONFIG, change, make_dense, make_rows, make_student
from tiny_onn.config.schema import BudgetScope, Checkpointing
from tiny_onn.conversion import pipeline as prepare
from tiny_onn.distill.checkpointing import checkpoint_layers
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.step import distill_step
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import last_hidden_states
from tiny_onn.model.experts import RowState, recorded_routings
from tiny_onn.model.exploration import Exploration, explore
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.router import Router, RoutingRule, route
from tiny_onn.routing import thresholds
from tiny_onn.routing.budgets import fit_eval_thresholds
from tiny_onn.routing.statistics import RoutingStats
from tiny_onn.routing.steering import REVIVED_SHARE, balance, revival_lift, revive
from tiny_onn.routing.thresholds import corrected_targets, exact_thresholds, update_thresholds

HIDDEN, EXPERTS, TOKENS = 12, 32, 256
ROWS = make_rows((20, 13, 30, 40, 9, 40, 17, 22), 32)
EVERYONE = torch.ones(TOKENS, dtype=torch.bool)


def routers(form, target_k, num_layers=1):
    rule = RoutingRule(selection="budget", budget_form=form, target_k=target_k)
    return [Router(HIDDEN, EXPERTS, rule) for _ in range(num_layers)]


def run(layers, batches, *, rate=0.3, scope: BudgetScope = "layer"):
    """Route simulated logits, batch by batch, and steer after each; mean k by batch and layer."""
    means = []
    for batch in batches:
        pairs = list(zip(layers, batch, strict=True))
        routings = [route(logits, layer.rule, layer.threshold) for layer, logits in pairs]
        k_L = torch.stack([routing.active.sum(-1).float().mean() for routing in routings])
        means.append(k_L)
        scores = [routing.scores for routing in routings]
        exact_L = exact_thresholds(scores, EVERYONE, corrected_targets(layers), scope)
        seen_L = k_L.mean().expand_as(k_L) if scope == "global" else k_L
        update_thresholds(layers, exact_L, rate, seen_L)
    return torch.stack(means)


def gates(seed, scales, favourites, num_layers=1):
    """Batches of logits: per step a scale, and experts that all its tokens like."""
    generator = torch.Generator().manual_seed(seed)
    for scale, favourite in zip(scales, favourites, strict=True):
        yield [
            torch.randn(TOKENS, EXPERTS, generator=generator) * scale + favourite
            for _ in range(num_layers)
        ]


@pytest.mark.parametrize("elements", [1, 2 * TOKENS * EXPERTS, 2**22])
def test_layers_are_steered_together_as_one_by_one(elements, monkeypatch):
    monkeypatch.setattr(thresholds, "GROUP_ELEMENTS", elements)
    batches = list(gates(0, [0.3, 0.5, 1.0], [torch.zeros(EXPERTS)] * 3, num_layers=5))
    layers, alone = routers("threshold", 16.0, 5), routers("threshold", 16.0, 5)
    together = run(layers, batches)
    for index, (layer, twin) in enumerate(zip(layers, alone, strict=True)):
        means = run([twin], [[batch[index]] for batch in batches])
        assert torch.equal(together[:, index], means[:, 0])
        for name, value in layer.named_buffers():
            assert torch.equal(value, twin.get_buffer(name)), name
        assert layer.num_updates == 3
    assert len({float(layer.threshold) for layer in layers}) == 5


@settings(max_examples=8, deadline=None)
@given(
    form=st.sampled_from(["cumulative", "threshold"]),
    target_k=st.sampled_from([5.5, 16.0, 27.25]),
    gate=st.tuples(
        st.sampled_from([0.01, 0.3, 1.0, 4.0]),
        st.sampled_from([0.995, 1.0, 1.005]),
        st.sampled_from([0.0, 1.0, 4.0]),
    ),
    seed=st.integers(0, 99),
)
def test_mean_k_holds_within_two_percent_from_any_gate_that_drifts(form, target_k, gate, seed):
    scale, drift, skew = gate
    likes = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(seed)) * skew
    scales = [scale * drift**step for step in range(100)]
    means = run(routers(form, target_k), gates(seed, scales, [likes] * 100))
    held = means[20:].mean().item()
    assert held == pytest.approx(target_k, rel=0.02)
    # In no stretch of it, either.
    stretches = means[20:].view(4, 20).mean(1)
    assert ((stretches / target_k - 1).abs() < 0.02).all()


@settings(max_examples=6, deadline=None)
@given(
    form=st.sampled_from(["cumulative", "threshold"]),
    scales=st.sampled_from([(0.5, 2.0), (1.0, 1.0), (3.0, 0.5)]),
    seed=st.integers(0, 99),
)
def test_mean_k_returns_after_the_text_changes_and_changes_back(form, scales, seed):
    generator = torch.Generator().manual_seed(seed)
    prose, code = (torch.randn(EXPERTS, generator=generator) for _ in range(2))
    steps = [(scales[0], prose)] * 40 + [(scales[1], code)] * 60 + [(scales[0], prose)] * 60
    batches = gates(seed, [s for s, _ in steps], [f for _, f in steps])
    means = run(routers(form, 16.0), batches)[:, 0]
    # 25 steps after each change, and whatever the changes cost, over the whole of it.
    for stretch in (means[20:40], means[65:100], means[125:160]):
        assert stretch.mean().item() == pytest.approx(16, rel=0.02)
    assert means[20:].mean().item() == pytest.approx(16, rel=0.03)


def test_a_lagging_average_of_thresholds_alone_misses_what_the_integral_holds():
    def held(integral):
        (layer,) = routers("threshold", 16.0)
        means = []
        for step in range(200):
            # Experts become unequal: the share of probability above any threshold falls.
            generator = torch.Generator().manual_seed(step)
            logits = torch.randn(TOKENS, EXPERTS, generator=generator) * 0.3 * 1.005**step
            routing = route(logits, layer.rule, layer.threshold)
            k = routing.active.sum(-1).float().mean()
            means.append(k.item())
            exact = exact_thresholds(
                [routing.scores], EVERYONE, corrected_targets([layer]), "layer"
            )
            update_thresholds([layer], exact, 0.1, k[None] if integral else None)
        return abs(sum(means[60:]) / 140 / 16 - 1)

    assert held(integral=True) < 0.01
    assert held(integral=False) > 3 * held(integral=True)


def test_a_global_budget_is_met_by_all_layers_together_and_lets_them_differ():
    layers = routers("threshold", 16.0, num_layers=3)
    generator = torch.Generator().manual_seed(0)
    sharp = [0.1, 1.0, 4.0]
    batches = (
        [torch.randn(TOKENS, EXPERTS, generator=generator) * scale for scale in sharp]
        for _ in range(60)
    )
    means = run(layers, batches, scope="global")[20:].mean(0)
    assert means.mean().item() == pytest.approx(16, rel=0.02)
    assert means[0] > means[1] + 2
    assert means[1] > means[2] + 2
    assert len({layer.threshold.item() for layer in layers}) == 1


def test_the_controller_is_off_at_evaluation_and_in_the_state():
    student = make_student(make_dense("llama"))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    for mode in (False, True):
        student.train(mode)
        student(input_ids=ROWS[0].input_ids)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    names = {name.rpartition(".")[2] for name in before if ".router." in name}
    assert {"threshold", "settled", "correction", "num_updates"} <= names


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_settling_meets_the_target_at_evaluation_and_leaves_training_alone(scope):
    config = change(CONFIG, router={"budget_scope": scope, "budget_form": "threshold"})
    dense = make_dense("llama")
    student = prepare.make_student(config, MlpInputs(dense, ROWS[:1]))
    banks = student.banks()
    steered = [bank.router.threshold.clone() for bank in banks]
    student.train()
    fit_eval_thresholds(student, ROWS, scope)
    assert student.training
    assert [bank.router.threshold for bank in banks] == steered
    # A second time, so that later layers see the inputs that settled ones give.
    fit_eval_thresholds(student, ROWS, scope)
    student.train(False)
    stats = RoutingStats.zeros(banks)
    with torch.no_grad():
        for row in ROWS:
            with recorded_routings(banks) as routings:
                last_hidden_states(student, row.input_ids, **packed_kwargs(row))
            stats.add(routings, row)
    k_L = stats.load_LE.sum(-1) / stats.num_tokens
    assert k_L.mean().item() == pytest.approx(4, rel=0.02)
    if scope == "layer":
        assert (k_L / 4 - 1).abs().max() < 0.02


def test_balance_moves_by_the_sign_of_the_error_and_not_as_a_whole():
    router = Router(HIDDEN, 4, RoutingRule(selection="top_k", target_k=1.0))
    balance(router, torch.tensor([9.0, 1.0, 1.0, 1.0]), 0.5)
    # -1 for the first, +1 for the others, times the rate, centred.
    assert router.selection_bias.tolist() == pytest.approx([-0.75, 0.25, 0.25, 0.25])


def test_balance_evens_the_load_and_leaves_the_weights_alone():
    rule = RoutingRule(selection="top_k", weighting="softmax", target_k=2.0)
    router = Router(HIDDEN, 8, rule)
    generator = torch.Generator().manual_seed(0)
    likes = torch.linspace(-1, 1, 8)
    loads, logits, routing = [], torch.zeros(TOKENS, 8), None
    for _ in range(300):
        logits = torch.randn(TOKENS, 8, generator=generator) + likes
        routing = route(logits, rule, router.threshold, router.selection_bias)
        loads.append(routing.active.sum(0).float())
        balance(router, loads[-1], 0.02)
    first, last = loads[0] / loads[0].mean(), torch.stack(loads[-30:]).mean(0) / loads[0].mean()
    assert first.max() > 1.8
    assert last.max() < 1.15
    assert last.min() > 0.85
    # Selected with the bias, weighted without it.
    assert routing is not None
    kept = torch.where(routing.active, logits, float("-inf")).softmax(-1)
    torch.testing.assert_close(routing.weights, kept)


@pytest.mark.parametrize("selection", ["top_k", "budget"])
def test_an_unused_expert_is_revived_for_about_one_percent_of_the_tokens(selection):
    rule = RoutingRule(selection=selection, target_k=4.0)
    router = Router(HIDDEN, EXPERTS, rule)
    likes = torch.zeros(EXPERTS)
    likes[5] = -20.0
    logits = torch.randn(1000, EXPERTS, generator=torch.Generator().manual_seed(0)) + likes
    mask = torch.ones(1000, dtype=torch.bool)
    with torch.no_grad():
        router.threshold.fill_(1.5 / EXPERTS)
    shares = []
    for _ in range(4):
        routing = route(logits, rule, router.threshold, router.selection_bias)
        load = routing.active.sum(0).float()
        shares.append(load[5].item() / 1000)
        revive(router, load, revival_lift(router, routing, mask), after_steps=2)
    assert shares[:2] == [0, 0]
    # The budget's threshold may refuse some of those that rank it above their last choice.
    assert 0 < shares[2] <= 1.5 * REVIVED_SHARE
    assert shares[3] == shares[2]
    assert (router.selection_bias != 0).sum() == 1


def test_revival_of_top_any_makes_its_logit_positive():
    router = Router(HIDDEN, 6, RoutingRule(selection="top_any"))
    router.reset(torch.Generator().manual_seed(0))
    with torch.no_grad():
        router.bias[2] = 2.0
    x = torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(200, dtype=torch.bool)
    routing = router(x)
    assert not routing.active[:, 2].any()
    load = routing.active.sum(0).float()
    revive(router, load, revival_lift(router, routing, mask), after_steps=1)
    assert router(x).active[:, 2].sum() == 2


@given(fraction=st.floats(0, 1), seed=st.integers(0, 2**53 - 1))
@settings(max_examples=25, deadline=None)
def test_exploration_swaps_the_weakest_for_one_outside_and_keeps_the_number(fraction, seed):
    logits = torch.randn(TOKENS, 8, generator=torch.Generator().manual_seed(3))
    active = logits > 0.3
    got = explore(active, logits, Exploration(fraction=fraction, seed=seed))
    assert torch.equal(got, explore(active, logits, Exploration(fraction=fraction, seed=seed)))
    assert torch.equal(got.sum(-1), active.sum(-1))
    moved = (got != active).any(-1)
    for t in moved.nonzero().flatten().tolist():
        (lost,) = (active[t] & ~got[t]).nonzero().flatten().tolist()
        (won,) = (~active[t] & got[t]).nonzero().flatten().tolist()
        assert logits[t, lost] == logits[t][active[t]].min()
        assert won != lost
    able = int((active.any(-1) & ~active.all(-1)).sum())
    assert abs(int(moved.sum()) - fraction * able) <= 4 * (able * 0.25) ** 0.5
    assert fraction > 0 or not moved.any()


def explored(checkpointing: Checkpointing = "none", **changes):
    smk = {"explore_fraction": 0.5, "candidates": "active"}
    config = change(CONFIG, smk=smk, train={"checkpointing": checkpointing, **changes})
    dense = make_dense("llama")
    student = prepare.make_student(config, MlpInputs(dense, ROWS))
    checkpoint_layers(student, checkpointing)
    optimizer = build_optimizer(student, config.optim)
    results = [
        distill_step(student, dense, optimizer, [ROWS[2 * i], ROWS[2 * i + 1]], config, step=i)
        for i in range(3)
    ]
    return student.state_dict(), results


def test_exploration_is_the_same_when_layers_are_computed_again():
    plain, kept = explored()
    again, recomputed = explored("layer")
    for name, tensor in plain.items():
        assert torch.equal(tensor, again[name]), name
    assert [r.loss for r in kept] == [r.loss for r in recomputed]
    other, _ = explored(seed=1)
    assert any(not torch.equal(tensor, other[name]) for name, tensor in plain.items())


def test_a_row_leaves_nothing_behind_in_the_banks():
    config = change(CONFIG, smk={"explore_fraction": 0.5})
    dense = make_dense("llama")
    student = prepare.make_student(config, MlpInputs(dense, ROWS))
    distill_step(student, dense, build_optimizer(student, config.optim), ROWS[:1], config)
    assert all(bank.row == RowState() for bank in student.banks())
