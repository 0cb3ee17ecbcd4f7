"""A net gain counts what an expert takes away by being active: its mean output."""

from dataclasses import replace

import pytest
import torch

from tiny import CONFIG, change, make_dense, make_rows, normal
from tiny_onn.conversion.pipeline import make_student
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.step import distill_step
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.ops import dense_masked
from tiny_onn.ops.router_gradient import SmkStep
from tiny_onn.ops.surprise import SmkRule

T, D, E, I = 11, 6, 5, 3
RULE = SmkRule(surprise="gain", direction="max", candidates="all", targets="single")


@pytest.mark.parametrize("chunk_tokens", [0, 4])
def test_it_is_the_gradient_along_the_difference_of_the_two_outputs(chunk_tokens):
    x, pull = normal(T, D, dtype=torch.float64), normal(T, D, seed=1, dtype=torch.float64)
    gate_up, down = normal(E, 2 * I, D, seed=2), normal(E, D, I, seed=3)
    gate_up, down = gate_up.double(), down.double()
    means = normal(E, D, seed=4, dtype=torch.float64)
    weights = (normal(T, E, seed=5) > 0).double()
    logits = normal(T, E, seed=6, dtype=torch.float64).requires_grad_()
    captured: list[torch.Tensor] = []
    step = SmkStep(rule=RULE, grad_scale=1.0, capture=captured)
    for smk in (step, replace(step, mean_outputs_ED=means)):
        y = dense_masked.expert_layer(
            x, gate_up, down, weights, logits,
            activation=torch.tanh, smk=smk, chunk_tokens=chunk_tokens,
        )  # fmt: skip
        (y * pull).sum().backward()
    gain, net_gain = captured
    for e in range(E):
        gate, up = gate_up[e].chunk(2)
        output = (torch.tanh(x @ gate.T) * (x @ up.T)) @ down[e].T
        torch.testing.assert_close(gain[:, e], -(output * pull).sum(-1))
        torch.testing.assert_close(net_gain[:, e], -((output - means[e]) * pull).sum(-1))


def test_it_changes_what_the_gate_learns_and_nothing_else():
    dense, rows = make_dense("llama"), make_rows((20, 13, 30, 60, 9, 40), 64)
    found = []
    for net_gain in (False, True):
        config = change(
            CONFIG,
            experts={"compensation": "mean", "gate_init": "ridge"},
            smk={"surprise": "gain", "direction": "max", "candidates": "all", "net_gain": net_gain},
        )
        student = make_student(config, MlpInputs(dense, rows[:2]))
        distill_step(student, dense, build_optimizer(student, config.optim), rows[:1], config)
        found.append(student.trainable())
    for name, plain in found[0].items():
        assert torch.equal(plain, found[1][name]) == (".router." not in name), name
