"""Gates that regress: on log norms of experts' outputs, or on surprise in units of its spread."""

import math

import pytest
import torch
import torch.nn.functional as F

from tiny_onn.model.experts import ExpertBank, RowState, row_context
from tiny_onn.model.router import RoutingRule
from tiny_onn.ops import dense_masked, grouped, reference
from tiny_onn.ops.router_gradient import SmkStep
from tiny_onn.ops.surprise import SmkRule, regression_grad, regression_targets

TOKENS, HIDDEN, EXPERTS, WIDTH = 9, 7, 5, 3
LOG = SmkRule(surprise="magnitude", direction="max", candidates="all", targets="log")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_by_loop(logits, values, active, mask, rule):
    """The regression's loss summed over tokens, from its definition, one pair at a time."""
    if rule.targets == "log":
        pairs = [(t, e) for t in range(len(values)) for e in range(EXPERTS) if mask[t]]
        squares = [(logits[t, e] - math.log(values[t, e])) ** 2 / EXPERTS for t, e in pairs]
        return torch.stack(squares).sum()
    sign = 1 if rule.direction == "max" else -1
    tokens = []
    for t in range(len(values)):
        among = [e for e in range(EXPERTS) if rule.candidates == "all" or active[t, e]]
        quantity = [sign * values[t, e].item() for e in among]
        if mask[t] and among and max(quantity) > min(quantity):
            mean = sum(quantity) / len(quantity)
            tokens.append((t, among, [q - mean for q in quantity]))
    pairs = [q for _, _, centred in tokens for q in centred]
    spread = math.sqrt(sum(q * q for q in pairs) / len(pairs))
    total = torch.zeros((), dtype=logits.dtype)
    for t, among, centred in tokens:
        level = sum(logits[t, e] for e in among) / len(among)
        errors = [logits[t, e] - level - q / spread for e, q in zip(among, centred, strict=True)]
        total = total + sum(error**2 for error in errors) / len(among)
    return total


@pytest.mark.parametrize(
    "rule",
    [
        LOG,
        SmkRule(surprise="gain", direction="max", candidates="all", targets="regress"),
        SmkRule(surprise="gain", direction="min", candidates="active", targets="regress"),
    ],
    ids=["log", "all", "active"],
)
def test_the_gradient_is_that_of_the_loss_written_out(rule):
    logits, values = normal(TOKENS, EXPERTS).requires_grad_(), normal(TOKENS, EXPERTS, seed=1)
    active, mask = normal(TOKENS, EXPERTS, seed=2) > -0.5, torch.arange(TOKENS) % 4 != 0
    if rule.targets == "log":
        values = values.abs()
    # Tokens that say nothing: all equal, and no candidate.
    values[1], active[2] = 0.7, False
    (expected,) = torch.autograd.grad(loss_by_loop(logits, values, active, mask, rule), logits)
    got = regression_grad(logits.detach(), values, active, mask, rule)
    torch.testing.assert_close(got, expected)
    assert not got[~mask].any()
    if rule.targets == "regress":
        assert not got[1].any()
        assert got.sum(-1).abs().max() < 1e-12


def test_regressed_targets_are_free_of_the_scale_of_the_loss():
    rule = SmkRule(surprise="gain", direction="max", candidates="all", targets="regress")
    values, active = normal(TOKENS, EXPERTS), torch.ones(TOKENS, EXPERTS, dtype=torch.bool)
    mask = torch.ones(TOKENS, dtype=torch.bool)
    targets, counts = regression_targets(values, active, mask, rule)
    scaled, _ = regression_targets(1e-7 * values, active, mask, rule)
    torch.testing.assert_close(scaled, targets)
    assert targets[counts].square().mean().item() == pytest.approx(1)
    nothing, counts = regression_targets(0 * values, active, mask, rule)
    assert not nothing.any()
    assert not counts.any()


def layer(seed=0):
    parts = normal(EXPERTS, 2 * WIDTH, HIDDEN, seed=seed), normal(EXPERTS, HIDDEN, WIDTH, seed=1)
    return normal(TOKENS, HIDDEN, seed=2), *parts


@pytest.mark.parametrize("chunk_tokens", [0, 4])
def test_the_backward_pass_gives_the_gate_the_error_of_its_log_norms(chunk_tokens):
    x, gate_up, down = layer()
    logits, active = normal(TOKENS, EXPERTS, seed=3).requires_grad_(), normal(TOKENS, EXPERTS) > 0
    mask = torch.arange(TOKENS) % 3 != 0
    smk = SmkStep(rule=LOG, grad_scale=0.25, loss_scale=77.0)
    options = {"activation": F.silu, "active_TE": active, "token_mask_T": mask, "smk": smk}
    y = dense_masked.expert_layer(
        x, gate_up, down, active.double(), logits, chunk_tokens=chunk_tokens, **options
    )
    (got,) = torch.autograd.grad(y.sum(), logits)
    norms = reference.surprise("magnitude", x, gate_up, down, torch.ones_like(x), F.silu)
    expected = 0.25 * 2 / EXPERTS * (logits.detach() - norms.log()) * mask[:, None]
    torch.testing.assert_close(got, expected)


def test_the_grouped_path_refuses_what_it_cannot_see():
    x, gate_up, down = layer()
    logits, active = normal(TOKENS, EXPERTS), normal(TOKENS, EXPERTS) > 0
    with pytest.raises(ValueError, match="the grouped path computes no inactive expert"):
        grouped.expert_layer(
            x,
            gate_up,
            down,
            active.double(),
            logits,
            activation=F.silu,
            active_TE=active,
            smk=SmkStep(rule=LOG, grad_scale=1.0),
        )


def test_a_gate_taught_by_regression_comes_to_know_the_norms():
    generator = torch.Generator().manual_seed(0)
    bank = ExpertBank(HIDDEN, EXPERTS, WIDTH, "silu", RoutingRule(selection="top_k", target_k=2.0))
    bank.experts.reset(generator, 0.5)
    row = RowState(smk=SmkStep(rule=LOG, grad_scale=1 / 400))
    optimizer = torch.optim.Adam(bank.router.parameters(), lr=0.03)
    x = torch.randn(400, HIDDEN, generator=generator)
    norms = reference.surprise(
        "magnitude",
        x[:40],
        bank.experts.gate_up_proj,
        bank.experts.down_proj,
        torch.ones(40, HIDDEN),
        F.silu,
    )
    errors = []
    for _ in range(150):
        with row_context([bank], [row]):
            bank(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        logits = bank.router(x[:40]).router_logits.detach()
        errors.append((logits - norms.log()).square().mean().item())
    # What is left is what no linear gate can know.
    features = F.pad(x[:40], (0, 1), value=1.0)
    best = features @ torch.linalg.lstsq(features, norms.log()).solution
    least = (best - norms.log()).square().mean().item()
    constant = (norms.log().mean(0) - norms.log()).square().mean().item()
    assert errors[0] > constant
    assert least < errors[-1] < constant
