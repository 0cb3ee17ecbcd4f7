"""The refit is the least-squares solution under the real routing, and leaves sinks as they are."""

import pytest
import torch
from torch import nn

from tiny import CONFIG, FAMILIES, change, make_dense, make_rows, normal
from tiny_onn.conversion import refit as module
from tiny_onn.conversion.pipeline import make_student, refit_if_asked
from tiny_onn.conversion.refit import PENALTIES, Sample, fit_bank, refit
from tiny_onn.data.rows import needs_text
from tiny_onn.errors import UserError
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import last_hidden_states
from tiny_onn.model.experts import recorded_routings
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.student import TinyOnnForCausalLM

ROWS = make_rows((20, 13, 30, 64, 9, 40, 17, 22, 33, 64, 50, 14, 60, 64, 64, 31), 64)
NEW = make_rows((40, 24, 64, 30, 34), 64, seed=9)
RIDGE = {
    "experts": {"gate_init": "ridge", "compensation": "mean"},
    "router": {"budget_form": "threshold"},
}


def student_of(dense, **sections) -> TinyOnnForCausalLM:
    return make_student(change(CONFIG, **{**RIDGE, **sections}), MlpInputs(dense, ROWS))


def samples_of(num_rows=6, num_tokens=50) -> list[Sample]:
    """Rows of inputs and targets, whose first two tokens are large and not counted."""
    found = []
    for seed in range(num_rows):
        x, target = normal(num_tokens, 32, seed=seed), normal(num_tokens, 32, seed=seed + 100)
        x[0], target[0] = 30 * x[0], 1e3 * target[0]
        kept = torch.arange(num_tokens) == 0
        # The second token is padding: neither counted nor kept.
        found.append(Sample(x, target, torch.arange(num_tokens) > 1, kept))
    return found


def by_hand(bank, samples):
    """Features, targets and the tokens' kinds from the bank's own forward pass, by finite sums."""
    rows = []
    for sample in samples:
        routing = bank.route(sample.x_TD)
        columns = []
        for e in range(8):
            gate, up = bank.experts.gate_up_proj[e].chunk(2)
            hidden = bank.activation(sample.x_TD @ gate.T) * (sample.x_TD @ up.T)
            columns.append(hidden * routing.active[:, e, None])
        columns.append((~routing.active).float())
        rows.append(torch.cat(columns, dim=1).double())
    return rows


