"""Leave-one-out against brute force: one token, one expert, everything computed again."""

import copy
from contextlib import contextmanager
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from tiny import make_dense, make_ids, make_student, normal
from tiny_onn.config.schema import Weighting
from tiny_onn.model.experts import ExpertBank, recorded_routings
from tiny_onn.model.router import RoutingRule, route
from tiny_onn.ops import reference
from tiny_onn.probe.counterfactual_attention import own_keys
from tiny_onn.probe.leave_one_out import SURPRISES, ProbedDocument, would_be_weights

E, S = 8, 2
TOKENS = 7


def make_wide(family, weighting, **changes):
    """A student that left its teacher, and the teacher, in float64 for exact differences."""
    dense = make_dense(family, **changes).double()
    extra = {"compensation": "mean", "learn_scale": True} if weighting == "softmax" else {}
    student = make_student(dense, weighting=weighting, **extra)
    with torch.no_grad():
        for bank in student.banks():
            bank.double()
            # A gate that chooses by token.
            bank.router.weight.mul_(20)
            bank.experts.gate_up_proj.add_(torch.randn_like(bank.experts.gate_up_proj) * 0.05)
            if bank.mean_outputs is not None and bank.expert_scale is not None:
                bank.mean_outputs.copy_(torch.randn_like(bank.mean_outputs) * 0.1)
                bank.expert_scale.copy_(torch.rand_like(bank.expert_scale) + 0.5)
    return student.requires_grad_(False), dense


def own_loss(student, ids, teacher_logits, token):
    logits = student(input_ids=ids).logits[0, token]
    if teacher_logits is None:
        return F.cross_entropy(logits, ids[0, token + 1])
    return F.kl_div(
        logits.log_softmax(-1),
        teacher_logits[token].log_softmax(-1),
        log_target=True,
        reduction="sum",
    )


@contextmanager
def flipped(student, layer, token, expert):
    """Within, one token is changed at one layer: the expert's weights are zero, or it is on."""
    bank = student.banks()[layer]
    without = copy.deepcopy(bank)
    without.experts.down_proj[expert] = 0

    def hook(module, inputs, output):
        output, routing = output.clone(), routings[-1]
        if routing.active[token, expert]:
            output[0, token] = without(inputs[0])[0, token]
            if module.mean_outputs is not None:
                output[0, token] += module.mean_outputs[expert]
        else:
            added = reference.expert(
                inputs[0][0, token],
                module.experts.gate_up_proj[expert],
                module.experts.down_proj[expert],
                module.activation,
            )
            logits = routing.router_logits[token]
            kept = routing.active[token].clone()
            kept[expert] = True
            rule = module.router.rule.weighting
            weight = {
                "unit": 1.0,
                "mean": 1 / kept.sum(),
                "sigmoid": logits[expert].sigmoid(),
                "softmax": logits.softmax(-1)[expert] / logits.softmax(-1)[kept].sum(),
            }[rule]
            if module.mean_outputs is not None:
                weight = weight * module.expert_scale[expert]
                output[0, token] -= module.mean_outputs[expert]
            output[0, token] += weight * added
        return output

    with recorded_routings([bank]) as routings, bank.register_forward_hook(hook):
        yield


@pytest.mark.parametrize("loss", ["forward_kl", "next_token"])
@pytest.mark.parametrize(
    ("family", "weighting"),
    [
        ("llama", "unit"),
        ("qwen3", "softmax"),
        ("gemma2", "sigmoid"),
        ("cohere", "mean"),
        ("granite", "unit"),
    ],
)
@torch.no_grad()
def test_truth_is_that_of_single_changes(family, weighting, loss):
    # Seven tokens in a window of four: the sliding layers see less than all.
    window = {"sliding_window": 4} if family == "gemma2" else {}
    student, dense = make_wide(family, weighting, **window)
    ids = make_ids(1, TOKENS)
    teacher_logits = dense(input_ids=ids).logits[0] if loss == "forward_kl" else None
    with own_keys(student):
        document = ProbedDocument(student, ids, teacher_logits)
        got = [document.truth(layer) for layer in range(2)]
    for layer, got_TE in enumerate(got):
        assert got_TE[-1].abs().max() == 0
        for token in range(TOKENS - 1):
            with recorded_routings([student.banks()[layer]]) as routings:
                base = own_loss(student, ids, teacher_logits, token)
            active_E = routings[0].active[token]
            assert document.losses_T[token] == pytest.approx(base.item(), abs=1e-9)
            for expert in range(0, 8, 3):
                with flipped(student, layer, token, expert):
                    rise = own_loss(student, ids, teacher_logits, token) - base
                expected = rise if active_E[expert] else -rise
                assert got_TE[token, expert].item() == pytest.approx(
                    expected.item(), rel=1e-5, abs=1e-8
                )


