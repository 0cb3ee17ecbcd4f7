"""Shared experts: always on, in no choice, taught nothing; routing against a loop over tokens."""

import json
import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from test_routing_stats import COUNTED, ROW, entropy, routing_of
from tiny import CONFIG, WIDTH, change, make_dense, make_ids, make_rows, make_student
from tiny_onn.budgets import set_budget, tabulate
from tiny_onn.calibrate import sample_inputs
from tiny_onn.checks import validate
from tiny_onn.config import ExpertInit, RunConfig, Selection, Weighting
from tiny_onn.convert import identity_gap
from tiny_onn.errors import UserError
from tiny_onn.evaluate import evaluate
from tiny_onn.experts import Execution, ExpertBank, RowState, row_context
from tiny_onn.frontier import default_budgets
from tiny_onn.held_out import HeldOut
from tiny_onn.massive import MassiveActivation, massive_activations, massive_neurons
from tiny_onn.mlp_inputs import MlpInputs
from tiny_onn.modeling import TinyOnnForCausalLM, gated_mlps
from tiny_onn.ops.teaching import SmkStep, SurpriseTally, teach
from tiny_onn.optim import build_optimizer
from tiny_onn.partition import by_importance, learn_partition, neuron_energy
from tiny_onn.prepare import make_student as prepare_student
from tiny_onn.prepare import needs_text, partition, set_objective
from tiny_onn.router import Exploration, RoutingRule, route
from tiny_onn.routing_stats import OracleStats, RoutingStats
from tiny_onn.shared import kept_first, routed, split_neurons, with_shared
from tiny_onn.steering import settle
from tiny_onn.step import distill_step
from tiny_onn.surprise import SmkRule
from tiny_onn.thresholds import aims, exact_threshold
from tiny_onn.truth import would_be_weights

ROWS = make_rows((20, 13, 30, 64, 9, 40, 17, 22), 64)
E, S = 8, 2
LINEAR: tuple[Selection, ...] = ("budget", "top_k", "static", "random", "oracle")
SHARED = change(CONFIG, experts={"num_shared": S}, data={"row_tokens": 64})


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def routed_by_hand(logits, rule: RoutingRule, threshold, bias):
    """One token's active experts and their weights, by the definition."""
    others = range(rule.num_shared, len(logits))
    biased = {e: logits[e] + bias[e] for e in others}
    order = sorted(others, key=lambda e: (-biased[e], e))
    total = sum(math.exp(biased[e]) for e in others)
    probs = [math.exp(biased[e]) / total for e in order]
    if rule.has_budget:
        scores = [p * (1 - rank * 2.0**-20) for rank, p in enumerate(probs)]
        if rule.budget_form == "cumulative":
            scores = [sum(probs[rank:]) for rank in range(len(order))]
        # Rounding decides nothing here.
        assume(all(abs(score - threshold) > 1e-9 for score in scores))
        chosen = [
            e
            for rank, (e, score) in enumerate(zip(order, scores, strict=True))
            if rank == 0 or score > threshold
        ]
    else:
        chosen = order[: int(rule.target_k) - rule.num_shared]
    mass = sum(math.exp(logits[e]) for e in chosen)
    weight = {
        "unit": lambda e: 1.0,
        "softmax": lambda e: math.exp(logits[e]) / mass,
        "sigmoid": lambda e: 1 / (1 + math.exp(-logits[e])),
        "mean": lambda e: 1 / len(chosen),
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


@pytest.mark.parametrize("form", ["cumulative", "threshold"])
def test_a_budget_counts_shared_experts(form):
    logits, mask = normal(40, E), torch.arange(40) % 3 != 0
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
    router.correction.fill_(0.9)
    assert aims([router]) == S + 1


@given(st.integers(0, 99), st.integers(0, 5), st.floats(0, 1))
def test_exploration_swaps_no_shared_expert(seed, num_shared, fraction):
    rule = RoutingRule(selection="top_k", target_k=num_shared + 2.0, num_shared=num_shared)
    logits, zero = normal(20, E, seed=seed), torch.tensor(0.0)
    plain = route(logits, rule, zero)
    tried = route(logits, rule, zero, exploration=Exploration(fraction=fraction, seed=seed))
    assert tried.active[:, :num_shared].all()
    assert torch.equal(tried.active.sum(-1), plain.active.sum(-1))
    # One out, one in, among the others.
    changed = (tried.active != plain.active).sum(-1)
    assert set(changed.tolist()) <= {0, 2}
    assert fraction < 1 or (changed == 2).all()


@pytest.mark.parametrize("weighting", get_args(Weighting))
def test_the_main_loss_leaves_shared_logits_alone(weighting):
    rule = RoutingRule(selection="top_k", weighting=weighting, target_k=5.0, num_shared=S)
    logits = normal(20, E).requires_grad_()
    weights = route(logits, rule, torch.tensor(0.0)).weights
    (weights * normal(20, E, seed=1)).sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad[:, :S], torch.zeros(20, S))
    assert (logits.grad[:, S:] != 0).any(0).all()


