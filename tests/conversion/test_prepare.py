"""From the dense model to the student: which neurons go to which experts, shared ones first."""

from typing import Any

import pytest
import torch

from tiny import CONFIG, WIDTH, change, make_dense, make_ids, make_rows
from tiny_onn.config.checks import validate
from tiny_onn.config.schema import ExpertInit, RunConfig
from tiny_onn.conversion.massive_activations import MassiveActivation
from tiny_onn.conversion.partition import (
    by_importance,
    learn_partition,
    neuron_energy,
    sample_inputs,
)
from tiny_onn.conversion.pipeline import make_student as prepare_student
from tiny_onn.conversion.pipeline import partition
from tiny_onn.conversion.verify import identity_gap
from tiny_onn.data.rows import needs_text
from tiny_onn.model.backbone import gated_mlps
from tiny_onn.model.hooks import MlpInputs

ROWS = make_rows((20, 13, 30, 64, 9, 40, 17, 22), 64)
E, S = 8, 2
SHARED = change(CONFIG, experts={"num_shared": S}, data={"row_tokens": 64})
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
    monkeypatch.setattr("tiny_onn.conversion.pipeline.massive_activations", lambda *_: found)
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
