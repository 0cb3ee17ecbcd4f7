"""The loss of hidden states: its definition, its gradient, and its place in a step."""

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tiny import CONFIG, change, make_dense, make_rows, make_student, start_damaged
from tiny_onn.distill.checkpointing import checkpoint_layers
from tiny_onn.distill.hidden_states import FLOOR, LEAST_VARIANCE, unexplained_variance
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.step import distill_step
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import decoder_layers, last_hidden_states
from tiny_onn.model.expert_path import set_objective
from tiny_onn.model.hooks import layer_outputs


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(own, theirs, mask) -> torch.Tensor:
    """One layer, token by token."""
    rows = [t for t in range(len(mask)) if mask[t]]
    mean = torch.stack([theirs[0, t] for t in rows]).mean(0)
    error = torch.stack([((own[0, t] - theirs[0, t]) ** 2).sum() for t in rows]).sum()
    variance = torch.stack([((theirs[0, t] - mean) ** 2).sum() for t in rows]).sum()
    least = LEAST_VARIANCE * torch.stack([(theirs[0, t] ** 2).sum() for t in rows]).sum()
    return error / max(variance, least)


def by_hand_and_feature(own, theirs, mask) -> torch.Tensor:
    """One layer, feature by feature."""
    rows = [t for t in range(len(mask)) if mask[t]]
    variances, errors = [], []
    for d in range(own.shape[-1]):
        column = torch.stack([theirs[0, t, d] for t in rows])
        variances.append(((column - column.mean()) ** 2).sum())
        errors.append(torch.stack([(own[0, t, d] - theirs[0, t, d]) ** 2 for t in rows]).sum())
    variance = torch.stack(variances).mean()
    squares = torch.stack([(theirs[0, t] ** 2).sum() for t in rows]).sum() / own.shape[-1]
    floor = FLOOR * variance + max(LEAST_VARIANCE * squares - variance, 0)
    shares = [e / (v + floor) for e, v in zip(errors, variances, strict=True)]
    return torch.stack(shares).mean()


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize(
    ("by_feature", "definition"), [(False, by_hand), (True, by_hand_and_feature)]
)
def test_is_the_share_of_variance_token_by_token(by_feature, definition, mean):
    mask = torch.tensor([False, True, True, False, True])
    own = [draw(1, 5, 3, seed=s).float().requires_grad_() for s in (0, 1)]
    theirs = [draw(1, 5, 3, seed=s).float() + mean for s in (2, 3)]
    weights = torch.tensor([1.0, 3.0])
    got = unexplained_variance(own, theirs, mask, by_feature=by_feature)
    expected = torch.stack([definition(*pair, mask) for pair in zip(own, theirs, strict=True)])
    torch.testing.assert_close(got, expected)
    grads = torch.autograd.grad((got * weights).sum(), own)
    torch.testing.assert_close(grads, torch.autograd.grad((expected * weights).sum(), own))
    assert all((grad[0, ~mask] == 0).all() for grad in grads)


def test_is_nothing_for_equal_states_and_one_for_their_mean():
    theirs = draw(1, 6, 4, seed=0).float() + 5
    mask = torch.ones(6, dtype=torch.bool)
    mean = theirs.mean(1, keepdim=True).expand_as(theirs)
    got = unexplained_variance([theirs, mean], [theirs, theirs], mask)
    torch.testing.assert_close(got, torch.tensor([0.0, 1.0]))


def test_a_feature_counts_alike_whatever_its_scale():
    own, theirs = draw(1, 6, 4, seed=0).float(), draw(1, 6, 4, seed=1).float()
    theirs = theirs / theirs.std(1)
    mask, scale = torch.ones(6, dtype=torch.bool), torch.tensor([3.0, 1.0, 1.0, 1.0])
    pairs = [([own], [theirs]), ([own * scale], [theirs * scale])]
    plain, other = (unexplained_variance(*pair, mask) for pair in pairs)
    assert abs(other / plain - 1) > 0.01
    plain, other = (unexplained_variance(*pair, mask, by_feature=True) for pair in pairs)
    torch.testing.assert_close(plain, other, rtol=3 * FLOOR, atol=0)


