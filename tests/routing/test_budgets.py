"""One student at several budgets: thresholds from text, kept, and found again without it."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import CONFIG, make_dense, make_rows, make_student
from tiny_onn.config.checks import parse_budgets
from tiny_onn.config.schema import BudgetScope, LossConfig
from tiny_onn.conversion.convert import all_experts_on
from tiny_onn.errors import UserError
from tiny_onn.evaluation.compare import evaluate
from tiny_onn.evaluation.frontier import default_budgets
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.routing import budgets
from tiny_onn.routing.budgets import (
    fill_threshold_tables,
    fit_eval_thresholds,
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
