"""A planted massive activation is found, named and reported; ordinary layers have none."""

import torch

from tiny import make_dense, make_rows
from tiny_onn.massive import massive_activations
from tiny_onn.mlp_inputs import MlpInputs
from tiny_onn.modeling import gated_mlps

ROWS = make_rows((20, 13, 30, 9), 40)


def plant(dense, layer, feature, neurons, size):
    mlp = gated_mlps(dense)[layer]
    for neuron, share in neurons.items():
        mlp.down_proj.weight[feature, neuron] = size * share


def test_ordinary_layers_have_none():
    assert massive_activations(MlpInputs(make_dense("llama"), ROWS)) == []


def test_a_planted_one_is_found_with_its_neurons():
    dense = make_dense("llama")
    mlp = gated_mlps(dense)[1]
    seen = []
    handle = mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    dense(input_ids=ROWS[0].input_ids)
    handle.remove()
    loudest = int(seen[0][0].abs().amax(0).argmax())
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
