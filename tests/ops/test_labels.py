"""Targets that judge every expert by itself: their definition, gradient, and what they learn."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import change
from tiny_onn.config.checks import validate
from tiny_onn.config.schema import RunConfig
from tiny_onn.errors import UserError
from tiny_onn.ops.surprise import SmkRule, label_logits_grad, label_loss, smk_targets


def drawn(seed, num_tokens=6, num_experts=8, scale=3.0):
    """Return logits, gains and active experts, in float64."""
    generator = torch.Generator().manual_seed(seed)
    logits, gains = torch.randn(2, num_tokens, num_experts, generator=generator).double() * scale
    active = torch.rand(num_tokens, num_experts, generator=generator) < 0.7
    return logits, gains, active


def brute_force(logits_E, labels_E):
    """Return the loss of one token's candidates by the best of many offsets."""
    offsets = torch.linspace(float(logits_E.min()) - 9, float(logits_E.max()) + 9, 20001)
    values = F.binary_cross_entropy_with_logits(
        logits_E - offsets[:, None].double(), labels_E.expand(20001, -1), reduction="none"
    )
    return values.mean(-1).min()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    targets=st.sampled_from(["member", "helpful"]),
    candidates=st.sampled_from(["all", "active"]),
)
def test_loss_and_gradient_are_those_of_the_best_offset(seed, targets, candidates):
    logits_TE, gains_TE, active_TE = drawn(seed)
    mask_T = torch.arange(6) > 0
    rule = SmkRule(
        surprise="gain", direction="max", candidates=candidates, targets=targets, num_targets=3
    )
    targets_TE = smk_targets(gains_TE, active_TE, mask_T, rule)
    candidates_TE = torch.ones_like(active_TE) if candidates == "all" else active_TE
    logits_TE.requires_grad_()
    losses_T = label_loss(logits_TE, targets_TE, candidates_TE)
    (expected_TE,) = torch.autograd.grad(losses_T.sum(), logits_TE)
    losses_T = losses_T.detach()
    got_TE = label_logits_grad(logits_TE.detach(), targets_TE, candidates_TE)
    torch.testing.assert_close(got_TE, expected_TE, rtol=1e-6, atol=1e-9)
    # A constant added to a token's logits changes nothing.
    torch.testing.assert_close(got_TE.sum(-1), torch.zeros(6).double(), atol=1e-7, rtol=0)
    for t in range(6):
        own_E = candidates_TE[t]
        better = gains_TE[t][own_E].sort(descending=True).values
        if targets == "helpful":
            labels_E = gains_TE[t][own_E] > 0
        else:
            count = 3 if candidates == "all" else (int(own_E.sum()) + 1) // 2
            labels_E = gains_TE[t][own_E] >= (better[count - 1] if len(better) else 0.0)
        says_something = bool(mask_T[t]) and len(better) > 1 and 0 < labels_E.sum() < len(better)
        assert bool(targets_TE[t].any()) == says_something
        if not says_something:
            assert losses_T[t] == 0
            assert not got_TE[t].any()
            continue
        assert torch.equal(targets_TE[t][own_E] > 0, labels_E)
        expected = brute_force(logits_TE.detach()[t][own_E], labels_E.double())
        assert float(losses_T[t]) == pytest.approx(float(expected), rel=1e-4)


def test_far_logits_keep_a_finite_gradient():
    logits_TE = torch.tensor([[-1e4, 0.0, 1e4, 3.0], [0.0, 0.0, 0.0, 0.0]])
    targets_TE = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    everyone_TE = torch.ones(2, 4, dtype=torch.bool)
    got_TE = label_logits_grad(logits_TE, targets_TE, everyone_TE)
    expected_TE = torch.tensor([[-0.25, 0.0, 0.25, 0.0], [-0.125, -0.125, 0.125, 0.125]])
    torch.testing.assert_close(got_TE, expected_TE)


def test_a_gate_that_sees_nothing_learns_the_log_odds_of_being_a_target():
    generator = torch.Generator().manual_seed(0)
    means = torch.linspace(-1, 1, 6).double()
    gains_TE = means + torch.randn(1000, 6, generator=generator).double()
    rule = SmkRule(surprise="gain", direction="max", candidates="all", targets="helpful")
    everyone = torch.ones(1000, 6, dtype=torch.bool)
    targets_TE = smk_targets(gains_TE, everyone, everyone[:, 0], rule)
    bias_E = torch.zeros(6).double()
    for _ in range(100):
        grad_TE = label_logits_grad(bias_E.expand(1000, 6), targets_TE, everyone)
        bias_E -= 12 * grad_TE.mean(0)
    shares_E = (targets_TE > 0).double().mean(0)
    assert bias_E.argsort().tolist() == shares_E.argsort().tolist()
    odds_E = shares_E.logit()
    # It is not quite a line, since each token's own level is taken out.
    correlation = torch.corrcoef(torch.stack((bias_E, odds_E)))[0, 1]
    assert correlation > 0.99


@pytest.mark.parametrize("smk", [{"surprise": "parameters"}, {"direction": "min"}])
def test_only_a_gain_says_whether_an_expert_helps(smk):
    with pytest.raises(UserError, match=r'smk\.targets: got "helpful"'):
        validate(change(RunConfig(), smk={"targets": "helpful", **smk}))
