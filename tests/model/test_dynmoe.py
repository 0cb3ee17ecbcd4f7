"""The top-any gate against the paper's equations, one token and one expert at a time."""

import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from tiny import CONFIG, change, make_dense, make_rows
from tiny_onn.config.schema import AtLeastOne, Weighting
from tiny_onn.conversion import pipeline as prepare
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.step import distill_step
from tiny_onn.model import dynmoe
from tiny_onn.model.experts import Execution, ExpertBank, recorded_routings
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.router import Router, RoutingRule

HIDDEN, EXPERTS, WIDTH, TOKENS = 12, 6, 5, 30
GATE = ("weight", "bias", "log_temperature")


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def make_bank(
    weighting: Weighting = "mean",
    at_least_one: AtLeastOne = "evaluation",
    raised=0.0,
    path: Literal["dense", "grouped"] = "dense",
):
    rule = RoutingRule(selection="top_any", weighting=weighting, at_least_one=at_least_one)
    bank = ExpertBank(HIDDEN, EXPERTS, WIDTH, "silu", rule)
    generator = torch.Generator().manual_seed(0)
    bank.experts.reset(generator, 0.5)
    bank.router.reset(generator)
    with torch.no_grad():
        bank.router.bias.copy_(normal(EXPERTS, seed=4, scale=0.1) + raised)
    bank.set_execution(Execution(coupled=True, path=path))
    return bank


class Straight(torch.autograd.Function):
    """The sign, whose gradient is copied through."""

    @staticmethod
    def forward(ctx, x):  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.sign(x)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


def paper(bank, x_TD, *, training, at_least_one=False, mean=True):
    """Return outputs and active experts, by loops that follow the equations."""
    w, g = bank.router.weight, bank.router.bias
    tau = bank.router.log_temperature.exp()[0]
    rows, chosen = [], []
    for x in x_TD:
        similar = [x @ w[e] / (x.norm() * w[e].norm()) for e in range(EXPERTS)]
        gaps = [torch.sigmoid(tau * s) - torch.sigmoid(tau * g[e]) for e, s in enumerate(similar)]
        active = {e for e in range(EXPERTS) if gaps[e] > 0}
        gates = {e: Straight.apply(torch.relu(gaps[e])) for e in active}
        if not active and not training:
            gates = {max(range(EXPERTS), key=lambda e: similar[e].item()): torch.tensor(1.0)}
        elif not active and at_least_one:
            nearest = max(range(EXPERTS), key=lambda e: similar[e].item())
            # The paper has no such expert: our gradient passes straight through it too.
            gates = {nearest: 1 + gaps[nearest] - gaps[nearest].detach()}
        y = torch.zeros(HIDDEN)
        for e, gate in gates.items():
            gate_proj, up_proj = bank.experts.gate_up_proj[e].chunk(2)
            hidden = F.silu(gate_proj @ x) * (up_proj @ x)
            y = y + gate * (bank.experts.down_proj[e] @ hidden) / (len(gates) if mean else 1)
        rows.append(y)
        chosen.append(set(gates))
    return torch.stack(rows), chosen


def gradients(y, bank, x):
    parameters = [getattr(bank.router, name) for name in GATE]
    inputs = [x, bank.experts.gate_up_proj, bank.experts.down_proj, *parameters]
    pull = normal(*y.shape, seed=9)
    return torch.autograd.grad((y * pull).sum(), inputs, allow_unused=True)