@pytest.mark.parametrize("by_feature", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_one_repeated_token_counts_no_more_than_its_error_allows(by_feature, dtype):
    repeated = draw(1, 1, 64, seed=0).expand(1, 200, 64)
    # The tokens' states differ by rounding.
    theirs = (repeated + 1e-7 * draw(1, 200, 64, seed=1)).to(dtype)
    own = (theirs.float() * 0.9).to(dtype)
    mask = torch.ones(200, dtype=torch.bool)
    share = unexplained_variance([own], [theirs], mask, by_feature=by_feature)
    relative = (own.float() - theirs.float()).square().sum() / theirs.float().square().sum()
    assert 0.9 < share.item() * LEAST_VARIANCE / relative.item() < 1.1


@pytest.mark.parametrize("by_feature", [False, True])
def test_no_counted_token_gives_no_number_that_is_not_finite(by_feature):
    states = draw(1, 3, 4, seed=0).float().requires_grad_()
    none = torch.zeros(3, dtype=torch.bool)
    share = unexplained_variance([states], [states.detach() + 1], none, by_feature=by_feature)
    (grad,) = torch.autograd.grad(share.sum(), states)
    assert share.item() == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_layer_outputs_are_the_residual_stream(family):
    dense, (row,) = make_dense(family), make_rows([7, 9], 16)
    with layer_outputs(dense) as states:
        last = last_hidden_states(dense, row.input_ids, **packed_kwargs(row))
    assert len(states) == len(decoder_layers(dense))
    norm = dense.base_model.get_submodule("norm")
    torch.testing.assert_close(norm(states[-1]), last)
    with layer_outputs(dense, wanted=False) as states:
        last_hidden_states(dense, row.input_ids, **packed_kwargs(row))
    assert states == []


def one_step(coef, checkpointing: Any = "none"):
    """Expert gradients of one step, before the update changes anything else."""
    dense, (row,) = make_dense(), make_rows([15, 17], 32)
    student = make_student(dense)
    config = change(CONFIG, loss={"states_coef": coef}, optim={"clip_norm": 1e9})
    set_objective(student.banks(), config)
    checkpoint_layers(student, checkpointing)
    optimizer = build_optimizer(student, config.optim, seed=0)
    grads = {}

    def keep(name, parameter):
        parameter.register_post_accumulate_grad_hook(lambda p: grads.update({name: p.grad.clone()}))

    for name, parameter in student.trainable().items():
        keep(name, parameter)
    distill_step(student, dense, optimizer, [row], config)
    return grads


@pytest.mark.parametrize("checkpointing", ["layer", "selective", "offload"])
def test_checkpointing_changes_no_gradient(checkpointing):
    expected, got = one_step(2.0), one_step(2.0, checkpointing)
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], grad) for name, grad in expected.items())


def test_gradient_is_linear_in_the_coefficient():
    plain, once, twice = (one_step(coef) for coef in (0.0, 1.0, 2.0))
    for name in plain:
        if "router" in name:
            continue
        assert not torch.equal(plain[name], once[name])
        torch.testing.assert_close(
            twice[name] - plain[name], 2 * (once[name] - plain[name]), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize(("coef", "scale"), [(0.0, "layer"), (3.0, "layer"), (3.0, "feature")])
def test_a_step_says_what_states_leave_unexplained(coef, scale):
    student, dense, rows, config = start_damaged(states_coef=coef, states_scale=scale)
    by_row = []
    for row in rows:
        with torch.no_grad(), layer_outputs(student) as own, layer_outputs(dense) as theirs:
            last_hidden_states(student.train(), row.input_ids, **packed_kwargs(row))
            last_hidden_states(dense, row.input_ids, **packed_kwargs(row))
        by_feature = scale == "feature"
        shares_L = unexplained_variance(own, theirs, row.router_mask[0], by_feature=by_feature)
        by_row.append(shares_L.mean())
    result = distill_step(
        student, dense, build_optimizer(student, config.optim, seed=0), rows, config
    )
    if coef == 0:
        assert result.states_error is None
        return
    expected = torch.stack(by_row).mean()
    assert len(rows) == 2 and expected > 1e-3
    torch.testing.assert_close(result.states_error, expected)


def test_the_teachers_states_are_gone_before_the_layers_backward_passes():
    dense, (row,) = make_dense(), make_rows([15, 17], 32)
    student = make_student(dense)
    config = change(CONFIG, loss={"states_coef": 1.0})
    set_objective(student.banks(), config)
    optimizer, states, gone = build_optimizer(student, config.optim, seed=0), [], []

    def watch(_: object, __: object, output: Any) -> None:
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        states.append(StorageWeakRef(tensor.untyped_storage()))

    for layer in decoder_layers(dense):
        layer.register_forward_hook(watch)
    last = student.banks()[-1].experts.down_proj
    last.register_hook(lambda _: gone.extend(state.expired() for state in states))
    distill_step(student, dense, optimizer, [row], config)
    assert gone == [True] * len(decoder_layers(dense))