TARGETS = ("single", "set", "regress", "member", "helpful", "log")


def taught_bank(path, targets, candidates, *, compiled) -> tuple[ExpertBank, SurpriseTally]:
    """A bank after one backward pass that teaches its gate, and the tally."""
    rule = RoutingRule(selection="top_k", target_k=5.0, num_shared=S)
    bank = ExpertBank(12, E, 3, "silu", rule)
    generator = torch.Generator().manual_seed(0)
    bank.reset(generator, 0.5)
    bank.router.reset(generator, 0.5)
    surprise = "magnitude" if targets == "log" else "gain"
    smk = SmkRule(
        surprise=surprise, direction="max", candidates=candidates, targets=targets, num_targets=3
    )
    tally = SurpriseTally.of_layers(1, E, torch.device("cpu"))[0]
    step = SmkStep(rule=smk, grad_scale=1.0, tally=tally, num_shared=S)
    bank.set_execution(Execution(path=path, compiled=compiled))
    with row_context([bank], [RowState(smk=step)]):
        y = bank(normal(30, 12, seed=2))
        (y * normal(30, 12, seed=3)).sum().backward()
    return bank, tally


def assert_learns_nothing_about_shared_experts(bank: ExpertBank, tally: SurpriseTally) -> None:
    for gate in (bank.router.weight, bank.router.bias):
        assert gate.grad is not None
        assert torch.equal(gate.grad[:S], torch.zeros_like(gate.grad[:S]))
        assert (gate.grad[S:] != 0).any()
    # The shared ones learn as all experts do.
    assert bank.down_proj.grad is not None
    assert (bank.down_proj.grad[:S] != 0).any()
    assert not tally.target_E[:S].any() and not tally.pick_E[:S].any()
    assert (tally.surprise_E != 0).all() and (tally.active_surprise_E[:S] != 0).all()
    assert torch.equal(tally.surprise_E[:S], tally.active_surprise_E[:S])


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize(
    ("path", "candidates"), [("dense", "all"), ("dense", "active"), ("grouped", "active")]
)
def test_a_gate_learns_nothing_about_shared_experts(path, targets, candidates):
    bank, tally = taught_bank(path, targets, candidates, compiled=False)
    assert_learns_nothing_about_shared_experts(bank, tally)


# torch 2.13's inductor warns about torch itself when it is imported.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.compiled
@pytest.mark.parametrize(("path", "candidates"), [("dense", "all"), ("grouped", "active")])
def test_a_compiled_gate_learns_nothing_about_them_either(path, candidates):
    bank, tally = taught_bank(path, "set", candidates, compiled=True)
    assert_learns_nothing_about_shared_experts(bank, tally)
    eager, _ = taught_bank(path, "set", candidates, compiled=False)
    torch.testing.assert_close(bank.router.weight.grad, eager.router.weight.grad)


