"""Muon: orthogonal steps, against singular vectors and against torch's Muon matrix by matrix."""

import pytest
import torch
from torch import nn

from tiny import make_dense, make_student
from tiny_onn.config.schema import OptimConfig
from tiny_onn.distill import muon
from tiny_onn.distill.muon import STEP_RMS, orthogonal
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.model.expert_weights import by_neuron


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 3, 8, 32), (3, 32, 8), (1, 8, 8)])
def test_a_step_has_the_gradients_singular_vectors_and_values_near_1(shape):
    gradient = randn(*shape)
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    values = u.mT @ orthogonal(gradient) @ vh.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    assert 0.6 < diagonal.min() < diagonal.max() < 1.25
    torch.testing.assert_close(values, torch.diag_embed(diagonal), rtol=0, atol=1e-5)


def by_definition(matrix):
    """Newton-Schulz iterations of Jordan et al. in float64, on the matrix itself."""
    a, b, c = muon.QUINTIC
    x = matrix.double() / matrix.double().norm()
    for _ in range(sum(muon.MUON_ITERATIONS)):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(8, 32), (48, 576), (576, 48), (64, 64)])
@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-4, 1e-7])
def test_steps_are_those_of_the_iteration_by_its_definition(shape, smallest):
    u, values, vh = torch.linalg.svd(randn(*shape), full_matrices=False)
    values = torch.logspace(0, torch.tensor(smallest).log10().item(), len(values))
    gradient = (u * values) @ vh
    expected = by_definition(gradient)
    assert (orthogonal(gradient[None])[0] - expected).norm() < 1e-4 * expected.norm()


def test_gradients_far_below_and_above_1_give_finite_steps():
    gradient = randn(8, 32)[None] * torch.tensor([1e-44, 1e-25, 1e-6, 1.0, 1e15])[:, None, None]
    step = orthogonal(gradient)
    assert step.isfinite().all()
    torch.testing.assert_close(step[2], step[3], rtol=1e-4, atol=1e-5)
    assert not orthogonal(torch.zeros(2, 8, 32)).any()


