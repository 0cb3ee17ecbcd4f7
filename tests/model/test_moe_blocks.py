"""Our top-k layer is transformers' own MoE block, on the same weights."""

from typing import Any

import pytest
import torch
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

from tiny_onn.model.experts import Execution, ExpertBank, recorded_routings
from tiny_onn.model.router import RoutingRule
from tiny_onn.routing.losses import load_balancing_loss

HIDDEN, WIDTH, EXPERTS = 12, 5, 8
COMMON: dict[str, Any] = {"hidden_size": HIDDEN, "hidden_act": "silu"}


def block_of(family, top_k):
    """Return a transformers MoE block of our size with random weights, and its balancing loss."""
    torch.manual_seed(0)
    if family == "mixtral":
        module = modeling_mixtral
        config: Any = MixtralConfig(
            **COMMON,
            num_local_experts=EXPERTS,
            num_experts_per_tok=top_k,
            intermediate_size=WIDTH,
        )
        block = module.MixtralSparseMoeBlock(config)
    else:
        module = modeling_qwen3_moe
        config = Qwen3MoeConfig(
            **COMMON,
            num_experts=EXPERTS,
            num_experts_per_tok=top_k,
            moe_intermediate_size=WIDTH,
            norm_topk_prob=True,
        )
        block = module.Qwen3MoeSparseMoeBlock(config)
    # The block's own choice of kernel for the experts is not under test.
    config._experts_implementation = "eager"
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return block, module.load_balancing_loss_func


def bank_of(block, top_k, path):
    rule = RoutingRule(selection="top_k", weighting="softmax", target_k=float(top_k))
    bank = ExpertBank(HIDDEN, EXPERTS, WIDTH, "silu", rule)
    with torch.no_grad():
        bank.experts.load_state_dict(block.experts.state_dict())
        bank.router.weight.copy_(block.gate.weight)
    bank.set_execution(Execution(coupled=True, path=path))
    return bank


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("path", ["dense", "grouped"])
def test_outputs_losses_and_gradients_are_those_of_the_block(family, top_k, path):
    block, balancing = block_of(family, top_k)
    bank = bank_of(block, top_k, path)
    generator = torch.Generator().manual_seed(1)
    x, pull = (torch.randn(2, 15, HIDDEN, generator=generator) for _ in range(2))
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    with recorded_routings([bank]) as routings:
        ours, theirs = bank(ours_x), block(theirs_x)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)

    everyone = torch.ones(30, dtype=torch.bool)
    our_loss = load_balancing_loss([routings[0].router_logits], top_k, everyone)
    their_logits, _, _ = block.gate(theirs_x.view(-1, HIDDEN))
    raw_logits = torch.nn.functional.linear(theirs_x.view(-1, HIDDEN), block.gate.weight)
    # Some releases return probabilities, but the loss takes logits.
    assert their_logits.shape == raw_logits.shape
    their_loss = balancing((raw_logits,), EXPERTS, top_k, None)
    torch.testing.assert_close(our_loss, their_loss)

    weights = [bank.router.weight, bank.experts.gate_up_proj, bank.experts.down_proj, ours_x]
    got = torch.autograd.grad((ours * pull).sum() + our_loss, weights)
    weights = [block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj, theirs_x]
    gate, gate_up, down, at_x = torch.autograd.grad((theirs * pull).sum() + their_loss, weights)
    for mine, expected in zip(got, (gate, gate_up, down, at_x), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)
        assert expected.any()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_experts_are_called_and_computed_as_those_of_the_block(family):
    block, _ = block_of(family, 3)
    bank = bank_of(block, 3, "dense")
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(15, HIDDEN, generator=generator)
    # An engine that splits experts over machines gives other machines' experts the index EXPERTS.
    index = torch.stack([torch.randperm(EXPERTS + 1, generator=generator)[:3] for _ in range(15)])
    weights = torch.rand(15, 3, generator=generator)
    grads = []
    for experts in (bank.experts, block.experts):
        y = experts(x, index, weights)
        parameters: Any = [experts.gate_up_proj, experts.down_proj]
        grads.append([y, *torch.autograd.grad(y.square().sum(), parameters)])
    torch.testing.assert_close(*grads)
    names = ("num_experts", "hidden_dim", "intermediate_dim")
    assert all(getattr(bank.experts, name) == getattr(block.experts, name) for name in names)
    # With our routing the block's experts compute our layer.
    routing = bank.router(x)
    chosen = routing.weights.topk(3)
    torch.testing.assert_close(bank.experts(x, chosen.indices, chosen.values), bank(x))