@pytest.mark.parametrize("candidates", ["active", "all"])
@pytest.mark.parametrize("targets", ["single", "set", "member", "helpful", "regress"])
def test_targets_and_gradient_are_those_of_a_gate_without_them(targets, candidates):
    surprise, logits = normal(40, E), normal(40, E, seed=1)
    active = with_shared(normal(40, E - S, seed=2) > 0, S, value=True)
    mask = torch.arange(40) % 5 != 0
    rule = SmkRule(
        surprise="gain", direction="max", candidates=candidates, targets=targets, num_targets=3
    )

    def taught(num_shared, tables):
        tally = SurpriseTally.of_layers(1, tables[0].shape[1], torch.device("cpu"))[0]
        step = SmkStep(rule=rule, grad_scale=0.5, tally=tally, num_shared=num_shared)
        return teach(step, tables[0], tables[1], tables[2], tables[3], mask), tally

    tables = (surprise, active.float(), logits, active)
    got, tally = taught(S, tables)
    expected, alone = taught(0, [table[:, S:].contiguous() for table in tables])
    assert torch.equal(got, torch.cat((torch.zeros(40, S), expected), dim=1))
    for name in ("num_tokens", "num_targets", "num_agree", "chance"):
        assert torch.equal(getattr(tally, name), getattr(alone, name)), name
    for name in ("surprise_E", "active_surprise_E", "pick_E", "target_E"):
        assert torch.equal(getattr(tally, name)[S:], getattr(alone, name)), name
    if (targets, candidates) == ("single", "all"):
        # Spelled out: the largest gain among those that can be chosen.
        for t in mask.nonzero().flatten().tolist():
            best = max(range(S, E), key=lambda e: surprise[t, e].item())
            target = torch.eye(E)[best, S:]
            torch.testing.assert_close(got[t, S:], 0.5 * (logits[t, S:].softmax(-1) - target))


INITS: tuple[ExpertInit, ...] = ("slices", "importance", "cluster", "coactivation", "learned")


def config_of(init: ExpertInit, **experts: Any) -> RunConfig:
    return change(SHARED, experts={"init": init, **experts})


@pytest.mark.parametrize("init", INITS)
def test_conversion_is_exact_and_shares_the_loudest_neurons(init):
    dense, config = make_dense(), config_of(init)
    validate(config)
    orders = partition(config, MlpInputs(dense, ROWS))
    student = prepare_student(config, MlpInputs(dense, ROWS))
    assert identity_gap(student, dense, make_ids()) < 1e-4
    assert [bank.router.rule.num_shared for bank in student.banks()] == [S, S]
    assert needs_text(config) or init == "slices"
    if orders is None:
        assert init == "slices"
        return
    per_expert = WIDTH // E
    inputs = sample_inputs(MlpInputs(dense, ROWS), 9999)
    for order, mlp, x in zip(orders, gated_mlps(dense), inputs, strict=True):
        assert sorted(order.tolist()) == list(range(WIDTH))
        energy = neuron_energy(mlp, x, torch.nn.SiLU()).sum(0)
        loudest = energy.topk(S * per_expert).indices
        assert set(order[: S * per_expert].tolist()) == set(loudest.tolist())
    # What is left is cut into as many experts as are left, otherwise than by its order.
    assert partition(config_of(init, num_shared=0), MlpInputs(dense, ROWS)) is not None


def test_learned_experts_are_learned_for_the_choices_that_are_left():
    dense, num_shared = make_dense(), S * WIDTH // E
    orders = partition(config_of("learned"), MlpInputs(dense, ROWS))
    assert orders is not None
    differ = False
    for order, mlp, x in zip(
        orders, gated_mlps(dense), sample_inputs(MlpInputs(dense, ROWS), 9999), strict=True
    ):
        rest = order[num_shared:].sort().values
        energy = neuron_energy(mlp, x, torch.nn.SiLU())[:, rest]
        first = by_importance(energy, E - S)
        learned = learn_partition(energy, x, first, E - S, 2.0)
        experts = order[num_shared:].view(E - S, -1)
        assert [set(part.tolist()) for part in experts] == [
            set(rest[learned == e].tolist()) for e in range(E - S)
        ]
        differ |= not torch.equal(learned, learn_partition(energy, x, first, E - S, 4.0))
    assert differ


