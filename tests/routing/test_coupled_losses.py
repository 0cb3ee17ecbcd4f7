"""The gates' losses beside the main one, against transformers' and loops."""

import pytest
import torch
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

from tiny import normal
from tiny_onn.routing.losses import load_balancing_loss, z_loss

NUM_EXPERTS = 8


def everyone(num_tokens):
    return torch.ones(num_tokens, dtype=torch.bool)


@pytest.mark.parametrize("module", [modeling_mixtral, modeling_qwen3_moe])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
def test_load_balancing_loss_equals_transformers(module, masked, top_k):
    layers = tuple(normal(2 * 15, NUM_EXPERTS, seed=i).requires_grad_() for i in range(3))
    mask = torch.arange(30).view(2, 15) % 4 != 0 if masked else None
    theirs = module.load_balancing_loss_func(layers, NUM_EXPERTS, top_k, mask)
    ours = load_balancing_loss(layers, top_k, mask.flatten() if mask is not None else everyone(30))
    torch.testing.assert_close(ours, theirs)
    ours_grad, theirs_grad = torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers)
    torch.testing.assert_close(ours_grad, theirs_grad)
    assert all(grad.any() for grad in ours_grad)


def test_balanced_and_collapsed_gates_bound_the_load_balancing_loss():
    balanced = 9 * torch.eye(4).repeat(5, 1)
    collapsed = 99 * torch.eye(4)[:1].repeat(20, 1)
    assert load_balancing_loss([balanced], 1, everyone(20)).item() == pytest.approx(1)
    assert load_balancing_loss([collapsed], 1, everyone(20)).item() == pytest.approx(4)


def test_z_loss_is_the_mean_squared_log_partition_of_counted_tokens():
    logits = [normal(6, 4, seed=i) for i in range(2)]
    mask = torch.tensor([True, False, True, True, False, True])
    squares = [
        row.exp().sum().log().item() ** 2
        for layer in logits
        for row, counts in zip(layer, mask, strict=True)
        if counts
    ]
    assert z_loss(logits, mask).item() == pytest.approx(sum(squares) / 8)
