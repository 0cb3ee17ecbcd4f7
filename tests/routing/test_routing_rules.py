"""Every selection with every objective: it trains, or it is refused with the setting's name."""

import itertools
from typing import Any, get_args

import pytest
import torch

from experiments import routing_rules
from repository import ROOT
from tiny import CONFIG, change, make_dense, make_rows
from tiny_onn.config.checks import validate
from tiny_onn.config.schema import Objective, Selection, Weighting
from tiny_onn.conversion import pipeline as prepare
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.step import distill_step
from tiny_onn.errors import UserError
from tiny_onn.evaluation.compare import evaluate
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.routing.budgets import fit_eval_thresholds
from tiny_onn.teacher.held_out import HeldOut

ROWS = make_rows((14, 9, 16, 12, 13, 16), 16)
PAIRS = list(itertools.product(get_args(Selection), get_args(Objective)))


def configs_of(selection, objective):
    """Every weighting, and the budget forms and candidates where they matter."""
    forms = ("cumulative", "threshold") if selection == "budget" else ("threshold",)
    candidates = ("active", "all") if objective == "smk" else ("all",)
    for weighting, form, among in itertools.product(get_args(Weighting), forms, candidates):
        yield change(
            CONFIG,
            experts={"weighting": weighting, "calibration_tokens": 32},
            router={"selection": selection, "objective": objective, "budget_form": form},
            smk={"candidates": among},
            data={"row_tokens": 16},
        )


@pytest.fixture(scope="module")
def dense():
    return make_dense("llama")


def train(config, dense, num_steps=3):
    student = prepare.make_student(config, MlpInputs(dense, ROWS[:2]))
    optimizer = build_optimizer(student, config.optim)
    losses = []
    for step in range(num_steps):
        rows = [ROWS[step % len(ROWS)]]
        losses.append(distill_step(student, dense, optimizer, rows, config, step=step).loss)
    return student, torch.stack(losses)


@pytest.mark.parametrize(("selection", "objective"), PAIRS)
def test_every_pair_trains_or_is_refused_by_name(selection, objective, dense):
    for config in configs_of(selection, objective):
        try:
            validate(config)
        except UserError as error:
            named = str(error).partition(":")[0]
            assert named in ("router.objective", "experts.weighting")
            assert f'router.selection = "{selection}"' in str(error)
            assert "; set " in str(error)
            assert "\n" not in str(error)
            continue
        student, losses = train(config, dense)
        assert losses.isfinite().all()
        assert all(p.isfinite().all() for p in student.parameters())
        gates = [name for name, p in student.trainable().items() if p.requires_grad]
        assert any(".router." in name for name in gates) == (objective != "none")


def test_what_is_refused_is_what_makes_no_sense():
    refused = set()
    for selection, objective in PAIRS:
        for config in configs_of(selection, objective):
            try:
                validate(config)
            except UserError:
                refused.add((selection, objective, config.experts.weighting))
    controls = {
        (selection, objective, weighting)
        for selection in ("static", "random", "oracle")
        for objective in ("smk", "task", "regression")
        for weighting in get_args(Weighting)
    }
    top_any = {("top_any", o, w) for o in ("smk", "regression") for w in get_args(Weighting)}
    top_any |= {("top_any", o, w) for o in ("task", "none") for w in ("softmax", "sigmoid")}
    # The ramp rises from the threshold of a budget in its threshold form.
    ramp = {(selection, objective, "ramp") for selection, objective in PAIRS}
    assert refused == controls | top_any | ramp


ROUTER_MISTAKES = [
    ({"selection": "top_k", "budget_scope": "global"}, {}, "router.budget_scope"),
    ({"oracle_budget": True}, {}, "router.oracle_budget"),
    ({"at_least_one": "always"}, {}, "router.at_least_one"),
    ({"reseed_every_steps": 3}, {}, "router.reseed_every_steps"),
    ({"selection": "oracle", "objective": "none", "balance_rate": 0.1}, {}, "router.balance_rate"),
    (
        {"selection": "static", "objective": "none", "revive_after_steps": 2},
        {},
        "router.revive_after_steps",
    ),
    ({"objective": "task"}, {"explore_fraction": 0.1}, "smk.explore_fraction"),
    ({}, {"explore_fraction": 0.1, "candidates": "all"}, "smk.explore_fraction"),
    (
        {"selection": "top_k", "target_k": 8.0},
        {"explore_fraction": 0.1, "candidates": "active"},
        "smk.explore_fraction",
    ),
    ({"selection": "oracle", "objective": "none", "target_k": 2.5}, {}, "router.target_k"),
]


