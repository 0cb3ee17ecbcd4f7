"""Sentences of the report: what a page says of a run is what its records hold."""

import re
from dataclasses import replace

import pytest

from tiny_onn.report.sentences import (
    against_controls,
    gate_of,
    health_of,
    routing_of,
    state_of,
    status_of,
)
from tiny_onn.report.tables import headline
from tiny_onn.runs.lock import run_lock
from tiny_onn.studies.report import read_run

pytestmark = pytest.mark.usefixtures("quiet")


def test_an_interrupted_run_says_how_far_it_came(runs):
    run = read_run(runs / "student")
    assert state_of(run) == "The run finished after 384 training tokens."
    assert run.summary is not None
    cut = replace(run, summary={**run.summary, "interrupted": True}, records=run.records[:4])
    assert re.search(r"stopped after \d+ of 384 training tokens \(\d+%\)", state_of(cut))
    assert "`tiny-onn distill --resume --out FOLDER`" in state_of(cut)
    assert health_of(cut).startswith("Stopped. ")
    # A run that a signal stopped has no summary if its last evaluation would have taken long.
    assert state_of(replace(cut, summary=None)) == state_of(cut)


def test_an_unfinished_run_is_not_shown_as_a_healthy_one(runs):
    well = {"verdict": "healthy", "findings": []}
    run = replace(read_run(runs / "student"), health=well)
    assert status_of(run) == "healthy"
    cut = replace(run, summary=None)
    assert status_of(cut) == "early"
    assert health_of(cut).startswith("Stopped. Healthy so far: ")
    young = replace(cut, records=run.records[:2])
    assert health_of(young).startswith("Stopped. It is too early to tell its health")
    assert status_of(replace(cut, health={**well, "verdict": "dead"})) == "dead"


def test_a_run_that_trains_and_one_that_was_killed_are_told_from_an_interrupted_one(runs, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (folder / name).write_bytes((runs / "student" / name).read_bytes())
    assert health_of(read_run(folder)).startswith("Stopped. ")
    with run_lock(folder):
        training = read_run(folder)
    assert health_of(training).startswith("Still training. ")
    assert state_of(training).startswith("The run still trains: 384 of 384")
    (folder / "lock").touch()
    killed = read_run(folder)
    assert health_of(killed).startswith("Killed. ")
    assert "process ended without saving" in state_of(killed)


def test_the_verdict_names_the_number_of_findings(runs):
    run = read_run(runs / "student")
    finding = {"severity": "dead", "code": "x", "what": "y", "advice": "z"}
    dead = replace(run, health={"verdict": "dead", "findings": [finding, finding]})
    assert health_of(dead).startswith("Dead: 2 rules of the health check object")
    well = replace(run, health={"verdict": "healthy", "findings": []})
    assert health_of(well).startswith("Healthy")


def test_a_student_is_held_against_its_control_at_the_controls_k(runs):
    student, control = read_run(runs / "student"), read_run(runs / "static")
    (sentence,) = against_controls([student, control])
    assert "at the same 4.00 active experts per token" in sentence
    (alone,) = against_controls([replace(student, frontier=None), control])
    assert ("the same" in alone) == (abs(student.evaluations[-1]["mean_k"] / 4 - 1) <= 1e-3)
    (none,) = against_controls([student])
    assert none.startswith("There is no control to compare with")


@pytest.mark.parametrize(
    ("kl", "verb", "where"),
    [
        (0.5, "beats", "outside"),
        (0.1, "loses to", "outside"),
        (0.32, "cannot be told apart from", "inside"),
    ],
)
def test_a_student_beats_a_control_only_outside_its_interval(runs, kl, verb, where):
    student, control = read_run(runs / "student"), read_run(runs / "static")
    assert student.frontier is not None
    (point,) = [exact for exact in student.frontier["exact"] if exact["mean_k"] == 4.0]
    exact = {**point, "forward_kl": 0.3, "intervals": {"forward_kl": [0.2, 0.4]}}
    student = replace(student, frontier={**student.frontier, "exact": [exact]})
    control = replace(control, records=[{**control.evaluations[-1], "forward_kl": kl}])
    (sentence,) = against_controls([student, control])
    assert f"student {verb} static at the same 4.00 active experts" in sentence
    assert f"lies {where} the student's 95 % interval over documents, 0.2000 to 0.4000" in sentence
    shorter = replace(control, records=[{**control.records[0], "tokens": 128}])
    (sentence,) = against_controls([student, shorter])
    assert "did not train equally long: 384 and 128 tokens" in sentence


def test_an_untrained_student_is_not_held_against_a_control(runs):
    student, control = read_run(runs / "student"), read_run(runs / "static")
    young = replace(student, records=student.evaluations[:1], frontier=None)
    (sentence,) = against_controls([young, control])
    assert "nothing can be said yet" in sentence
    assert headline([young]).rows[-1][0] == "student, untrained"


def test_unused_experts_are_counted_from_the_load(runs):
    run = read_run(runs / "static")
    unused = sum(load == 0 for row in run.evaluations[-1]["layers"]["load"] for load in row)
    assert f"{unused} of 16 experts are used by no token, as a static choice" in routing_of(run)


def test_routing_is_said_to_depend_on_the_token_only_where_it_does(runs):
    assert routing_of(read_run(runs / "static")).startswith(
        "Every token has the same experts, in every layer. "
    )
    student = read_run(runs / "student")
    assert routing_of(student).startswith(
        "Which experts a token has depends on the token in every layer, and so does their number. "
    )
    last = student.evaluations[-1]
    entropy = [0.0, *last["layers"]["load_entropy"][1:]]
    mixed = {**last, "layers": {**last["layers"], "load_entropy": entropy}}
    assert "depends on the token in 1 of 2 layers" in routing_of(replace(student, records=[mixed]))


def test_the_gate_is_said_to_know_the_token_only_above_another_tokens_target(runs):
    student = read_run(runs / "student")
    smk = student.steps[-1]["smk"] | {"num_targets": 1000, "shuffled": 0.2}
    known = ((0.4, "know something"), (0.23, "know little"), (0.2, "know how popular"))
    for agreement, words in known:
        step = {**student.steps[-1], "smk": {**smk, "agreement": agreement}}
        assert gate_of(replace(student, records=[step])).startswith(f"The gates {words}")
