"""One student at several budgets: thresholds from text, kept, and found again without it."""

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import CONFIG, make_dense, make_rows, make_student
from tiny_onn.config.checks import parse_budgets
from tiny_onn.config.schema import BudgetScope, LossConfig
from tiny_onn.conversion.convert import all_experts_on
from tiny_onn.data.packing import pack
from tiny_onn.errors import UserError
from tiny_onn.evaluation.compare import evaluate
from tiny_onn.evaluation.frontier import default_budgets
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import last_hidden_states
from tiny_onn.model.experts import recorded_routings
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.routing import budgets
from tiny_onn.routing.budgets import (
    fill_threshold_tables,
    finish_tables,
    fit_eval_thresholds,
    fit_sequence_scale,
    join_tables_to_settled,
    set_budget,
)
from tiny_onn.teacher.held_out import HeldOut

S = 2
LENGTHS = [40, 64, 30, 50, 33] * 12


def make_measured(form="threshold", scope: BudgetScope = "layer", **routing):
    """A student whose gates choose by token, its table filled, and rows it has not seen."""
    student = make_student(make_dense(), budget_form=form, **routing)
    with torch.no_grad():
        for bank in student.banks():
            bank.router.weight.mul_(30)
    fill_threshold_tables(student, make_rows(LENGTHS, 64, seed=1)[:30], scope)
    return student, make_rows(LENGTHS, 64, seed=2)[:30]


def mean_k_of(student, rows):
    return evaluate(student, HeldOut(make_dense(), rows), LossConfig()).mean_k


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("form", ["threshold", "cumulative"])
def test_mean_k_on_other_text_is_the_budget(form, scope):
    student, rows = make_measured(form, scope)
    for budget in (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.5, 2.0, 1.0):
        set_budget(student, budget)
        assert mean_k_of(student, rows) == pytest.approx(budget, rel=0.05), budget


def test_all_experts_are_the_model_with_all_experts_on():
    student, rows = make_measured()
    set_budget(student, 8.0)
    ids = rows[0].input_ids
    with torch.no_grad():
        got = student(input_ids=ids).logits
        with all_experts_on(student.banks()):
            assert torch.equal(got, student(input_ids=ids).logits)


