"""Rates in units of the weights: training does not see what a model's function does not see."""

from typing import get_args, get_type_hints

import pytest
import torch

from tiny import CONFIG, change, make_dense, make_rows, make_student, save_checkpoint
from tiny_onn.config.schema import OptimConfig
from tiny_onn.conversion.pipeline import make_student as convert
from tiny_onn.distill.clipping import clip_gradients
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.step import distill_step
from tiny_onn.distill.units import start_units
from tiny_onn.model.backbone import gated_mlps
from tiny_onn.model.expert_weights import by_neuron
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.student import split_parameters
from tiny_onn.runs.checkpoint import load_checkpoint

NAMES = get_args(get_type_hints(OptimConfig)["name"])
FORMATS = get_args(get_type_hints(OptimConfig)["master_dtype"])
ROWS = make_rows((20, 13, 30, 40, 9, 25, 31, 20), 32)
RECIPE = change(
    CONFIG,
    experts={"init": "importance", "gate_init": "ridge", "compensation": "mean"},
    router={"budget_form": "threshold"},
    smk={"surprise": "gain", "direction": "max", "candidates": "all"},
    loss={"states_coef": 4.0},
    # The norm is small enough to clip, and decay large enough to show.
    optim={"lr_scale": "rms", "clip_norm": 0.02, "weight_decay": 1.0},
)


def losses(config, dense):
    """The losses of a few steps from the conversion of a dense model."""
    student = convert(config, MlpInputs(dense, ROWS[:3]))
    optimizer = build_optimizer(student, config.optim)
    return [distill_step(student, dense, optimizer, [row], config).loss.item() for row in ROWS]


def up_and_down(factor):
    """A model whose up projections have a factor that its down projections take back."""
    dense = make_dense("llama")
    for mlp in gated_mlps(dense):
        mlp.up_proj.weight.data *= factor
        mlp.down_proj.weight.data /= factor
    return dense


def residual_stream(factor):
    """A model whose residual stream has a factor that its norms take out."""
    dense = make_dense("llama", tie_word_embeddings=False, rms_norm_eps=1e-6 * factor**2)
    for name, parameter in dense.named_parameters():
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
            parameter.data *= factor
    return dense


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("master_dtype", FORMATS)
@pytest.mark.parametrize("make", [up_and_down, residual_stream])
def test_a_factor_that_the_function_does_not_see_changes_no_loss(name, master_dtype, make):
    config = change(RECIPE, optim={"name": name, "master_dtype": master_dtype})
    # A power of two changes no significant digit.
    assert losses(config, make(16.0)) == losses(config, make(1.0))


@pytest.mark.parametrize("make", [up_and_down, residual_stream])
def test_nor_does_it_where_hidden_states_are_matched_by_feature(make):
    config = change(RECIPE, loss={"states_scale": "feature"}, optim={"name": "muon"})
    assert losses(config, make(16.0)) == losses(config, make(1.0))


def test_in_absolute_units_such_a_factor_changes_the_losses():
    config = change(RECIPE, optim={"lr_scale": "absolute"})
    assert losses(config, up_and_down(16.0)) != pytest.approx(
        losses(config, up_and_down(1.0)), rel=1e-3
    )


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_rate_is_a_share_of_each_weights_own_scale(name):
    student = make_student(make_dense("llama"), compensation="mean")
    bank = student.banks()[0]
    by_neuron("gate_up_proj", bank.experts.gate_up_proj.data)[1].mul_(8)
    assert bank.mean_outputs is not None
    bank.mean_outputs.data.normal_(generator=torch.Generator().manual_seed(0))
    config = OptimConfig(name=name, lr_scale="rms", expert_lr=1e-3, gate_lr=1e-3)
    optimizer = build_optimizer(student, config)
    before = {key: p.detach().clone() for key, p in student.trainable().items()}
    for parameter in student.trainable().values():
        parameter.grad = torch.full_like(parameter, 1e-4)
    optimizer.step()
    # The first step of each optimizer moves every element by the rate.
    for key, parameter in student.trainable().items():
        moved = before[key] - parameter.detach()
        if key.endswith("gate_up_proj"):
            pairs = zip(*(by_neuron("gate_up_proj", t) for t in (moved, before[key])), strict=True)
        else:
            unit = before[key] if parameter.ndim > 1 and before[key].any() else torch.ones(1)
            pairs = [(moved, unit)]
        for change_, weight in pairs:
            scale = weight.square().mean().sqrt()
            torch.testing.assert_close(
                change_, (1e-3 * scale).expand_as(change_), rtol=2e-3, atol=1e-6
            )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("master_dtype", FORMATS)
def test_a_resumed_run_keeps_the_units_it_began_with(tmp_path, name, master_dtype):
    dense = make_dense(hidden_size=128, intermediate_size=64, num_hidden_layers=1)
    config = OptimConfig(name=name, master_dtype=master_dtype, lr_scale="rms", weight_decay=0.1)

    def steps(student, optimizer):
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            for parameter in student.trainable().values():
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = gradient.to(parameter)
            optimizer.step()
        return {key: p.detach().clone() for key, p in student.trainable().items()}

    student = make_student(dense, num_experts=32, target_k=16.0)
    optimizer = build_optimizer(student, config)
    steps(student, optimizer)
    save_checkpoint(tmp_path, 2, student, optimizer, {})
    expected = steps(student, optimizer)
    # This student's gate, and with it the units that it would take, are other ones.
    resumed = make_student(dense, num_experts=32, target_k=16.0, seed=1)
    resumed_optimizer = build_optimizer(resumed, config)
    load_checkpoint(tmp_path, resumed, resumed_optimizer)
    found = steps(resumed, resumed_optimizer)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_gradients_are_clipped_by_their_norm_in_units():
    student = make_student(make_dense("llama"))
    optimizer = build_optimizer(student, OptimConfig(lr_scale="rms"))
    experts, _ = split_parameters(student)
    units = start_units(experts)
    expected = torch.zeros(())
    for key, parameter in experts.items():
        parameter.grad = torch.full_like(parameter, 2.0)
        unit = units[parameter]
        expected += (4 * parameter.numel() * unit.square()).mean()
        assert unit.shape == ((2,) if key.endswith("gate_up_proj") else ())
    norm, _ = clip_gradients(student, 0.5, optimizer)
    torch.testing.assert_close(norm, expected.sqrt())
    for parameter in experts.values():
        torch.testing.assert_close(
            parameter.grad, (2 * 0.5 / expected.sqrt()).expand_as(parameter), rtol=1e-4, atol=0
        )