@pytest.mark.parametrize("weighting", ["mean", "unit"])
@pytest.mark.parametrize("at_least_one", ["evaluation", "always"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("path", ["dense", "grouped"])
def test_outputs_and_all_gradients_equal_the_papers(weighting, at_least_one, training, path):
    # The thresholds are so high that some tokens pass none.
    bank = make_bank(weighting, at_least_one, raised=0.3, path=path)
    bank.train(training)
    x = normal(TOKENS, HIDDEN, seed=1).requires_grad_()
    expected, chosen = paper(
        bank,
        x,
        training=training,
        at_least_one=at_least_one == "always",
        mean=weighting == "mean",
    )
    with recorded_routings([bank]) as routings:
        got = bank(x)
    active = [set(row.nonzero().flatten().tolist()) for row in routings[0].active]
    assert active == chosen
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    none = sum(not some for some in chosen)
    assert (none > 3) == (training and at_least_one == "evaluation")
    if training:
        pairs = zip(gradients(got, bank, x), gradients(expected, bank, x), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
            assert theirs.any()


def test_a_token_that_passes_no_threshold_gets_nothing_in_training_and_one_at_evaluation():
    bank = make_bank(raised=1.1)
    x = normal(TOKENS, HIDDEN, seed=1)
    assert not bank(x).any()
    bank.train(False)
    with recorded_routings([bank]) as routings:
        y = bank(x)
    assert (routings[0].active.sum(-1) == 1).all()
    assert y.any(-1).all()


def test_the_loss_is_the_papers():
    w = normal(EXPERTS, HIDDEN)
    total = 0.0
    for one in range(EXPERTS):
        for other in range(EXPERTS):
            cosine = w[one] @ w[other] / (w[one].norm() * w[other].norm())
            total += (cosine.item() - (one == other)) ** 2
    expected = math.sqrt(total) + sum(row.norm().item() for row in w) / EXPERTS
    assert dynmoe.diversity_and_simplicity(w).item() == pytest.approx(expected, rel=1e-5)


def test_the_gate_starts_with_orthogonal_unit_prototypes_and_half_of_the_experts():
    router = Router(64, 32, RoutingRule(selection="top_any"))
    router.reset(torch.Generator().manual_seed(0))
    torch.testing.assert_close(router.weight @ router.weight.T, torch.eye(32), atol=1e-5, rtol=0)
    active = router(normal(500, 64)).active
    assert active.float().sum(-1).mean().item() == pytest.approx(16, rel=0.1)
    more = dynmoe.orthogonal_prototypes(7, 3, torch.Generator())
    torch.testing.assert_close(more.norm(dim=-1), torch.ones(7))


def test_the_temperature_stops_at_a_hundred():
    assert dynmoe.temperature(torch.tensor([9.0])).item() == pytest.approx(100)
    assert dynmoe.temperature(torch.tensor([0.5])).item() == pytest.approx(math.exp(0.5))


def test_reseeding_replaces_the_first_unused_expert_by_the_mean_of_idle_inputs():
    w, g, idle = normal(4, HIDDEN), torch.tensor([0.1, 0.2, 0.3, 0.4]), normal(HIDDEN, seed=3)
    new_w, new_g = dynmoe.reseed(w, g, torch.tensor([5.0, 0.0, 2.0, 0.0]), idle)
    torch.testing.assert_close(new_w[1], idle / idle.norm())
    assert new_g.tolist() == pytest.approx([0.1, 0.0, 0.3, 0.4])
    assert torch.equal(new_w[[0, 2, 3]], w[[0, 2, 3]])
    for loads, inputs in (([1.0] * 4, idle), ([0.0] * 4, torch.zeros(HIDDEN))):
        same_w, same_g = dynmoe.reseed(w, g, torch.tensor(loads), inputs)
        assert torch.equal(same_w, w)
        assert torch.equal(same_g, g)


def test_a_dead_expert_is_used_again_after_the_window():
    rows = make_rows((30, 20, 31, 28), 32)
    router = {"selection": "top_any", "objective": "task", "reseed_every_steps": 2}
    config = change(CONFIG, experts={"weighting": "mean"}, router=router, optim={"gate_lr": 0.0})
    dense = make_dense("llama")
    student = prepare.make_student(config, MlpInputs(dense, rows))
    optimizer = build_optimizer(student, config.optim)
    banks = student.banks()
    with torch.no_grad():
        for bank in banks:
            # No token can use one expert, and the others are so strict that some tokens use none.
            bank.router.bias.fill_(0.25)
            bank.router.bias[3] = 2.0
    loads = []
    for step in range(3):
        result = distill_step(student, dense, optimizer, [rows[step]], config, step=step)
        loads.append(result.stats.load_LE[:, 3])
        if step == 0:
            assert all(bank.router.idle_input.any() for bank in banks)
    assert not loads[0].any()
    assert not loads[1].any()
    for bank in banks:
        assert bank.router.bias[3] == 0
        assert bank.router.weight[3].norm().item() == pytest.approx(1)
    assert (loads[2] > 0).all()