def gradients_of_outputs(student, ids, losses):
    """Per layer, the gradient of the chosen losses' sum at the layer's output, and its input."""
    seen = []

    def hook(_, inputs, output):
        output = output.requires_grad_() if output.is_leaf else output
        output.retain_grad()
        seen.append((inputs[0], output))

    banks = student.banks()
    handles = [bank.register_forward_hook(hook) for bank in banks]
    student.backbone.get_input_embeddings().weight.requires_grad_(True)
    logits = student(input_ids=ids).logits[0, :-1]
    F.cross_entropy(logits[losses], ids[0, 1:][losses], reduction="sum").backward()
    student.backbone.get_input_embeddings().weight.requires_grad_(False)
    for handle in handles:
        handle.remove()
    return [(x[0].detach(), y.grad[0]) for x, y in seen]


@pytest.mark.parametrize("own", [False, True], ids=["all tokens", "own"])
def test_surprise_is_the_definition_at_the_gradient_that_counts(own):
    student, _ = make_wide("llama", "sigmoid")
    ids = make_ids(1, TOKENS)
    with own_keys(student):
        document = ProbedDocument(student, ids, None)
        got = document.surprise([0, 1], own=own)
        inputs = [document.mlp_input(layer)[0] for layer in (0, 1)]
    whole = gradients_of_outputs(student, ids, list(range(TOKENS - 1)))
    each = [gradients_of_outputs(student, ids, [token]) for token in range(TOKENS - 1)]
    for layer, bank in enumerate(student.banks()):
        x_TD, grad_TD = whole[layer]
        torch.testing.assert_close(inputs[layer], x_TD)
        if own:
            grad_TD = torch.stack([each[token][layer][1][token] for token in range(TOKENS - 1)])
        weights_TE = (x_TD @ bank.router.weight.T + bank.router.bias).float().sigmoid()
        for kind in SURPRISES:
            expected = reference.surprise(
                kind,
                x_TD[: TOKENS - 1],
                bank.experts.gate_up_proj,
                bank.experts.down_proj,
                grad_TD[: TOKENS - 1],
                bank.activation,
            )
            torch.testing.assert_close(
                got[layer][kind][:-1],
                expected * weights_TE[:-1],
                rtol=1e-4,
                atol=1e-8,
                msg=lambda text, kind=kind: f"{kind}: {text}",
            )


def test_probing_leaves_the_student_as_it_was():
    student, dense = make_wide("llama", "unit")
    ids = make_ids(1, TOKENS)
    before = student(input_ids=ids).logits

    def state():
        banks = student.banks()
        return [(bank.row, bank.execution, bank.router.weight.requires_grad) for bank in banks]

    earlier = state()
    with own_keys(student):
        document = ProbedDocument(student, ids, dense(input_ids=ids).logits[0])
        document.truth(0)
        document.surprise([0])
    assert torch.equal(student(input_ids=ids).logits, before)
    assert state() == earlier
    assert all(parameter.grad is None for parameter in student.parameters())


def test_gain_of_own_losses_is_the_truth_to_first_order():
    student, _ = make_wide("llama", "unit")
    with torch.no_grad():
        for bank in student.banks():
            bank.experts.down_proj.mul_(1e-3)
    ids = make_ids(1, TOKENS)
    with own_keys(student):
        document = ProbedDocument(student, ids, None)
        truth_TE = document.truth(0)[:-1]
        gain_TE = document.surprise([0], ["gain"], own=True)[0]["gain"][:-1]
    torch.testing.assert_close(gain_TE, truth_TE, rtol=0.1, atol=1e-2 * truth_TE.abs().max().item())


# The probe refuses `ramp`, where an expert that joins below the threshold would have weight 0.
@pytest.mark.parametrize("weighting", sorted({*get_args(Weighting)} - {"ramp"}))
def test_an_experts_would_be_weight_is_the_one_it_would_have(weighting):
    rule = RoutingRule(selection="top_k", weighting=weighting, target_k=4.0, num_shared=S)
    bank = ExpertBank(3, E, 2, "silu", rule)
    routing = route(normal(9, E), rule, torch.tensor(0.0))
    weights = would_be_weights(routing, bank)
    assert torch.equal(weights[:, :S], torch.ones(9, S))
    torch.testing.assert_close(weights[routing.active], routing.weights[routing.active])
    assert (weights[~routing.active] > 0).all()
