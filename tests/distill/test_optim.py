"""Optimizers: what they compute, what they remember, and that a checkpoint restores all of it."""

import sys
from typing import Any, get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tiny import make_dense, make_student, save_checkpoint
from tiny_onn.config.schema import OptimConfig
from tiny_onn.distill.clipping import clip_gradients
from tiny_onn.distill.optim import (
    build_optimizer,
    stochastic_round,
)
from tiny_onn.distill.schedule import lr_factor, set_learning_rates
from tiny_onn.errors import UserError
from tiny_onn.model.expert_weights import by_neuron
from tiny_onn.model.student import split_parameters
from tiny_onn.planning.optimizer_state import state_bytes
from tiny_onn.runs.checkpoint import load_checkpoint

NAMES = get_args(get_type_hints(OptimConfig)["name"])
FORMATS = get_args(get_type_hints(OptimConfig)["master_dtype"])
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ("cpu", CUDA) if torch.cuda.is_available() else ("cpu",)
each_name = pytest.mark.parametrize("name", NAMES)
each_format = pytest.mark.parametrize("master_dtype", FORMATS)


@pytest.fixture(scope="module")
def dense():
    # Sizes at which the gate's weight (32 x 128), too, is large enough for 8-bit state.
    return make_dense(hidden_size=128, intermediate_size=64, num_hidden_layers=1)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def student(dense, device):
    return make_student(dense, num_experts=32, target_k=16.0).to(device)


def fill_gradients(student, step, scale=1.0):
    """Gradients that depend on the step and the parameter alone."""
    for number, parameter in enumerate(student.trainable().values()):
        generator = torch.Generator().manual_seed(1000 * step + number)
        gradient = torch.randn(parameter.shape, generator=generator) * scale
        parameter.grad = gradient.to(parameter)


def take_steps(student, optimizer, steps):
    """One update per step number, each with its own gradients and learning rates."""
    for step in steps:
        fill_gradients(student, step)
        set_learning_rates(optimizer, lr_factor((step + 1) / 8, OptimConfig()))
        optimizer.step()
        optimizer.zero_grad()


def snapshot(student, optimizer):
    """Every number that training changed, by name."""
    found = {name: p.detach().clone() for name, p in student.trainable().items()}
    for name, parameter in student.trainable().items():
        for entry, value in optimizer.state[parameter].items():
            found[f"{name}|{entry}"] = torch.as_tensor(value).clone()
    return found


def assert_same(left, right):
    """Equal names, number formats and bits."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        if not name.endswith("step"):
            assert value.dtype == right[name].dtype, name
        assert torch.equal(value, right[name]), name


def twin(dense):
    """Another student, where the first one took the dense model's tensors."""
    return make_student(dense, num_experts=32, target_k=16.0, seed=1)


@each_name
@each_format
def test_a_checkpoint_goes_on_bit_for_bit(dense, student, tmp_path, name, master_dtype):
    config = OptimConfig(name=name, master_dtype=master_dtype, weight_decay=0.1)
    optimizer = build_optimizer(student, config, seed=3)
    take_steps(student, optimizer, range(3))
    save_checkpoint(tmp_path, 3, student, optimizer, {})
    take_steps(student, optimizer, range(3, 6))

    resumed = twin(dense)
    resumed_optimizer = build_optimizer(resumed, config, seed=3)
    assert load_checkpoint(tmp_path, resumed, resumed_optimizer) == {}
    take_steps(resumed, resumed_optimizer, range(3, 6))
    assert_same(snapshot(student, optimizer), snapshot(resumed, resumed_optimizer))


