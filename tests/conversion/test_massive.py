"""A planted massive activation is found, named and reported; ordinary layers have none."""

import pytest
import torch

from tiny import CONFIG, change, make_dense, make_rows
from tiny_onn.conversion.massive_activations import (
    MassiveActivation,
    massive_activations,
    massive_neurons,
)
from tiny_onn.conversion.pipeline import partition
from tiny_onn.errors import UserError
from tiny_onn.model.backbone import gated_mlps
from tiny_onn.model.hooks import MlpInputs

ROWS = make_rows((20, 13, 30, 9), 40)


def plant(dense, layer, feature, neurons, size):
    mlp = gated_mlps(dense)[layer]
    for neuron, share in neurons.items():
        mlp.down_proj.weight[feature, neuron] = size * share


def loudest_neuron(dense, layer):
    """The neuron whose value at some token of the first row is the layer's largest."""
    seen = []
    projection = gated_mlps(dense)[layer].down_proj
    handle = projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    dense(input_ids=ROWS[0].input_ids)
    handle.remove()
    return int(seen[0][0].abs().amax(0).argmax())


def test_ordinary_layers_have_none():
    assert massive_activations(MlpInputs(make_dense("llama"), ROWS)) == []


def test_a_planted_one_is_found_with_its_neurons():
    dense = make_dense("llama")
    loudest = loudest_neuron(dense, 1)
    plant(dense, 1, 7, {loudest: 1.0}, 1e6)
    (found,) = massive_activations(MlpInputs(dense, ROWS))
    assert (found.layer, found.feature) == (1, 7)
    assert found.neurons[0] == loudest
    assert abs(found.value) > 100
    assert found.ratio > 1000


def test_padding_is_no_text():
    dense = make_dense("llama")
    padded = make_rows((20,), 40)
    # Only padding's token writes: its embedding is far larger than any other.
    plant(dense, 0, 3, dict.fromkeys(range(48), 1.0), 1e3)
    on_text = massive_activations(MlpInputs(dense, padded))
    with torch.no_grad():
        next(iter(dense.get_input_embeddings().parameters()))[0] *= 1e6
    assert massive_activations(MlpInputs(dense, padded)) == on_text


def test_more_massive_neurons_than_shared_ones_are_refused():
    found = [
        MassiveActivation(
            layer=1, feature=0, value=1.0, ratio=1.0, first_token=True, neurons=(4, 2, 9)
        )
    ]
    assert massive_neurons(found, 3, 3) == [(), (4, 2, 9), ()]
    with pytest.raises(UserError, match=r"experts.num_shared: got .* 2 neurons, .* 3.*; raise it"):
        massive_neurons(found, 3, 2)


def test_a_planted_one_comes_first_when_asked():
    dense = make_dense("llama")
    loudest = loudest_neuron(dense, 1)
    plant(dense, 1, 7, {loudest: 1.0}, 1e6)
    config = change(CONFIG, experts={"init": "slices", "num_shared": 2, "keep_massive": True})
    orders = partition(config, MlpInputs(dense, ROWS))
    assert orders is not None
    assert massive_activations(MlpInputs(dense, ROWS))[0].neurons[0] == orders[1][0] == loudest