@torch.no_grad()
def test_a_layers_fit_is_the_penalised_least_squares_solution():
    bank = student_of(make_dense("llama")).banks()[0].train(False)
    assert bank.mean_outputs is not None
    nn.init.normal_(bank.mean_outputs, generator=torch.Generator().manual_seed(0))
    samples = samples_of()
    features = by_hand(bank, samples)
    truth = normal(56, 32, seed=7).double()
    samples = [
        sample._replace(target_TD=(Z @ truth).float() + sample.target_TD)
        for sample, Z in zip(samples, features, strict=True)
    ]
    start = torch.cat((bank.experts.down_proj.mT.flatten(0, 1), bank.mean_outputs)).double()

    def solve(numbers, penalty):
        Z = torch.cat([features[n][samples[n].counted_T] for n in numbers])
        Y = torch.cat([samples[n].target_TD[samples[n].counted_T] for n in numbers]).double()
        kept = torch.cat([features[n][samples[n].kept_T] for n in numbers])
        weight = (penalty * (Z[:, :48] ** 2).mean(-1).sum()).sqrt()
        left = torch.cat((Z, kept, weight * torch.eye(len(start)).double()))
        right = torch.cat((Y, kept @ start, weight * start))
        return torch.linalg.lstsq(left, right).solution

    def cost(numbers, weights):
        total = 0.0
        for n in numbers:
            Z, Y = features[n], samples[n].target_TD.double()
            counted = samples[n].counted_T
            total += (Y[counted] - Z[counted] @ weights).square().sum()
        return float(total)

    # Each row is two samples: what is fitted, and what chooses the penalty.
    whole = samples
    samples = [part for sample in whole for part in sample.parts()]
    features = by_hand(bank, samples)
    fit, check = range(0, 12, 2), range(1, 12, 2)
    costs = [cost(check, solve(fit, penalty)) for penalty in PENALTIES]
    best = costs.index(min(costs))
    expected = solve(range(12), PENALTIES[best])
    fraction = fit_bank(bank, whole)
    assert fraction == pytest.approx(costs[best] / cost(check, start), rel=1e-4)
    got = torch.cat((bank.experts.down_proj.mT.flatten(0, 1), bank.mean_outputs))
    torch.testing.assert_close(got, expected.float(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_layer_that_nothing_is_missing_from_stays_as_it_is():
    bank = student_of(make_dense("llama")).banks()[0].train(False)
    before = bank.experts.down_proj.clone()
    samples = [s._replace(target_TD=bank(s.x_TD)) for s in samples_of()]
    fit_bank(bank, samples)
    torch.testing.assert_close(bank.experts.down_proj, before, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def distance(student, dense, rows) -> float:
    """Mean squared distance of the last hidden states, first tokens left out."""
    total = 0.0
    for row in rows:
        hidden = [
            last_hidden_states(m, row.input_ids, **packed_kwargs(row))[0][row.router_mask[0]]
            for m in (student, dense)
        ]
        total += float((hidden[0] - hidden[1]).square().mean())
    return total / len(rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("selection", ["budget", "static"])
def test_a_refitted_student_is_closer_to_its_teacher_on_new_text(family, selection):
    dense = make_dense(family)
    objective = "none" if selection == "static" else "smk"
    student = student_of(
        dense, router={"selection": selection, "objective": objective, "budget_form": "threshold"}
    ).train(False)
    before = distance(student, dense, NEW)
    errors = refit(student, dense, ROWS)
    assert len(errors) == 2
    assert all(0 < error < 1 for error in errors)
    assert distance(student, dense, NEW) < before
    if selection == "budget":
        # Each layer meets its budget on the inputs that the refitted layers give.
        with torch.no_grad(), recorded_routings(student.banks()) as routings:
            for row in ROWS:
                last_hidden_states(student, row.input_ids, **packed_kwargs(row))
        masks = torch.cat([row.router_mask[0] for row in ROWS for _ in range(2)])
        k = torch.cat([routing.active.sum(-1) for routing in routings])[masks].float().mean()
        assert k.item() == pytest.approx(4, abs=0.02)


def test_it_repeats_bit_for_bit_and_changes_nothing_else():
    dense = make_dense("llama")
    first, second, plain = (student_of(dense).train(False) for _ in range(3))
    for student in (first, second):
        refit(student, dense, ROWS)
    refitted = ("down_proj", "mean_outputs", "router.threshold", "router.settled")
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
        same = torch.equal(tensor, plain.state_dict()[name])
        assert same or name.endswith(refitted), name


def test_the_setting_asks_for_it_and_for_text():
    dense = make_dense("llama")
    off, on = (change(CONFIG, experts={"refit": refit}) for refit in (False, True))
    assert not needs_text(change(off, router={"selection": "top_k"}))
    assert needs_text(change(on, router={"selection": "top_k"}))
    inputs = MlpInputs(dense, ROWS)
    students = [make_student(config, inputs) for config in (off, on)]
    for config, student in zip((off, on), students, strict=True):
        refit_if_asked(config, student, inputs)
    weights = [student.banks()[0].experts.down_proj for student in students]
    assert not torch.equal(*weights)


def test_a_family_whose_layers_know_more_than_their_arguments_is_refused(monkeypatch):
    dense = make_dense("llama")
    student = student_of(dense)
    run = module.Passing.run
    monkeypatch.setattr(module.Passing, "run", lambda *args: run(*args) * 1.1)
    with pytest.raises(UserError, match=r"^experts\.refit: got true, expected false .*; set"):
        refit(student, dense, ROWS)
