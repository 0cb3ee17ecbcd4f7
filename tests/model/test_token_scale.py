"""Weights that depend on the token begin at 1, learn by their true gradient, and are saved."""

import torch
from torch import nn

from tiny import CONFIG, change, make_dense, make_ids, make_rows, make_student, normal
from tiny_onn.conversion.pipeline import make_student as prepared_student
from tiny_onn.conversion.verify import identity_gap
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.step import distill_step
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.student import TinyOnnForCausalLM, split_parameters
from tiny_onn.planning.costs import forward_flops

ROWS = make_rows((20, 13, 30, 60, 9, 40, 17, 22, 33), 64)


def scale_of(bank) -> nn.Parameter:
    """A bank's parameter."""
    assert bank.token_scale is not None
    return bank.token_scale


def test_at_the_start_nothing_changes_and_all_experts_on_is_the_teacher():
    dense, ids = make_dense("llama"), make_ids()
    plain, scaled = (make_student(dense, token_scale=on) for on in (False, True))
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, scaled(input_ids=ids).logits)
    assert identity_gap(scaled, dense, ids) < 1e-4
    assert plain.banks()[0].token_scale is None
    assert scale_of(scaled.banks()[0]).shape == (8, 32)


def test_the_factor_and_its_gradient_are_those_of_the_formula():
    bank = make_student(make_dense("llama"), token_scale=True).banks()[0].train()
    x, pull = normal(9, 32).requires_grad_(), normal(9, 32, seed=1)
    u = scale_of(bank)
    nn.init.normal_(u, std=0.5, generator=torch.Generator().manual_seed(0))
    routing = bank.route(x.detach())
    expected = torch.zeros(9, 32)
    for e in range(8):
        gate, up = bank.experts.gate_up_proj[e].chunk(2)
        out = (bank.activation(x @ gate.T) * (x @ up.T)) @ bank.experts.down_proj[e].T
        factor = routing.weights[:, e].detach() * (1 + (x @ u[e] / x.norm(dim=-1)).tanh())
        expected = expected + factor[:, None] * out
    got = bank(x)
    torch.testing.assert_close(got, expected)
    ours, theirs = (torch.autograd.grad((y * pull).sum(), (x, u)) for y in (got, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_it_learns_with_the_experts_and_is_saved(tmp_path):
    dense = make_dense("llama")
    config = change(CONFIG, experts={"token_scale": True})
    student = prepared_student(config, MlpInputs(dense, ROWS[:2]))
    experts, _ = split_parameters(student)
    assert any(name.endswith("token_scale") for name in experts)
    optimizer = build_optimizer(student, config.optim)
    for step in range(3):
        distill_step(student, dense, optimizer, ROWS[:1], config, step=step)
    assert all(scale_of(bank).any() for bank in student.banks())
    student.train(False).save_pretrained(tmp_path)
    loaded = TinyOnnForCausalLM.from_pretrained(tmp_path)
    for mine, other in zip(student.banks(), loaded.banks(), strict=True):
        assert torch.equal(scale_of(mine), scale_of(other))
    # Its product with the input costs as much as a gate.
    plain = prepared_student(CONFIG, MlpInputs(dense, ROWS[:2]))
    costs = [forward_flops(model, 4.0, 10.0)["ffn_flops"] for model in (plain, student)]
    assert costs[1] - costs[0] == 2 * 2 * 32 * 8