@pytest.mark.parametrize("init", INITS)
def test_massive_neurons_come_first_when_asked(init, monkeypatch):
    dense = make_dense()
    mlp = gated_mlps(dense)[1]
    x = sample_inputs(MlpInputs(dense, ROWS), 9999)[1]
    # Large at one token only, so that its energy over the text does not put it there.
    quiet = int(neuron_energy(mlp, x, torch.nn.SiLU()).sum(0).argmin())
    found = [
        MassiveActivation(
            layer=1, feature=7, value=500.0, ratio=2e3, first_token=True, neurons=(quiet,)
        )
    ]
    monkeypatch.setattr("tiny_onn.prepare.massive_activations", lambda *_: found)
    config = config_of(init, keep_massive=True)
    validate(config)
    assert needs_text(config)
    orders, plain = (
        partition(config, MlpInputs(dense, ROWS)),
        partition(config_of(init), MlpInputs(dense, ROWS)),
    )
    assert orders is not None
    plain = plain or [torch.arange(WIDTH)] * 2
    assert torch.equal(orders[0], plain[0])
    assert orders[1][0] == quiet
    assert quiet not in plain[1][: S * WIDTH // E]
    assert sorted(orders[1].tolist()) == list(range(WIDTH))
    assert identity_gap(prepare_student(config, MlpInputs(dense, ROWS)), dense, make_ids()) < 1e-4


def test_a_planted_massive_activation_is_kept():
    dense = make_dense()
    seen = []
    mlp = gated_mlps(dense)[1]
    handle = mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    dense(input_ids=ROWS[0].input_ids)
    handle.remove()
    loudest = int(seen[0][0].abs().amax(0).argmax())
    mlp.down_proj.weight[7, loudest] = 1e6
    orders = partition(config_of("slices", keep_massive=True), MlpInputs(dense, ROWS))
    assert orders is not None
    assert massive_activations(MlpInputs(dense, ROWS))[0].neurons[0] == orders[1][0] == loudest


def test_more_massive_neurons_than_shared_ones_are_refused():
    found = [
        MassiveActivation(
            layer=1, feature=0, value=1.0, ratio=1.0, first_token=True, neurons=(4, 2, 9)
        )
    ]
    assert massive_neurons(found, 3, 3) == [(), (4, 2, 9), ()]
    with pytest.raises(UserError, match=r"experts.num_shared: got .* 2 neurons, .* 3.*; raise it"):
        massive_neurons(found, 3, 2)


def test_kept_neurons_come_before_louder_ones():
    score = torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0, 0.0])
    shared, rest = split_neurons(score, (5, 4), 3)
    assert (shared.tolist(), rest.tolist()) == ([5, 4, 1], [0, 2, 3])
    shared, rest = split_neurons(score, (), 0)
    assert (shared.tolist(), rest.tolist()) == ([], [0, 1, 2, 3, 4, 5])
    assert kept_first(torch.tensor([2, 0, 1]), (1,)).tolist() == [1, 2, 0]


REFUSED = [
    ({"num_shared": -1}, {}, "experts.num_shared: got -1, expected an integer >= 0"),
    ({"num_shared": 8}, {"target_k": 8.0}, "experts.num_shared: got 8, expected fewer than"),
    ({"num_shared": 4}, {}, "router.target_k: got 4.0, expected at least 5"),
    ({"num_shared": 4}, {"target_k": 4.9}, "router.target_k: got 4.9, expected at least 5"),
    (
        {"num_shared": 3},
        {"selection": "top_k", "target_k": 3.0},
        "router.target_k: got 3.0, expected at least 4",
    ),
    (
        {"num_shared": 1, "weighting": "mean"},
        {"selection": "top_any", "objective": "task"},
        "experts.num_shared: got 1, expected 0 with router.selection",
    ),
    ({"keep_massive": True}, {}, "experts.keep_massive: got true, expected false with .*= 0: "),
    (
        {"keep_massive": True, "num_shared": 1, "init": "random"},
        {},
        'experts.keep_massive: got true, expected false with experts.init = "random"',
    ),
]