@each_name
@each_format
def test_a_state_dict_goes_on_bit_for_bit(dense, student, name, master_dtype):
    config = OptimConfig(name=name, master_dtype=master_dtype)
    optimizer = build_optimizer(student, config)
    take_steps(student, optimizer, range(2))
    resumed = twin(dense)
    resumed_optimizer = build_optimizer(resumed, config)
    resumed.load_state_dict(student.state_dict())
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    groups = zip(resumed_optimizer.param_groups, optimizer.param_groups, strict=True)
    assert all(resumed["lr"] == group["lr"] for resumed, group in groups)
    for each, its_optimizer in ((student, optimizer), (resumed, resumed_optimizer)):
        take_steps(each, its_optimizer, range(2, 4))
    assert_same(snapshot(student, optimizer), snapshot(resumed, resumed_optimizer))


def test_adamw_is_torchs_for_each_system(dense, student):
    config = OptimConfig(weight_decay=0.1, gate_weight_decay=0.3, expert_lr=1e-2, gate_lr=3e-2)
    optimizer = build_optimizer(student, config)
    reference = twin(dense)
    reference.load_state_dict(student.state_dict())
    experts, gates = split_parameters(reference)
    shared: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.eps}
    references = [
        torch.optim.AdamW(experts.values(), lr=1e-2, weight_decay=0.1, fused=True, **shared),
        torch.optim.AdamW(gates.values(), lr=3e-2, weight_decay=0.3, fused=True, **shared),
    ]
    for step in range(3):
        for each in (student, reference):
            fill_gradients(each, step)
        optimizer.step()
        for one in references:
            one.step()
    for name, parameter in student.trainable().items():
        assert torch.equal(parameter, reference.trainable()[name]), name


@each_name
@each_format
def test_every_optimizer_finds_a_minimum(student, name, master_dtype):
    # Half the squared distance to a target: the gradient is the distance.
    config = OptimConfig(name=name, master_dtype=master_dtype, expert_lr=0.02, gate_lr=0.02)
    optimizer = build_optimizer(student, config)
    parameters = student.trainable()
    targets = {key: p.detach().float() + 0.2 * p.sign() for key, p in parameters.items()}
    for step in range(60):
        set_learning_rates(optimizer, lr_factor((step + 0.5) / 60, config))
        for key, parameter in parameters.items():
            parameter.grad = (parameter.detach() - targets[key]).to(parameter.dtype)
        optimizer.step()
    for key, parameter in parameters.items():
        moved = targets[key] - parameter.detach().float()
        assert moved.square().mean().sqrt() < 0.02, key


def test_eight_bit_state_stays_near_32_bit_state(dense, student):
    # Relative difference of the weights' way after 4 steps. Measured: 0.009.
    other = twin(dense)
    other.load_state_dict(student.state_dict())
    start = {name: p.detach().clone() for name, p in student.trainable().items()}
    configs = OptimConfig(name="adamw"), OptimConfig(name="adamw8bit")
    for each, config in zip((student, other), configs, strict=True):
        take_steps(each, build_optimizer(each, config), range(4))
    for name, parameter in split_parameters(student)[0].items():
        exact, eight_bit = parameter - start[name], other.trainable()[name] - start[name]
        assert (eight_bit - exact).norm() < 0.03 * exact.norm(), name


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
@each_format
def test_eight_bit_state_is_for_large_expert_tensors_only(device, name, master_dtype):
    # gate_up has 6,144 elements, down 3,072, the gate's weight 4,128.
    dense = make_dense(hidden_size=32, intermediate_size=96, num_hidden_layers=1)
    student = make_student(dense, num_experts=96, expert_dim=1, target_k=16.0)
    student.banks()[0].router.weight = nn.Parameter(torch.zeros(96, 43))
    student.to(device)
    optimizer = build_optimizer(student, OptimConfig(name=name, master_dtype=master_dtype))
    take_steps(student, optimizer, range(1))
    for key, parameter in student.trainable().items():
        state = optimizer.state[parameter]
        tensors = [value for value in state.values() if torch.is_tensor(value)]
        moments = {tensor.dtype for tensor in tensors if tensor.numel() == parameter.numel()}
        assert moments == {torch.uint8 if "gate_up" in key else torch.float32}, key