def test_measuring_changes_nothing_but_the_table():
    student, rows = make_measured()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    fill_threshold_tables(student.train(), rows)
    assert student.training
    changed = {
        name
        for name, tensor in student.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed
    assert {name.rpartition(".")[2] for name in changed} == {"threshold_table"}


def test_tables_are_measured_on_rows_of_all_the_text(monkeypatch):
    student, rows = make_measured()
    fill_threshold_tables(student, [rows[0], rows[10], rows[20]])
    expected = [bank.router.threshold_table.clone() for bank in student.banks()]
    monkeypatch.setattr(budgets, "TABLE_TOKENS", 3 * 64 - 1)
    fill_threshold_tables(student, rows)
    for bank, table in zip(student.banks(), expected, strict=True):
        assert torch.equal(bank.router.threshold_table, table)


@pytest.mark.parametrize("target", [4.0, 4.5])
def test_tables_agree_with_the_settled_thresholds(target):
    student, rows = make_measured(target_k=target)
    fit_eval_thresholds(student, rows)
    settled = [bank.router.settled.clone() for bank in student.banks()]
    few = [bank.router.threshold_table.clone() for bank in student.banks()]
    join_tables_to_settled(student)
    for bank, before in zip(student.banks(), few, strict=True):
        table = bank.router.threshold_table
        assert (table.diff() <= 0).all()
        torch.testing.assert_close(table[3] / before[3], table[5] / before[5])
        assert not torch.equal(table, before)
    set_budget(student, target)
    for bank, threshold in zip(student.banks(), settled, strict=True):
        torch.testing.assert_close(bank.router.settled, threshold)
    for budget in (8.0, 6.0, 3.0, 2.0, 1.0):
        set_budget(student, budget)
        assert mean_k_of(student, rows) == pytest.approx(budget, rel=0.05), budget


@torch.no_grad()
def k_of(student, row):
    """Mean k over layers of every token of a row, (T)."""
    with recorded_routings(student.banks()) as routings:
        last_hidden_states(student, row.input_ids, **packed_kwargs(row))
    return torch.stack([routing.active.sum(-1) for routing in routings]).float().mean(0)


def make_falling(student, seed, length=256):
    """Rows of one document each, whose later tokens are ever more of those that use few experts."""
    text = make_rows([length] * 8, length)
    ids_T = torch.cat([row.input_ids[0] for row in text])
    k_T = torch.cat([k_of(student, row) for row in text])
    mean_k = {token: float(k_T[ids_T == token].mean()) for token in ids_T.unique().tolist()}
    tokens = torch.tensor(sorted(mean_k, key=lambda token: -mean_k[token]))
    chance = torch.rand(32, length, generator=torch.Generator().manual_seed(seed))
    places = (torch.arange(length) / length * 0.25 + chance * 0.75) * len(tokens)
    return list(pack(tokens[places.long()].tolist(), row_tokens=length, pad_token_id=0))


@pytest.mark.parametrize("target", [4.0, 3.5])
def test_followed_sequences_use_the_target_on_text_whose_k_falls(target):
    student, rows = make_measured(target_k=target)
    student.eval()
    fit_eval_thresholds(student, rows)
    rows, others = make_falling(student, seed=1), make_falling(student, seed=2)
    fit_eval_thresholds(student, rows)
    fill_threshold_tables(student, rows)
    join_tables_to_settled(student)

    def followed():
        student.routing_controller = "sequence"
        k_T = torch.cat([k_of(student, row)[row.router_mask[0]] for row in others])
        student.routing_controller = "none"
        return float(k_T.mean())

    assert followed() < 0.99 * target
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    config = student.config.to_dict()
    fit_sequence_scale(student.train(), rows)
    assert student.training
    assert student.routing_controller == "none"
    assert all(torch.equal(tensor, before[n]) for n, tensor in student.state_dict().items())
    scale = student.config.sequence_scale
    assert student.config.to_dict() == config | {"sequence_scale": scale}
    student.eval()
    assert followed() == pytest.approx(target, rel=0.005)
    # Each measurement begins anew, also while the student follows sequences.
    student.routing_controller = "sequence"
    fit_sequence_scale(student, rows)
    assert student.config.sequence_scale == scale
    assert student.routing_controller == "sequence"


def test_a_scale_stays_in_its_bounds_and_is_1_without_need():
    student, rows = make_measured()
    for bank in student.banks():
        # A table of other text: these thresholds let next to nothing pass.
        bank.router.threshold_table[:-1] = 1.0
    fit_sequence_scale(student, rows)
    assert student.config.sequence_scale == budgets.LARGEST_SCALE
    changes: list[dict[str, Any]] = [{"target_k": 8.0}, {"selection": "top_k", "objective": "none"}]
    for fixed in changes:
        student = make_student(make_dense(), **fixed)
        finish_tables(student, rows)
        assert student.config.sequence_scale == 1.0


@pytest.mark.parametrize("settled", [0.0, -1.0, 1e-30, 0.9])
def test_no_settled_threshold_spoils_a_table(settled):
    student, _ = make_measured(target_k=6.0)
    for bank in student.banks():
        bank.router.settled.fill_(settled)
    join_tables_to_settled(student)
    for bank in student.banks():
        assert (bank.router.threshold_table.diff() <= 0).all()
        assert bank.router.threshold_table.isfinite().all()


def test_thresholds_fall_with_k():
    student, _ = make_measured()
    for bank in student.banks():
        assert (bank.router.threshold_table.diff() <= 0).all()


def test_a_saved_student_keeps_its_table(tmp_path):
    student, _ = make_measured()
    student.save_pretrained(tmp_path)
    again = TinyOnnForCausalLM.from_pretrained(tmp_path)
    for ours, theirs in zip(student.banks(), again.banks(), strict=True):
        assert torch.equal(ours.router.threshold_table, theirs.router.threshold_table)
    set_budget(again, 3.0)


def test_a_student_of_before_has_no_table_and_says_what_to_do(tmp_path):
    student, _ = make_measured()
    student.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if "threshold_table" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    old = TinyOnnForCausalLM.from_pretrained(tmp_path)
    threshold = old.banks()[0].router.settled.item()
    with pytest.raises(UserError, match=r"without measured thresholds.*tiny-onn distill --resume"):
        set_budget(old, 3.0)
    assert old.banks()[0].router.settled.item() == threshold
    assert old.banks()[0].router.threshold_table.eq(0).all()


@pytest.mark.parametrize("selection", ["top_k", "static", "random"])
def test_a_fixed_selection_takes_whole_numbers_and_needs_no_table(selection):
    student = make_student(make_dense(), selection=selection, objective="none")
    rows = make_rows(LENGTHS, 64)[:2]
    fill_threshold_tables(student, rows)
    assert student.banks()[0].router.threshold_table.eq(0).all()
    set_budget(student, 3.0)
    assert mean_k_of(student, rows) == 3
    with pytest.raises(UserError, match=r"--budget: got 2\.5, expected a whole number"):
        set_budget(student, 2.5)


@pytest.mark.parametrize("budget", [0.5, 9.0, -1.0, math.nan, math.inf])
def test_budgets_out_of_range_are_refused(budget):
    student, _ = make_measured()
    with pytest.raises(UserError, match=r"--budget: got .*, expected 1 to 8"):
        set_budget(student, budget)


def test_budgets_are_read_from_a_list():
    assert parse_budgets("32,2.5, 8") == [32, 2.5, 8]
    with pytest.raises(UserError, match="--budget: got 3;4"):
        parse_budgets("3;4")


@pytest.mark.parametrize("form", ["threshold", "cumulative"])
def test_budgets_count_shared_experts_and_stay_above_them(form):
    student = make_student(make_dense(), budget_form=form, num_shared=S)
    with torch.no_grad():
        for bank in student.banks():
            bank.router.weight.mul_(30)
    lengths = [40, 64, 30, 50, 33] * 12
    fill_threshold_tables(student, make_rows(lengths, 64, seed=1)[:30])
    rows, dense = make_rows(lengths, 64, seed=2)[:30], make_dense()
    for budget in (8.0, 6.0, 4.5, 4.0, 3.0):
        set_budget(student, budget)
        result = evaluate(student, HeldOut(dense, rows), CONFIG.loss)
        assert result.mean_k == pytest.approx(budget, rel=0.05), budget
    assert default_budgets(student) == [8.0, 6.0, 4.0, 3.0]
    for budget in (2.0, 2.9):
        with pytest.raises(
            UserError, match=f"--budget: got {budget:g}, expected 3 to 8, .* the 2 "
        ):
            set_budget(student, budget)