@pytest.mark.parametrize(("router", "smk", "named"), ROUTER_MISTAKES)
def test_a_setting_that_would_do_nothing_is_refused_by_name(router, smk, named):
    with pytest.raises(UserError, match=f"^{named}: got .*, expected .*: .*; ") as caught:
        validate(change(CONFIG, router=router, smk=smk))
    assert "\n" not in str(caught.value)


def test_top_any_refuses_a_linear_gate_and_a_frozen_one_that_reseeds():
    top_any = {"selection": "top_any", "objective": "none", "reseed_every_steps": 3}
    config = change(CONFIG, router=top_any)
    with pytest.raises(UserError, match=r"^router.reseed_every_steps: got 3, expected 0"):
        validate(config)
    ridge = change(config, experts={"gate_init": "ridge"}, router={"reseed_every_steps": 0})
    with pytest.raises(UserError, match=r'^experts.gate_init: got "ridge", expected "random"'):
        validate(ridge)


OPTIONS = [
    ({"budget_scope": "global"}, {}),
    ({"balance_rate": 0.01, "revive_after_steps": 1}, {}),
    ({"objective": "task", "budget_form": "threshold", "straight_through": "threshold"}, {}),
    ({}, {"explore_fraction": 0.3}),
    ({}, {"targets": "regress"}),
    ({}, {"targets": "regress", "candidates": "all", "surprise": "gain", "direction": "max"}),
    ({"selection": "oracle", "objective": "none", "oracle_budget": True, "target_k": 2.5}, {}),
    ({"selection": "top_any", "objective": "task", "at_least_one": "always"}, {}),
    (
        {
            "selection": "top_any",
            "objective": "task",
            "reseed_every_steps": 2,
            "balance_rate": 0.01,
            "revive_after_steps": 1,
        },
        {},
    ),
]


@pytest.mark.parametrize(("router", "smk"), OPTIONS)
def test_options_train_settle_evaluate_and_repeat_bit_for_bit(router, smk, dense):
    config = change(CONFIG, router=router, smk=smk, data={"row_tokens": 16})
    validate(config)
    student, losses = train(config, dense)
    again, same = train(config, dense)
    assert losses.isfinite().all()
    assert torch.equal(losses, same)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    fit_eval_thresholds(student, ROWS, config.router.budget_scope)
    result = evaluate(student, HeldOut(dense, ROWS), config.loss)
    assert 1 <= result.mean_k <= 8


@pytest.mark.parametrize("selection", ["top_any", "oracle"])
def test_a_saved_student_routes_as_before_and_generates(selection, dense, tmp_path):
    objective = "none" if selection == "oracle" else "task"
    config = change(CONFIG, router={"selection": selection, "objective": objective})
    student, _ = train(config, dense)
    student.train(False)
    student.save_pretrained(tmp_path)
    loaded = TinyOnnForCausalLM.from_pretrained(tmp_path)
    ids = ROWS[0].input_ids
    with torch.no_grad():
        # Another implementation of attention, so not the same bits.
        got, expected = loaded(input_ids=ids).logits, student(input_ids=ids).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    generated: Any = loaded
    assert generated.generate(ids[:, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_the_table_in_the_docs_is_what_the_record_renders_to():
    text = routing_rules.PAGE.read_text(encoding="utf-8")
    record = routing_rules.read_record()
    assert routing_rules.filled(text) == text
    assert routing_rules.render(record) in text
    if record is not None:
        assert [(r["selection"], r["objective"]) for r in record["rows"]] == PAIRS
        assert not record["settings"]["smoke"]


def test_the_table_has_a_line_for_every_pair():
    measured = {"kl_before": 1.0, "kl_after": 0.5, "mean_k": 16.0, "step_s": 2.0}
    rows = [
        {"selection": s, "objective": o, **measured, "dead_experts": 3, "dead_layers": 0}
        for s, o in PAIRS[:-1]
    ]
    rows.append({"selection": "oracle", "objective": "none", "refused": "no reason"})
    machine = {"machine": "a machine", "versions": {"torch": "2"}}
    made = {"steps": 20, "row_tokens": 1024, "eval_tokens": 4096}
    table = routing_rules.render({"rows": rows, "settings": made, "environment": machine})
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    assert len(lines) == len(PAIRS)
    assert lines[0] == "| `top_k` | `smk` | 1.000 | 0.500 | 16.00 | 3 | 0 | 1.00 |"
    assert lines[-1] == "| `oracle` | `none` | refused: no reason | | | | | |"
    assert all(line.count(" |") == 8 for line in lines)


def test_every_rule_has_a_paragraph():
    text = (ROOT / "docs" / "routing.md").read_text(encoding="utf-8")
    for name in (*get_args(Selection), *get_args(Objective)):
        assert f"`{name}`" in text.partition("## All pairs")[0]