def test_experts_step_as_by_torchs_muon_each_matrix_alone():
    student = make_student(make_dense(hidden_size=32, intermediate_size=32), num_experts=4)
    config = OptimConfig(name="muon", expert_lr=1e-2, weight_decay=0.1, beta1=0.8)
    optimizer = build_optimizer(student, config)
    learning = {n: p for n, p in student.trainable().items() if n.endswith("_proj")}
    # gate, up and down matrices of every expert of every layer
    matrices = {
        name: [
            nn.Parameter(matrix.clone())
            for matrix in by_neuron(name.split(".")[-1], p.detach()).flatten(0, -3)
        ]
        for name, p in learning.items()
    }
    start = {name: p.detach().clone() for name, p in learning.items()}
    # Its steps have half of the size, so that its rate is twice and its decay half of ours.
    peer = torch.optim.Muon(
        [matrix for each in matrices.values() for matrix in each],
        lr=1e-2 * STEP_RMS / 0.2,
        weight_decay=0.1 * 0.2 / STEP_RMS,
        momentum=0.8,
        adjust_lr_fn="match_rms_adamw",
    )
    for step in range(3):
        for number, (name, p) in enumerate(learning.items()):
            p.grad = randn(*p.shape, seed=10 * step + number)
            neurons = by_neuron(name.split(".")[-1], p.grad).flatten(0, -3)
            for matrix, gradient in zip(matrices[name], neurons, strict=True):
                matrix.grad = gradient.clone()
        optimizer.step()
        peer.step()
    assert learning
    for name, p in learning.items():
        kind = name.split(".")[-1]
        way = by_neuron(kind, p.detach() - start[name]).flatten(0, -3)
        expected = torch.stack([*matrices[name]]) - by_neuron(kind, start[name]).flatten(0, -3)
        # Torch's iteration is in bfloat16.
        assert (way - expected).norm() < 0.02 * expected.norm(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_step_together_as_one_by_one(monkeypatch, dtype):
    def stepped():
        student = make_student(make_dense(num_hidden_layers=3), compensation="mean")
        optimizer = build_optimizer(student, OptimConfig(name="muon", master_dtype=dtype))
        for number, p in enumerate(student.trainable().values()):
            p.grad = randn(*p.shape, seed=number).to(p.dtype)
        optimizer.step()
        return student.trainable()

    together = stepped()
    monkeypatch.setattr(muon, "MUON_ELEMENTS", {"cpu": 1})
    alone = stepped()
    assert all(torch.equal(together[name], p) for name, p in alone.items())


def unit_by_rows(optimizer, p):
    """A weight's unit as a factor of its rows, of which gates are an expert's first half."""
    unit = optimizer.unit(p)
    assert unit is not None
    return unit.repeat_interleave(p.shape[1] // 2)[:, None] if unit.ndim else unit


def test_units_step_as_weights_divided_and_gradients_multiplied_by_them():
    students = [make_student(make_dense(), num_experts=4) for _ in range(2)]
    ours, by_hand = (
        build_optimizer(
            student, OptimConfig(name="muon", weight_decay=0.1, expert_lr=0.01, lr_scale=scale)
        )
        for student, scale in zip(students, ("rms", "absolute"), strict=True)
    )
    learning = (
        [p for name, p in student.trainable().items() if name.endswith("_proj")]
        for student in students
    )
    pairs = [*zip(*learning, strict=True)]
    for step in range(3):
        for number, (p, q) in enumerate(pairs):
            p.grad = randn(*p.shape, seed=10 * step + number)
            q.grad = p.grad * unit_by_rows(ours, p)
            q.data /= unit_by_rows(ours, p)
        for optimizer in (ours, by_hand):
            optimizer.step()
        for p, q in pairs:
            q.data *= unit_by_rows(ours, p)
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_vectors_of_experts_are_stepped_by_adamw():
    dense = make_dense("llama")
    students = [make_student(dense, compensation="mean") for _ in range(2)]
    for student, name in zip(students, ("muon", "adamw"), strict=True):
        optimizer = build_optimizer(student, OptimConfig(name=name))
        for number, p in enumerate(student.trainable().values()):
            p.grad = randn(*p.shape, seed=number)
        optimizer.step()
    muon_, adamw = (student.trainable() for student in students)
    same = {name for name, p in muon_.items() if torch.equal(p, adamw[name])}
    # Only matrices of experts differ.
    assert {n.split(".")[-1] for n in muon_.keys() - same} == {"gate_up_proj", "down_proj"}
    assert any(name.endswith("mean_outputs") for name in same)


def test_an_expert_without_a_gradient_stays():
    student = make_student(make_dense(), num_experts=4)
    optimizer = build_optimizer(student, OptimConfig(name="muon"))
    experts = student.banks()[0].experts
    for used in (4, 3):
        before = {name: p.detach().clone() for name, p in experts.named_parameters()}
        for number, p in enumerate(experts.parameters()):
            p.grad = randn(*p.shape, seed=number)
            p.grad[used:] = 0
        optimizer.step()
        for name, p in experts.named_parameters():
            moved = (p.detach() != before[name]).flatten(1).any(1)
            assert moved.tolist() == [True] * used + [False] * (4 - used), name


def test_large_weights_are_stepped_some_experts_at_a_time(monkeypatch):
    sizes = []
    monkeypatch.setattr(muon, "orthogonal", lambda m: sizes.append(len(m)) or orthogonal(m))
    student = make_student(make_dense(num_hidden_layers=2, intermediate_size=40), num_experts=5)
    for number, p in enumerate(student.trainable().values()):
        p.grad = randn(*p.shape, seed=number)
    down = student.banks()[0].experts.down_proj
    monkeypatch.setattr(muon, "MUON_ELEMENTS", {"cpu": 4 * down[0].numel()})
    build_optimizer(student, OptimConfig(name="muon")).step()
    # Two experts of gate_up_proj or four of down_proj at a time, in two layers.
    assert sizes == [2, 2, 1, 2, 2, 1, 4, 1, 4, 1]
