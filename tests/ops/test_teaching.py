"""The backward pass teaches a gate nothing about shared experts, and the rest as without them."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from tiny import normal
from tiny_onn.model.experts import Execution, ExpertBank, RowState, row_context
from tiny_onn.model.router import RoutingRule
from tiny_onn.ops.router_gradient import RoutingTables, SmkStep, SurpriseTally, router_gradient
from tiny_onn.ops.shared_experts import with_shared
from tiny_onn.ops.surprise import SmkRule

E, S = 8, 2
TARGETS = ("single", "set", "regress", "member", "helpful", "log")


def taught_bank(path, targets, candidates, *, compiled) -> tuple[ExpertBank, SurpriseTally]:
    """Return a bank after one backward pass that teaches its gate, and the tally."""
    rule = RoutingRule(selection="top_k", target_k=5.0, num_shared=S)
    bank = ExpertBank(12, E, 3, "silu", rule)
    generator = torch.Generator().manual_seed(0)
    bank.experts.reset(generator, 0.5)
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
    # Shared experts learn as all experts do.
    assert bank.experts.down_proj.grad is not None
    assert (bank.experts.down_proj.grad[:S] != 0).any()
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


class Tables(NamedTuple):
    """The surprise and the routing of some tokens, each a table of tokens and experts."""

    surprise_TE: torch.Tensor
    weights_TE: torch.Tensor
    logits_TE: torch.Tensor
    active_TE: torch.Tensor

    def without(self, num_shared):
        """Return the tables of a gate that has the other experts alone."""
        return Tables(*(table[:, num_shared:].contiguous() for table in self))


COUNTED_T = torch.arange(40) % 5 != 0


def make_tables():
    """Return random surprise, logits and choices; shared experts are active at every token."""
    active_TE = with_shared(normal(40, E - S, seed=2) > 0, S, value=True)
    return Tables(normal(40, E), active_TE.float(), normal(40, E, seed=1), active_TE)


def rule_of(targets, candidates):
    return SmkRule(
        surprise="gain", direction="max", candidates=candidates, targets=targets, num_targets=3
    )


def taught(rule, tables, num_shared):
    """Return the gradient at the logits, and the tally."""
    num_experts = tables.logits_TE.shape[1]
    tally = SurpriseTally.of_layers(1, num_experts, torch.device("cpu"))[0]
    step = SmkStep(rule=rule, grad_scale=0.5, tally=tally, num_shared=num_shared)
    surprise_TE, weights_TE, logits_TE, active_TE = tables
    routing = RoutingTables(weights_TE, logits_TE, active_TE, COUNTED_T)
    return router_gradient(step, surprise_TE, routing), tally


@pytest.mark.parametrize("candidates", ["active", "all"])
@pytest.mark.parametrize("targets", ["single", "set", "member", "helpful", "regress"])
def test_other_experts_are_taught_as_by_a_gate_without_shared_ones(targets, candidates):
    rule, tables = rule_of(targets, candidates), make_tables()
    got_TE, tally = taught(rule, tables, S)
    expected_TE, alone = taught(rule, tables.without(S), 0)
    assert not got_TE[:, :S].any()
    assert torch.equal(got_TE[:, S:], expected_TE)
    for name in ("num_tokens", "num_targets", "num_agree", "chance"):
        assert torch.equal(getattr(tally, name), getattr(alone, name)), name
    for name in ("surprise_E", "active_surprise_E", "pick_E", "target_E"):
        assert torch.equal(getattr(tally, name)[S:], getattr(alone, name)), name


def test_the_single_target_is_the_largest_gain_among_experts_that_can_be_chosen():
    tables = make_tables()
    got_TE, _ = taught(rule_of("single", "all"), tables, S)
    for token in COUNTED_T.nonzero().flatten().tolist():
        best = max(range(S, E), key=lambda e, t=token: tables.surprise_TE[t, e].item())
        target_E = F.one_hot(torch.tensor(best - S), E - S)
        # The gradient of a cross-entropy is scaled by the step's factor of one half.
        expected_E = 0.5 * (tables.logits_TE[token, S:].softmax(-1) - target_E)
        torch.testing.assert_close(got_TE[token, S:], expected_E)