@each_name
@each_format
def test_state_takes_the_bytes_that_are_stated(student, name, master_dtype):
    optimizer = build_optimizer(student, OptimConfig(name=name, master_dtype=master_dtype))
    take_steps(student, optimizer, range(2))
    for key, parameter in split_parameters(student)[0].items():
        tensors = [v for v in optimizer.state[parameter].values() if torch.is_tensor(v) and v.ndim]
        shape = by_neuron(key.split(".")[-1], parameter).shape
        assert sum(tensor.nbytes for tensor in tensors) == state_bytes(name, shape), key


def test_state_of_a_full_size_layer():
    # One layer of the card's model: 32 experts of 96 neurons, hidden 1024.
    shape = (2, 32, 96, 1024)
    size = 2 * 32 * 96 * 1024
    per_parameter = {name: state_bytes(name, shape) / size for name in NAMES}
    assert per_parameter["adamw"] == 8
    assert per_parameter["adamw8bit"] == per_parameter["paged_adamw8bit"] < 2.04
    assert per_parameter["adafactor"] < 0.05


def test_experts_are_cast_and_gates_are_not(student):
    build_optimizer(student, OptimConfig(master_dtype="bfloat16"))
    experts, gates = split_parameters(student)
    assert {p.dtype for p in experts.values()} == {torch.bfloat16}
    assert {p.dtype for p in gates.values()} == {torch.float32}


@each_name
def test_bfloat16_weights_gather_updates_that_rounding_to_nearest_loses(student, name):
    # A step of Muon along equal gradients is a fifth of its rate.
    rate = 5e-4 if name == "muon" else 1e-4
    ways = []
    for dtype in FORMATS:
        config = OptimConfig(name=name, master_dtype=dtype, expert_lr=rate)
        optimizer = build_optimizer(student, config)
        down = student.banks()[0].experts.down_proj
        with torch.no_grad():
            down.fill_(1.0)
        for _ in range(20):
            down.grad = torch.ones_like(down)
            optimizer.step()
        ways.append((1 - down.detach().float()).mean().item())
    exact, rounded = ways
    assert FORMATS == ("float32", "bfloat16")
    assert exact == pytest.approx(2e-3, rel=0.1)
    assert torch.tensor(1 - 1e-4).bfloat16() == 1
    # The mean of 8,192 sums of 20 draws, 1e-4 each on average, has a standard error of 1.6 %.
    assert rounded == pytest.approx(exact, rel=0.05)


def test_rounding_depends_on_the_seed_alone(dense, device):
    def train(seed):
        student = twin(dense).to(device)
        optimizer = build_optimizer(student, OptimConfig(master_dtype="bfloat16"), seed=seed)
        take_steps(student, optimizer, range(2))
        return student.banks()[0].experts.down_proj.detach()

    torch.manual_seed(0)
    first = train(0)
    torch.manual_seed(1)
    assert torch.equal(train(0), first)
    assert not torch.equal(train(1), first)


def test_parameters_without_a_gradient_stay(student):
    optimizer = build_optimizer(student, OptimConfig(weight_decay=0.1))
    bank = student.banks()[0]
    before = bank.experts.down_proj.detach().clone()
    bank.experts.gate_up_proj.grad = torch.ones_like(bank.experts.gate_up_proj)
    optimizer.step()
    assert torch.equal(bank.experts.down_proj, before)
    assert bank.experts.down_proj not in optimizer.state


def test_a_frozen_gate_has_no_group(student):
    student.banks()[0].router.requires_grad_(False)
    optimizer = build_optimizer(student, OptimConfig())
    assert [group["system"] for group in optimizer.param_groups] == ["experts"]
    fill_gradients(student, 0)
    assert float(clip_gradients(student, 1.0)[0]) > 0


