"""The contexts around a bank's calls, and the gates' side of one update."""

from dataclasses import fields

import pytest
import torch

from tiny import CONFIG, change, make_dense, make_rows, make_student
from tiny_onn.conversion import pipeline as prepare
from tiny_onn.distill.checkpointing import checkpoint_layers
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.step import distill_step
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import last_hidden_states
from tiny_onn.model.experts import RowState, recorded_routings, row_context
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.router import RoutingRule, temporary_rules
from tiny_onn.routing.gate_step import GateStep, StepScales
from tiny_onn.routing.statistics import RoutingStats

# Rows of several documents, the last one of them with padding.
ROWS = make_rows((20, 11, 30, 28), 32)
X = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


def banks_of(**changes):
    return make_student(make_dense(), **changes).banks()


def prepared(**sections):
    config, dense = change(CONFIG, **sections), make_dense()
    return prepare.make_student(config, MlpInputs(dense, ROWS)), dense, config


def test_row_contexts_nest_and_end_with_an_exception():
    banks = banks_of()
    outer, inner = (
        [RowState(token_mask=torch.full((5,), value)) for _ in banks] for value in (True, False)
    )
    with row_context(banks, outer):
        with pytest.raises(RuntimeError, match="inside"), row_context(banks, inner):
            assert [bank.row for bank in banks] == inner
            raise RuntimeError("inside")
        assert [bank.row for bank in banks] == outer
    assert [bank.row for bank in banks] == [RowState()] * len(banks)


def test_a_row_context_wants_a_state_for_every_bank():
    banks = banks_of()
    with pytest.raises(ValueError, match="shorter"), row_context(banks, [RowState()]):
        pass
    assert [bank.row for bank in banks] == [RowState()] * len(banks)


def test_recordings_receive_the_calls_inside_them_in_order_and_no_others():
    first, second = banks_of(selection="top_k")
    first(X)
    with recorded_routings([first, second]) as outer:
        second(X)
        with pytest.raises(RuntimeError, match="inside"), recorded_routings([first]) as inner:
            first(X)
            second(X)
            raise RuntimeError("inside")
        first(X)
    second(X)
    wanted = [bank.route(X).active for bank in (second, first, second, first)]
    for got, active in zip(outer, wanted, strict=True):
        assert torch.equal(got.active, active)
    assert [routing is outer[1] for routing in inner] == [True]


@pytest.mark.parametrize("objective", ["task", "smk"])
def test_a_recorded_routing_has_its_graph_only_where_the_gate_learns_from_the_main_loss(objective):
    router = {"objective": objective, "selection": "top_k"}
    student, _, _ = prepared(router=router, experts={"weighting": "softmax"})
    with recorded_routings(student.banks()) as routings:
        last_hidden_states(student, ROWS[0].input_ids)
    for routing in routings:
        assert routing.router_logits.requires_grad == (objective == "task")
        assert routing.weights.requires_grad == (objective == "task")


def test_temporary_rules_nest_and_end_with_an_exception():
    routers = [bank.router for bank in banks_of()]
    own = [router.rule for router in routers]
    rules = [RoutingRule(target_k=2.0), RoutingRule(target_k=3.0)]
    with temporary_rules(routers, rules, annealing=True):
        with (
            pytest.raises(RuntimeError, match="inside"),
            temporary_rules(routers, own),
        ):
            assert not any(router.annealing for router in routers)
            raise RuntimeError("inside")
        assert [router.rule for router in routers] == rules
        assert all(router.annealing for router in routers)
    assert [router.rule for router in routers] == own
    assert not any(router.annealing for router in routers)


GATES = {
    "smk": {"smk": {"candidates": "active", "explore_fraction": 0.5}},
    "window": {
        "router": {"selection": "top_any", "objective": "task", "reseed_every_steps": 9},
        "experts": {"weighting": "mean"},
    },
    "task": {
        "router": {"selection": "top_k", "objective": "task"},
        "experts": {"weighting": "softmax"},
    },
}


@pytest.mark.parametrize("gates", GATES)
def test_what_a_row_says_holds_where_layers_are_computed_again(gates):
    states = {}
    for mode in ("none", "layer", "selective", "offload"):
        student, dense, config = prepared(**GATES[gates])
        checkpoint_layers(student, mode)
        optimizer = build_optimizer(student, config.optim)
        for step in range(2):
            distill_step(student, dense, optimizer, ROWS[:2], config, step=step)
        states[mode] = student.state_dict()
    if gates == "window":
        loads = [value for name, value in states["none"].items() if "window_loads" in name]
        assert all(load.any() for load in loads)
    for mode, state in states.items():
        for name, tensor in state.items():
            assert torch.equal(tensor, states["none"][name]), (mode, name)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_layers_observed_one_by_one_count_as_all_at_once(scope):
    found = []
    for together in (True, False):
        student, _, config = prepared(router={"budget_scope": scope, "revive_after_steps": 1})
        banks = student.banks()
        num_updates = banks[0].router.num_updates.item()
        scales = StepScales.of_rows(
            ROWS[:2], config, 0, banks[0].router.weight.device, labelled=False
        )
        gates = GateStep(banks, config, scales, 0)
        for row in ROWS[:2]:
            with gates.row(row), torch.no_grad(), recorded_routings(banks) as routings:
                last_hidden_states(student, row.input_ids, **packed_kwargs(row))
            for layer in range(1 if together else len(banks)):
                some = routings if together else [routings[layer]]
                gates.observe(some, row, layer)
        gates.finish(updated=True)
        assert banks[0].router.num_updates == num_updates + 1
        found.append((gates.stats, [dict(bank.router.named_buffers()) for bank in banks]))
    (whole, buffers), (parts, others) = found
    for field in fields(RoutingStats):
        ours, theirs = getattr(whole, field.name), getattr(parts, field.name)
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs)), field.name
    for ours, theirs in zip(buffers, others, strict=True):
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name


def test_a_step_that_breaks_in_its_backward_pass_leaves_banks_and_windows_as_they_were():
    student, dense, config = prepared(**GATES["window"])
    banks = student.banks()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    def broken(*_):
        raise RuntimeError("broken")

    optimizer = build_optimizer(student, config.optim)
    with banks[1].register_full_backward_hook(broken), pytest.raises(RuntimeError, match="broken"):
        distill_step(student, dense, optimizer, ROWS[:2], config)
    assert [bank.row for bank in banks] == [RowState()] * len(banks)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in student.parameters())


def test_statistics_of_a_row_want_every_layer():
    banks = banks_of()
    with recorded_routings(banks[:1]) as routings:
        banks[0](torch.randn(ROWS[0].input_ids.numel(), 32))
    with pytest.raises(AssertionError):
        RoutingStats.zeros(banks).add(routings, ROWS[0])
