"""Weights and optimizer states of the old layout arrive in today's, every number as it was."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import CONFIG, change, make_dense, make_ids, make_student
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.model.expert_weights import KINDS, by_neuron, stacked
from tiny_onn.model.old_layout import today_state, today_tensors
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.runs.trained_tensors import optimizer_tensors, student_tensors

pytestmark = pytest.mark.usefixtures("quiet")


def aged(tensors):
    """Return a student's tensors as an earlier version named and shaped them."""
    old = {}
    for name, tensor in tensors.items():
        kind = name.rpartition(".")[2]
        if kind in KINDS:
            old[name.replace(".experts.", ".")] = by_neuron(kind, tensor).contiguous()
        else:
            old[name] = tensor
    return old


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_per_neuron_and_back_moves_every_number(kind):
    shape = (3, 8, 5) if kind == "gate_up_proj" else (3, 5, 4)
    weight = torch.arange(120.0 if kind == "gate_up_proj" else 60.0).view(shape)
    neurons = by_neuron(kind, weight)
    assert neurons.shape == ((2, 3, 4, 5) if kind == "gate_up_proj" else (3, 4, 5))
    assert torch.equal(stacked(kind, neurons), weight)
    if kind == "gate_up_proj":
        assert torch.equal(neurons[1, 2, 3], weight[2, 4 + 3])
    else:
        assert torch.equal(neurons[2, 3], weight[2, :, 3])


@pytest.mark.parametrize("sharded", [False, True])
def test_an_old_student_loads_bit_for_bit_and_is_saved_as_today(sharded, tmp_path):
    student = make_student(make_dense(dtype="bfloat16"), compensation="mean").eval()
    student.save_pretrained(tmp_path / "old", max_shard_size="20KB" if sharded else "5GB")
    files = list((tmp_path / "old").glob("*.safetensors"))
    assert (len(files) > 2) == sharded
    for file in files:
        save_file(aged(load_file(file)), file, metadata={"format": "pt"})
    if sharded:
        index = tmp_path / "old" / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(".mlp.experts.", ".mlp."))
    table = json.loads((tmp_path / "old" / "config.json").read_text())
    table["expert_dim"] = table.pop("moe_intermediate_size")
    del table["auto_map"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(table))
    answer: Any = TinyOnnForCausalLM.from_pretrained(tmp_path / "old", output_loading_info=True)
    loaded, report = answer
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.moe_intermediate_size == loaded.config.expert_dim == 6
    expected = student.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    with torch.no_grad():
        assert torch.equal(loaded.eval()(make_ids()).logits, student(make_ids()).logits)
    loaded.save_pretrained(tmp_path / "new")
    names = load_file(tmp_path / "new" / "model.safetensors").keys()
    assert {name for name in names if ".mlp." in name} == student_tensors(student).keys()
    again = TinyOnnForCausalLM.from_pretrained(tmp_path / "new")
    assert all(map(torch.equal, again.state_dict().values(), loaded.state_dict().values()))


def test_tensors_of_today_are_left_alone():
    tensors = student_tensors(make_student(make_dense()))
    assert today_tensors(tensors) == tensors
    assert today_tensors(aged(tensors)).keys() == tensors.keys()


def trained(name: Any, master_dtype: Any, **sizes: Any):
    """Return a student and its optimizer after two updates."""
    student = make_student(make_dense(**sizes))
    optim = change(CONFIG, optim={"name": name, "master_dtype": master_dtype}).optim
    optimizer = build_optimizer(student, optim, seed=3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for parameter in student.trainable().values():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.grad = drawn.to(parameter.dtype)
        optimizer.step()
    return student, optimizer


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor"])
@pytest.mark.parametrize("master_dtype", ["float32", "bfloat16"])
def test_an_optimizers_old_state_is_moved_and_not_changed(name, master_dtype):
    # Gates and ups have more than the 4,096 elements from which state is quantised, downs fewer.
    student, optimizer = trained(name, master_dtype, intermediate_size=96)
    today = dict(optimizer_tensors(student, optimizer))
    old = {}
    for key, tensor in today.items():
        parameter, _, entry = key.partition("|")
        kind = parameter.rpartition(".")[2]
        moved = kind in KINDS and entry in ("exp_avg", "exp_avg_sq")
        new_key = f"{parameter.replace('.experts.', '.')}|{entry}"
        old[new_key] = by_neuron(kind, tensor).contiguous() if moved else tensor
    back = today_state(old)
    assert back.keys() == today.keys()
    for key, tensor in today.items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key], tensor), key
    shapes = {tuple(t.shape) for key, t in today.items() if "gate_up_proj|" in key and t.ndim > 1}
    assert (
        shapes
        == {
            "adamw": {(8, 24, 32)},
            "adamw8bit": {(2, 8, 12, 32)},
            "adafactor": {(2, 8, 12), (2, 8, 32)},
        }[name]
    )


@pytest.mark.parametrize("name", ["adamw8bit", "adafactor"])
@pytest.mark.parametrize("master_dtype", ["float32", "bfloat16"])
def test_such_an_optimizer_steps_as_if_weights_were_stored_by_neuron(name, master_dtype):
    student, _ = trained(name, master_dtype, intermediate_size=96)
    plain = make_student(make_dense(intermediate_size=96))
    parts: dict[str, torch.nn.Parameter] = {}
    for key, parameter in plain.trainable().items():
        kind = key.rpartition(".")[2]
        if kind in KINDS:
            parts[key] = torch.nn.Parameter(by_neuron(kind, parameter.detach()).contiguous())
    holder: Any = plain
    holder.trainable = lambda: {
        key: parts.get(key, parameter) for key, parameter in type(plain).trainable(plain).items()
    }
    optim = change(CONFIG, optim={"name": name, "master_dtype": master_dtype}).optim
    # These weights have another name, so that they are stepped as they are.
    optimizer = build_optimizer(holder, optim, seed=3)
    optimizer._kinds = {}  # pyright: ignore[reportAttributeAccessIssue]
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for key, parameter in holder.trainable().items():
            kind = key.rpartition(".")[2]
            shape = student.get_parameter(key).shape
            drawn = torch.randn(shape, generator=generator).to(parameter.dtype)
            parameter.grad = by_neuron(kind, drawn).contiguous() if kind in KINDS else drawn
        optimizer.step()
    for key, part in parts.items():
        kind = key.rpartition(".")[2]
        assert torch.equal(stacked(kind, part.detach()), student.get_parameter(key)), key
