"""Sick students, made so and trained for real, are named by the verdict; a well one is not."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tiny import CONFIG, change, make_dense, make_tokenizer, save_teacher, write_corpus
from tiny_onn.config.schema import RunConfig
from tiny_onn.conversion.pipeline import prepare
from tiny_onn.data.rows import training_rows
from tiny_onn.distill.health import HealthWatch, diagnose, verdict
from tiny_onn.distill.loop import run_distill
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import last_hidden_states
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.runs.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("quiet")

STEPS = 24


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    """The default recipe on a teacher that has learned its text: random ones know nothing."""
    folder = tmp_path_factory.mktemp("health")
    base = change(
        CONFIG,
        teacher={"path": str(folder / "teacher")},
        experts={"init": "importance", "gate_init": "ridge"},
        router={"budget_form": "threshold"},
        smk={"surprise": "gain", "direction": "max", "candidates": "all"},
        data={
            "sources": (str(write_corpus(folder / "corpus")),),
            "row_tokens": 64,
            "eval_tokens": 256,
            "held_out_fraction": 0.2,
            "settling_fraction": 0.05,
        },
        optim={"expert_lr": 3e-3, "gate_lr": 3e-3},
        train={"tokens": STEPS * 64, "eval_every_tokens": 0, "save_every_tokens": 0},
    )
    dense, tokenizer = make_dense(vocab_size=320), make_tokenizer()
    dense.requires_grad_(True)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=3e-3)
    stream = training_rows(base, tokenizer)
    for _ in range(150):
        row = next(stream)
        head = dense.get_output_embeddings()
        assert isinstance(head, torch.nn.Linear)
        logits = head(last_hidden_states(dense, row.input_ids, **packed_kwargs(row)))
        F.cross_entropy(logits[0], row.labels[0], ignore_index=-100).backward()
        optimizer.step()
        optimizer.zero_grad()
    dense.requires_grad_(False).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    return base


def run(config, out, sicken: Callable[[TinyOnnForCausalLM], None] = lambda _: None):
    """A run whose student was made sick before its first step: its records and its verdict."""
    prepared = prepare(config)
    with torch.no_grad():
        sicken(prepared.student)
    run_distill(config, out=out, prepared=prepared)
    health = json.loads((out / "summary.json").read_text())["health"]
    return read_metrics(out / "metrics.jsonl"), health


@pytest.fixture(scope="module")
def well(config, tmp_path_factory):
    return run(config, tmp_path_factory.mktemp("well") / "run")


def codes(health, severity=None):
    return {f["code"] for f in health["findings"] if severity in (None, f["severity"])}


def test_a_normal_run_is_healthy(well, config):
    records, health = well
    assert health == {"verdict": "healthy", "findings": []}
    assert [record["kind"] for record in records] == ["start", *["step"] * STEPS, "end"]
    assert records[-1]["teacher_nll"] < 0.7 * records[-1]["unigram_nll"]
    assert diagnose(records, config) == []


def zero_experts(student):
    for bank in student.banks():
        bank.experts.gate_up_proj.zero_()
        bank.experts.down_proj.zero_()


def cut_expert_gradients(student):
    for bank in student.banks():
        for parameter in (bank.experts.gate_up_proj, bank.experts.down_proj):
            parameter.register_hook(torch.zeros_like)


def saturate(student):
    for bank in student.banks():
        bank.router.weight.mul_(1000)


def always_expert_3(student):
    for bank in student.banks():
        bank.router.weight.zero_()
        bank.router.bias.zero_()
        bank.router.bias[3] = 1


def flatten(student):
    for bank in student.banks():
        bank.router.weight.zero_()
        bank.router.bias.zero_()


def loosen_budget(student):
    for bank in student.banks():
        bank.router.threshold.fill_(-1)
        bank.router.num_updates.fill_(1e6)


def one_loud_expert(student):
    """Expert 0 is always the largest, the gate always says so, and the sum is noise."""
    for bank in student.banks():
        bank.experts.down_proj[0] = torch.randn(bank.experts.down_proj[0].shape) * 100
        bank.experts.gate_up_proj[0] *= 100
        bank.router.weight.zero_()
        bank.router.bias[0] = 4


def one_silent_layer(student):
    student.banks()[1].experts.down_proj.zero_()


TOP_K = {"selection": "top_k"}
STILL = {"expert_lr": 0.0, "gate_lr": 0.0}
SICK: dict[str, tuple[Callable[..., None], dict[str, dict[str, Any]], set[str]]] = {
    "zero experts": (
        zero_experts,
        {},
        {"silent_layers", "no_targets", "no_expert_gradient", "no_gate_gradient"},
    ),
    "one silent layer": (one_silent_layer, {"optim": STILL}, {"silent_layers"}),
    "cut gradients": (cut_expert_gradients, {}, {"no_expert_gradient"}),
    "a gate without gradient": (lambda _: None, {"smk": {"coef": 0.0}}, {"no_gate_gradient"}),
    "saturated gates": (saturate, {"router": TOP_K, "optim": STILL}, {"saturated_gates"}),
    "flat gates": (flatten, {"router": TOP_K, "optim": STILL}, {"tied_gates", "same_experts"}),
    "one expert for all": (
        always_expert_3,
        {"router": TOP_K | {"target_k": 1.0}, "optim": STILL},
        {"one_expert", "same_experts"},
    ),
    "a surprise that is the same for all": (
        lambda _: None,
        {"smk": {"surprise": "output"}},
        {"no_targets", "no_gate_gradient"},
    ),
    "agreement on a dead model": (
        one_loud_expert,
        {"smk": {"surprise": "magnitude"}, "optim": STILL, "router": TOP_K},
        {"above_unigram", "same_experts"},
    ),
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_model_is_named_dead(name, config, tmp_path, capsys):
    sicken, changes, wanted = SICK[name]
    changed = change(config, **changes)
    records, health = run(changed, tmp_path / "run", sicken)
    assert codes(health, "dead") >= wanted
    assert health["verdict"] == "dead"
    # Once each, when it was first seen, with what to do about it.
    said = capsys.readouterr().err
    for finding in health["findings"]:
        lines = [line for line in said.splitlines() if f"({finding['code']})" in line]
        assert len(lines) == 1
        assert lines[0].endswith(finding["advice"])
    assert health == verdict(diagnose(records, changed))


def test_agreement_on_a_dead_model_does_not_count(config, tmp_path):
    sicken, changes, _ = SICK["agreement on a dead model"]
    records, health = run(change(config, **changes), tmp_path / "run", sicken)
    smk = records[-2]["smk"]
    assert isinstance(smk, dict)
    assert smk["agreement"] > 0.96
    assert smk["shuffled"] > 0.96
    assert smk["chance"] == pytest.approx(1 / 8)
    assert "agreement_of_chance" in codes(health)
    assert health["verdict"] == "dead"


def test_a_budget_that_is_off_its_target_is_suspicious(config, tmp_path):
    changed = change(config, router={"budget_rate": 0.0})
    records, health = run(changed, tmp_path / "run", loosen_budget)
    # Evaluations fit their own thresholds, so that only the steps show it.
    assert records[-2]["mean_k"] == 8
    assert codes(health, "suspicious") >= {"k_off_target"}


def test_training_that_harms_is_suspicious(config, tmp_path):
    changed = change(
        config,
        optim={"expert_lr": 0.03, "warmup_fraction": 0.0},
        # The check of the first steps would end such a run.
        train={"stop_if_worse": False},
    )
    records, health = run(changed, tmp_path / "run")
    before, after = records[0]["forward_kl"], records[-1]["forward_kl"]
    assert isinstance(before, float)
    assert isinstance(after, float)
    assert after > before
    assert "worse_than_untrained" in codes(health)


def test_random_experts_that_were_not_trained_use_no_context(config, tmp_path):
    changed = change(config, experts={"init": "random"}, optim=STILL)
    records, health = run(changed, tmp_path / "run", lambda student: scale(student, 30.0))
    assert codes(health, "dead") >= {"above_uniform", "above_unigram"}
    # Before the first step nothing is held against it.
    assert diagnose(records[:1], changed) == []


def scale(student, factor):
    for bank in student.banks():
        bank.experts.down_proj.mul_(factor)
        bank.experts.gate_up_proj.mul_(factor)


def test_a_teacher_that_does_not_know_the_text_is_told(config, tmp_path):
    changed = change(config, teacher={"path": str(save_teacher(tmp_path / "random"))})
    _, health = run(changed, tmp_path / "run")
    assert "teacher_above_unigram" in codes(health, "suspicious")
    assert "above_unigram" not in codes(health)


@pytest.mark.parametrize("selection", ["static", "random"])
def test_controls_are_not_ill_for_being_what_they_are(selection, config, tmp_path):
    changed = change(config, router={"selection": selection, "objective": "none"})
    records, health = run(changed, tmp_path / "run")
    assert not codes(health) & {"same_experts", "dead_experts", "no_gate_gradient", "tied_gates"}
    # A random gate does not learn, so that more training is no remedy.
    blind = {**records[-1], "teacher_nll": 1.0, "unigram_nll": 2.0, "student_nll": 3.0}
    advice = {finding.code: finding.advice for finding in diagnose([blind], changed)}
    assert ("train longer" in advice["above_unigram"]) == (selection == "static")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("end", "forward_kl"),
        ("end", "student_nll"),
        ("end", "teacher_entropy"),
        ("end", "dead_experts"),
        ("step", "gate_entropy"),
        ("step", "tie_rate"),
        ("step", "expert_grad_norm"),
        ("step", "gate_grad_norm"),
        ("step", "mean_k"),
        ("step", "zero_expert_rate"),
        ("smk", "targets"),
        ("smk", "agreement"),
    ],
)
def test_a_number_that_is_none_is_no_sign_of_health(kind, name, well, config):
    records = json.loads(json.dumps(well[0]))
    for record in records:
        if kind == "smk" and record["kind"] == "step":
            record["smk"][name] = math.nan
        elif record["kind"] == kind:
            record[name] = math.nan
    assert diagnose(records, config)


def test_a_resumed_watch_repeats_nothing(config, tmp_path, capsys):
    records, _ = run(config, tmp_path / "run", zero_experts)
    capsys.readouterr()
    watch = HealthWatch(config, "again", list(records[:-1]))
    watch.observe(records[-1])
    known = {finding.code for finding in diagnose(records[:-1], config)}
    new = {finding.code for finding in diagnose(records, config)} - known
    assert capsys.readouterr().err.count("again: ") == len(new) > 0


def test_a_long_run_is_judged_by_its_last_steps(well, config):
    records = list(well[0])
    start, step = records[0], records[1]
    assert isinstance(step["smk"], dict)
    dead = step | {"smk": step["smk"] | {"targets": 0.0}}
    watch = HealthWatch(config, "long", [])
    for record in [start, *[dead] * 40, *[step] * 40]:
        watch.observe(record)
    assert watch.verdict()["verdict"] == "healthy"
    for record in [dead] * 40:
        watch.observe(record)
    assert codes(watch.verdict()) == {"no_targets"}
    assert len(watch.records) < 50


def test_a_budget_missed_by_more_than_chance_is_suspicious(well, config):
    records, _ = well
    last = records[-1]
    for missed, error, found in ((0.03, 0.01, True), (0.03, 0.08, False), (0.01, 0.0, False)):
        changed = {**last, "mean_k": 4.0 * (1 + missed), "k_error": error}
        named = {finding.code for finding in diagnose([*records[:-1], changed], config)}
        assert ("held_out_k" in named) == found, (missed, error)
    # Runs of before have no such error, and one document gives none.
    without = {**last, "mean_k": 5.0, "k_error": None}
    assert diagnose([*records[:-1], without], config) == []
    del without["k_error"]
    assert diagnose([*records[:-1], without], config) == []
