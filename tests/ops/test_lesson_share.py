"""A lesson of all experts on a share of the tokens, and of the active ones on the others."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from expert_cases import COEF, Case, make_case, smk_step
from tiny import CONFIG, change, make_dense, make_rows
from tiny_onn.conversion.pipeline import make_student
from tiny_onn.distill.checkpointing import checkpoint_layers
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.step import distill_step
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.ops import dense_masked, grouped, reference
from tiny_onn.ops.router_gradient import RoutingTables, SurpriseTally, router_gradient
from tiny_onn.ops.surprise import (
    SmkRule,
    lesson_tokens,
    num_lesson_tokens,
    smk_logits_grad,
    smk_targets,
)

RULE = SmkRule(surprise="gain", direction="max", candidates="all", lesson_share=0.3)
PATHS = {"dense": dense_masked, "grouped": grouped}


@given(share=st.floats(1e-9, 1), shift=st.integers(0, 2**40), num_tokens=st.integers(0, 200))
def test_the_tokens_are_counted_without_listing_them(share, shift, num_tokens):
    chosen = lesson_tokens(num_tokens, share, shift)
    assert int(chosen.sum()) == num_lesson_tokens(num_tokens, share, shift)
    assert abs(int(chosen.sum()) - share * num_tokens) <= 1


@pytest.mark.parametrize(("share", "n", "d"), [(1 / 8, 1, 8), (0.3, 3, 10), (1.0, 1, 1)])
def test_the_share_is_exact_evenly_spaced_and_every_token_has_its_turn(share, n, d):
    chosen = torch.stack([lesson_tokens(5 * d, share, shift) for shift in range(d)])
    for row in chosen.tolist():
        assert all(sum(row[start : start + d]) == n for start in range(4 * d))
    assert (chosen.sum(0) == n).all()
    assert torch.equal(chosen[1 % d, :-1], chosen[0, 1:])


def by_token(case: Case, rule: SmkRule, lesson, mask) -> torch.Tensor:
    """The gradient at the logits, token by token, by the definition of surprise."""
    surprise = reference.surprise(rule.surprise, *case[:3], case.grad_y, F.silu)
    grads = torch.zeros_like(case.logits)
    for t in range(len(case.x)):
        if not mask[t]:
            continue
        own, values = rule, surprise[t : t + 1]
        if not lesson[t]:
            own, values = replace(rule, candidates="active"), values * case.weights[t]
        active, everyone = case.weights[t : t + 1] != 0, torch.ones(1, dtype=torch.bool)
        targets = smk_targets(values, active, everyone, own)
        grads[t] = smk_logits_grad(case.logits[t : t + 1], targets)[0] * COEF / len(case.x)
    return grads


@pytest.mark.parametrize("options", [{}, {"chunk_tokens": 7}], ids=["whole", "chunks"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["gain", "parameters", "input"])
def test_every_path_teaches_what_the_definition_says_token_by_token(kind, path, options):
    if path == "grouped":
        options = {}
    case, mask = make_case(23), torch.arange(23) % 4 != 0
    rule = replace(RULE, surprise=kind)
    step = smk_step(23, rule, lesson_shift=5)
    leaves = case.leaves()
    layer = PATHS[path].expert_layer
    y = layer(*leaves, activation=F.silu, smk=step, token_mask_T=mask, **options)
    *others, of_logits = torch.autograd.grad(y, leaves, case.grad_y)
    lesson = lesson_tokens(23, 0.3, 5)
    assert_close(of_logits, by_token(case, rule, lesson, mask))
    assert of_logits[lesson & mask].any() and of_logits[~lesson & mask].any()
    # All else is as without a lesson.
    plain = layer(*leaves, activation=F.silu)
    assert_close(y, plain)
    assert_close(others, list(torch.autograd.grad(plain, leaves[:4], case.grad_y)))


@pytest.mark.parametrize("targets", ["single", "set", "member", "helpful", "regress"])
def test_the_gradient_and_the_tally_are_the_sums_of_both_kinds_of_tokens(targets):
    case, mask = make_case(40), torch.arange(40) % 4 != 0
    rule = replace(RULE, targets=targets, num_targets=2)
    lesson = lesson_tokens(40, 0.3, 1)
    parts = (
        (rule, mask),
        (replace(rule, lesson_share=1.0), mask & lesson),
        (replace(rule, candidates="active"), mask & ~lesson),
    )
    grads, tallies = [], []
    for own, tokens in parts:
        tallies.append(SurpriseTally.of_layers(1, 5, torch.device("cpu"))[0])
        step = smk_step(40, own, tally=tallies[-1], lesson_shift=1)
        surprise = torch.sin(torch.arange(200.0)).view(40, 5)
        active = case.weights != 0
        routing = RoutingTables(case.weights.float(), case.logits, active, tokens)
        grads.append(router_gradient(step, surprise, routing))
    assert_close(grads[0], grads[1] + grads[2])
    assert grads[1].any() and grads[2].any()
    for whole, first, second in zip(*tallies, strict=True):
        assert_close(whole, first + second)


def test_steps_shift_the_lesson_and_repeat_in_every_checkpointing_mode():
    rows = make_rows((20, 11, 30, 28), 32)
    states = {}
    for mode in ("none", "layer", "selective"):
        config = change(CONFIG, smk={"candidates": "all", "lesson_share": 0.5})
        for step in (0, 1):
            student = make_student(config, MlpInputs(make_dense(), rows))
            checkpoint_layers(student, mode)
            optimizer = build_optimizer(student, config.optim)
            distill_step(student, make_dense(), optimizer, rows[:2], config, step=step)
            states[mode, step] = {
                name: tensor for name, tensor in student.state_dict().items() if "router" in name
            }
    for (mode, step), state in states.items():
        for name, tensor in state.items():
            assert torch.equal(tensor, states["none", step][name]), (mode, step, name)
    first, second = (states["none", step] for step in (0, 1))
    assert any(not torch.equal(first[name], second[name]) for name in first if "weight" in name)