@pytest.mark.parametrize(("experts", "router", "message"), REFUSED)
def test_what_makes_no_sense_is_refused_by_name(experts, router, message):
    with pytest.raises(UserError, match=f"^{message}.*; ") as caught:
        validate(change(CONFIG, experts=experts, router=router))
    assert "\n" not in str(caught.value)


def test_a_students_folder_that_makes_no_sense_is_refused():
    for changes in ({"num_shared": 8}, {"num_shared": -1}):
        with pytest.raises(UserError, match=r"experts.num_shared: got .*, expected 0 to 7 .*;"):
            make_student(make_dense(), target_k=8.0, **changes)
    with pytest.raises(UserError, match=r"router.target_k: got 4, expected 5 to 8"):
        make_student(make_dense(), num_shared=4)


def test_a_saved_student_comes_back_and_an_older_one_has_none(tmp_path):
    student = make_student(make_dense(), num_shared=3)
    student.save_pretrained(tmp_path)
    again = TinyOnnForCausalLM.from_pretrained(tmp_path)
    assert again.banks()[0].router.rule == student.banks()[0].router.rule
    assert again.banks()[0].router.rule.num_shared == 3
    ids = make_ids()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, student(input_ids=ids).logits)
    table = json.loads((tmp_path / "config.json").read_text())
    del table["num_shared"]
    (tmp_path / "config.json").write_text(json.dumps(table))
    older = TinyOnnForCausalLM.from_pretrained(tmp_path)
    assert older.banks()[0].router.rule.num_shared == 0


TRAINED = [
    ({}, {}),
    ({"budget_scope": "global"}, {"candidates": "all", "surprise": "gain", "direction": "max"}),
    ({"balance_rate": 0.01, "revive_after_steps": 1}, {"explore_fraction": 0.5}),
    ({"objective": "regression"}, {}),
    ({"objective": "task"}, {}),
    ({"selection": "top_k", "objective": "task", "z_loss_coef": 0.1}, {}),
]


@pytest.mark.parametrize(("router", "smk"), TRAINED)
def test_training_moves_every_gate_but_those_of_shared_experts(router, smk):
    config = change(SHARED, router=router, smk=smk)
    validate(config)
    dense = make_dense()
    student = prepare_student(config, MlpInputs(dense, ROWS))
    set_objective(student.banks(), config)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    optimizer = build_optimizer(student, config.optim)
    results = [
        distill_step(student, dense, optimizer, ROWS[:2], config, step=step) for step in range(3)
    ]
    settle(student, ROWS, config.router.budget_scope)
    for name, tensor in student.state_dict().items():
        if name.endswith(("router.weight", "router.bias")):
            same = (tensor == before[name]).flatten(1 if tensor.ndim > 1 else 0)
            same = same.all(-1) if tensor.ndim > 1 else same
            assert same.tolist() == [True] * S + [False] * (E - S), name
        if name.endswith("selection_bias") and config.router.balance_rate:
            assert not tensor[:S].any() and tensor[S:].any()
            assert tensor[S:].sum().abs() < 1
        if name.endswith("down_proj"):
            assert (tensor[:S] != before[name][:S]).any()
    stats = results[-1].stats
    assert stats.load_LE[:, :S].eq(stats.num_tokens).all()
    assert evaluate(student, HeldOut(dense, ROWS), config.loss).mean_k == pytest.approx(
        4.0, rel=0.05
    )