def test_a_closure_gives_the_loss(student):
    optimizer = build_optimizer(student, OptimConfig())
    down = student.banks()[0].experts.down_proj

    def closure():
        loss = down.square().sum()
        loss.backward()
        return loss

    before = down.detach().square().sum()
    assert optimizer.step(closure) == before  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert down.detach().square().sum() < before


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_a_missing_bitsandbytes_names_its_remedy(student, monkeypatch, name):
    # None in sys.modules is Python's own way to make an import fail.
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=rf'^optim.name = "{name}".*pip install bitsandbytes$'):
        build_optimizer(student, OptimConfig(name=name))
    build_optimizer(student, OptimConfig())


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=50)
@given(st.lists(FINITE, min_size=1, max_size=20), st.integers(0, 2**32))
def test_rounding_gives_one_of_the_two_neighbours(numbers, seed):
    values = torch.tensor(numbers)
    toward_zero = (values.view(torch.int32) & -(1 << 16)).view(torch.float32)
    away = ((values.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    rounded = stochastic_round(values, torch.Generator().manual_seed(seed)).float()
    exact = toward_zero == values
    assert torch.equal(rounded[exact], values[exact])
    assert ((rounded == toward_zero) | (rounded == away))[~exact].all()


def test_rounding_is_right_on_average(device):
    for number in (1.001, -3.14159, 1e-20, 123456.7):
        values = torch.full((40_000,), number, device=device)
        rounded = stochastic_round(values, torch.Generator(device).manual_seed(0)).double()
        # The mean of n draws of two values has a standard error of at most half their gap / sqrt n.
        gap = rounded.max() - rounded.min()
        assert gap > 0
        assert (rounded.mean() - values[0].double()).abs() < 4 * gap / 2 / 200


def test_rounding_keeps_what_is_not_a_number(device):
    bits = torch.tensor([0x7F800000, -0x800000, 0x7FC00000, 0x7FFFFFFF, -1, 0], dtype=torch.int32)
    values = bits.view(torch.float32).to(device)
    for seed in range(50):
        rounded = stochastic_round(values, torch.Generator(device).manual_seed(seed))
        assert rounded.isnan().tolist() == [False, False, True, True, True, False]
        assert rounded[:2].tolist() == [float("inf"), float("-inf")]
        assert rounded[5] == 0


def test_rounding_advances_the_generator_it_is_given():
    values = torch.linspace(1, 2, 1000)
    generator = torch.Generator().manual_seed(0)
    first, second = stochastic_round(values, generator), stochastic_round(values, generator)
    assert not torch.equal(first, second)
    assert torch.equal(stochastic_round(values, torch.Generator().manual_seed(0)), first)


def test_systems_have_schedules_of_their_own(student):
    config = OptimConfig(
        expert_lr=1.0,
        gate_lr=10.0,
        warmup_fraction=0.2,
        decay_fraction=0.5,
        gate_warmup_fraction=0.0,
        gate_decay_fraction=1.0,
    )
    assert lr_factor(0.1, config) == pytest.approx((0.5, 0.9))
    assert lr_factor(0.5, config) == pytest.approx((1.0, 0.5))
    assert lr_factor(0.9, config) == pytest.approx((0.2, 0.1))
    assert lr_factor(1.0, config) == (0.0, 0.0)
    optimizer = build_optimizer(student, config)
    set_learning_rates(optimizer, lr_factor(0.1, config))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 9.0])


@each_format
def test_gradients_are_clipped_apart_by_norms_in_float32(student, master_dtype):
    build_optimizer(student, OptimConfig(master_dtype=master_dtype))
    experts, gates = split_parameters(student)
    fill_gradients(student, 0)
    for gate in gates.values():
        assert gate.grad is not None
        gate.grad *= 1e-4

    def norm(parameters):
        return torch.cat([p.grad.double().flatten() for p in parameters.values()]).norm().item()

    expert_norm, gate_norm = norm(experts), norm(gates)
    assert expert_norm > 1 > gate_norm
    got = clip_gradients(student, 1.0)
    assert [float(value) for value in got] == pytest.approx([expert_norm, gate_norm], rel=1e-5)
    assert norm(experts) == pytest.approx(1.0, rel=1e-2 if master_dtype == "bfloat16" else 1e-5)
    assert norm(gates) == pytest.approx(gate_norm)
