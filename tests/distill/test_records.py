"""The metrics stream is what its page says, and PI is its formula."""

import json
import math
from dataclasses import asdict

import pytest

from repository import ROOT
from tiny import write_run
from tiny_onn.distill.loop import run_distill
from tiny_onn.distill.record_docs import metrics_docs
from tiny_onn.distill.records import (
    EvaluationRecord,
    LayersRecord,
    SmkRecord,
    StepRecord,
    predictive_integrity,
)
from tiny_onn.runs.metrics import read_metrics

PAGE = ROOT / "docs" / "metrics.md"
ONLY_STEPS = {"smk_agreement", "smk_shuffled", "surprise", "active_surprise"}
ONLY_EVALUATIONS = {"oracle_overlap", "oracle_chance", "expert_norm"}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    config = write_run(
        folder,
        smk={"candidates": "all"},
        train={"tokens": 4 * 64, "stats_every_steps": 2},
    )
    run_distill(config, out=folder / "run")
    return read_metrics(folder / "run" / "metrics.jsonl")


def table(title):
    """A section's fields of the page."""
    text = PAGE.read_text("utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    return [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]


def test_the_page_is_generated():
    assert PAGE.read_text("utf-8") == metrics_docs(), "run the command at the top of the page"


def test_records_hold_the_pages_fields_in_its_order(records):
    for record in records:
        assert list(record) == table("Steps" if record["kind"] == "step" else "Evaluations")
        if record["kind"] == "step":
            assert list(record["smk"]) == table("`smk`")
        if record["layers"]:
            assert list(record["layers"]) == table("`layers`")


def test_every_field_has_a_line(records):
    for cls in (StepRecord, EvaluationRecord, SmkRecord, LayersRecord):
        assert all(f"| `{name}` | " in metrics_docs() for name in cls.__slots__)
    assert " | object | " not in metrics_docs().partition("`layers`")[0]


def test_lists_per_layer_come_where_they_are_asked_for(records):
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["layers"] is not None for record in steps] == [False, True, False, True]
    for record in records:
        if (layers := record["layers"]) is None:
            continue
        absent = ONLY_EVALUATIONS if record["kind"] == "step" else ONLY_STEPS
        assert {name for name, value in layers.items() if value is None} == absent
        assert sum(layers["mean_k"]) / 2 == pytest.approx(record["mean_k"], rel=1e-5)
        for histogram, load, k in zip(
            layers["k_histogram"], layers["load"], layers["mean_k"], strict=True
        ):
            assert sum(histogram) == layers["num_tokens"]
            assert sum(n * count for n, count in enumerate(histogram)) == sum(load)
            assert sum(load) / layers["num_tokens"] == pytest.approx(k, rel=1e-5)


def test_surprise_per_expert_adds_up(records):
    for record in (r for r in records if r["kind"] == "step" and r["layers"]):
        layers, smk = record["layers"], record["smk"]
        means = [value for row in layers["surprise"] for value in row]
        assert sum(means) / len(means) == pytest.approx(smk["mean_surprise"], rel=1e-4)
        pairs = [
            (value, count)
            for row, load in zip(layers["active_surprise"], layers["load"], strict=True)
            for value, count in zip(row, load, strict=True)
        ]
        total = sum(value * count for value, count in pairs) / sum(count for _, count in pairs)
        assert total == pytest.approx(smk["active_surprise"], rel=1e-4)


def test_pi_is_made_of_the_records_own_numbers(records):
    for record in (r for r in records if r["kind"] == "step"):
        ratio = record["loss"] / record["tau"]
        exponent = 0.5 * ratio + 0.5 * record["smk"]["active_surprise"]
        assert record["pi"] == pytest.approx(math.exp(-exponent))
        assert 0 < record["tau"] <= math.log(320)


def test_records_are_json_of_one_line_each(records):
    assert all("\n" not in json.dumps(record) for record in records)
    assert asdict(SmkRecord(**records[1]["smk"])) == records[1]["smk"]


def test_pi_is_one_without_loss_and_surprise_and_falls_with_both():
    assert predictive_integrity(0.0, 2.0, 0.0) == 1
    assert predictive_integrity(2.0, 2.0, 0.0) == pytest.approx(math.exp(-0.5))
    assert predictive_integrity(0.0, 2.0, 3.0) == pytest.approx(math.exp(-1.5))
    assert predictive_integrity(1.0, 0.0, 0.0) == 0
    assert predictive_integrity(0.0, 0.0, 0.0) == 1
    assert math.isfinite(predictive_integrity(0.0, 1.0, -1e9))


def test_pi_can_mislead():
    # The same loss looks better with a student that knows nothing than with a sure one.
    assert predictive_integrity(1.0, math.log(50_000), 0.1) > predictive_integrity(1.0, 0.5, 0.1)