def test_statistics_are_about_choices():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-1, 2, (12, E), generator=generator).float()
    active = logits + torch.rand(12, E, generator=generator) > 0.5
    active[:, :S] = True
    rule = RoutingRule(target_k=4.0, num_shared=S)
    bank = ExpertBank(3, E, 2, "silu", rule)
    stats = RoutingStats.zeros([bank])
    stats.add([routing_of(logits, active)], ROW)
    layers, others = stats.layers(), range(S, E)
    load = [sum(int(active[t, e]) for t in COUNTED) for e in others]
    assert stats.counts()["load"] == [[len(COUNTED)] * S + load]
    assert layers["mean_k"] == [pytest.approx(S + sum(load) / len(COUNTED))]
    assert layers["load_entropy"] == [pytest.approx(entropy(load))]
    assert layers["max_load_share"] == [pytest.approx(max(load) / sum(load))]
    gates = [entropy([math.exp(logits[t, e]) for e in others]) for t in COUNTED]
    assert layers["gate_entropy"] == [pytest.approx(sum(gates) / len(COUNTED))]
    ties = 0
    for t in COUNTED:
        on = [float(logits[t, e]) for e in others if active[t, e]]
        off = [float(logits[t, e]) for e in others if not active[t, e]]
        ties += bool(on and off and min(on) == max(off))
    assert layers["tie_rate"] == [ties / len(COUNTED)]
    assert ties > 0


def test_the_oracles_overlap_is_that_of_the_others():
    norms, active = normal(20, E).abs(), normal(20, E, seed=1) > 0
    active[:, :S] = True
    everyone = torch.ones(20, dtype=torch.bool)
    bank = ExpertBank(3, E, 2, "silu", RoutingRule())
    got, alone = OracleStats.zeros([bank]), OracleStats.zeros([bank])
    got.add(0, norms, active, everyone, num_shared=S)
    alone.add(0, norms[:, S:], active[:, S:], everyone)
    for name in ("oracle_overlap", "oracle_chance"):
        assert got.layers()[name] == alone.layers()[name]
    some = [t for t in range(20) if active[t, S:].any()]
    means = [norms[t][active[t]].mean().item() for t in some]
    assert got.layers()["expert_norm"] == [pytest.approx(sum(means) / len(some))]


@pytest.mark.parametrize("form", ["threshold", "cumulative"])
def test_budgets_count_shared_experts_and_stay_above_them(form):
    student = make_student(make_dense(), budget_form=form, num_shared=S)
    with torch.no_grad():
        for bank in student.banks():
            bank.router.weight.mul_(30)
    lengths = [40, 64, 30, 50, 33] * 12
    tabulate(student, make_rows(lengths, 64, seed=1)[:30])
    rows, dense = make_rows(lengths, 64, seed=2)[:30], make_dense()
    for budget in (8.0, 6.0, 4.5, 4.0, 3.0):
        set_budget(student, budget)
        result = evaluate(student, HeldOut(dense, rows), CONFIG.loss)
        assert result.mean_k == pytest.approx(budget, rel=0.05), budget
    assert default_budgets(student) == [8.0, 6.0, 4.0, 3.0]
    for budget in (2.0, 2.9):
        with pytest.raises(
            UserError, match=f"--budget: got {budget:g}, expected 3 to 8, .* the 2 "
        ):
            set_budget(student, budget)


def test_nothing_stands_in_for_a_shared_expert():
    config = config_of("importance", compensation="mean", gate_init="ridge")
    student = prepare_student(config, MlpInputs(make_dense(), ROWS))
    for bank in student.banks():
        assert bank.mean_outputs is not None
        assert not bank.mean_outputs[:S].any()
        assert bank.mean_outputs[S:].any(-1).any()


@pytest.mark.parametrize("weighting", get_args(Weighting))
def test_an_experts_would_be_weight_is_the_one_it_would_have(weighting):
    rule = RoutingRule(selection="top_k", weighting=weighting, target_k=4.0, num_shared=S)
    bank = ExpertBank(3, E, 2, "silu", rule)
    routing = route(normal(9, E), rule, torch.tensor(0.0))
    weights = would_be_weights(routing, bank)
    assert torch.equal(weights[:, :S], torch.ones(9, S))
    torch.testing.assert_close(weights[routing.active], routing.weights[routing.active])
    assert (weights[~routing.active] > 0).all()


def test_the_parts_of_a_table_fit_together():
    table = normal(4, E)
    assert torch.equal(with_shared(routed(table, S), S, 7.0)[:, S:], table[:, S:])
    assert with_shared(routed(table, S), S, 7.0)[:, :S].eq(7).all()
    assert routed(table, 0) is with_shared(table, 0, 1.0) is table
