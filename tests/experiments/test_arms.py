"""The study of baselines: its settings are valid, its text is apart, its numbers are at equal k."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

from experiments import arms, arms_findings, arms_runs, low_rank, split_text
from experiments.arms_law import law_of
from experiments.arms_table import Job, at_k, best_runs, has_diverged, job_of, read_records, table
from experiments.blockwise import tiny_teacher
from experiments.options import RESULTS
from repository import ROOT, run_module
from tiny_onn.config.read import load_config
from tiny_onn.data.stream import is_held_out
from tiny_onn.errors import UserError
from tiny_onn.runs.lock import run_lock


def test_every_arm_has_valid_settings():
    for name, settings in arms.ARMS.items():
        load_config(None, "demo", [*arms.BASE, *settings])
        assert name == name.strip()


def test_the_kl_at_k_lies_on_straight_lines_of_its_logarithm():
    points = [(15.0, 0.4), (17.0, 0.1), (19.0, 0.05)]
    assert at_k(points, 16) == pytest.approx(0.2)
    assert at_k(points[::-1], 18) == pytest.approx(math.sqrt(0.1 * 0.05))
    assert at_k(points, 13) == pytest.approx(1.6)
    assert at_k(points, 21) == pytest.approx(0.025)
    assert at_k(points[:1], 16) == 0.4
    assert at_k([(16.0, 0.3), (16.0, 0.3)], 16) == 0.3


def test_what_is_reported_is_read_by_no_run(tmp_path):
    text = tmp_path / "text.jsonl"
    documents = [{"text": f"document {n}", "source": f"s{n % 5}"} for n in range(500)]
    text.write_text("".join(json.dumps(d) + "\n" for d in documents))
    parts = split_text.split(text, tmp_path / "out", ["s3"])
    assert split_text.split(text, tmp_path / "out", ["s3"]) == parts
    other = tmp_path / "other" / text.name
    other.parent.mkdir()
    other.write_text("".join(json.dumps(d) + "\n" for d in documents[1:]))
    assert split_text.split(other, tmp_path / "out", ["s3"]).folder != parts.folder
    assert parts.unseen is not None
    learn, report, unseen = (
        {d["text"] for path in paths for d in split_text.documents_of(path)}
        for paths in (parts.learn.glob("*.jsonl"), [parts.report], [parts.unseen])
    )
    assert learn | report | unseen == {d["text"] for d in documents}
    assert len(learn) + len(report) + len(unseen) == 500
    assert unseen == {d["text"] for d in documents if d["source"] == "s3"}
    assert 5 < len(report) < 40
    # The share that a run keeps from training is cut from the other end of the hash.
    last = ((1 << 64) - 1).to_bytes(8, "big")
    assert split_text.is_reported(last)
    assert not is_held_out(last, 0.05)


def record(rate, chosen, reported, *, arm="smk", seed=0, tokens=1_998_848, settings=()):
    report = {
        "forward_kl": reported,
        "mean_k": 16.1,
        "kl_at_k": reported,
        "perplexity_at_k": 9.0,
        "teacher_perplexity": 8.0,
    }
    return {
        "arm": arm,
        "seed": seed,
        "asked_tokens": tokens,
        "tokens": tokens,
        "target_k": 16.0,
        "rate": rate,
        "gate_rate": 1.0,
        "choose": {"before": {"forward_kl": 1.0}, "after": {"forward_kl": chosen}},
        "report": report,
        "unseen": None,
        "settings": [*settings, f"train.seed={seed}", f"optim.expert_lr={rate}"],
    }


def test_an_arm_that_ends_farther_than_it_began_has_no_numbers():
    (*_, line) = table([record(1.0, 1.5, 1.4)])
    assert "| diverged |" in line
    assert "1.4" not in line


def test_a_rate_is_chosen_on_other_text_than_it_is_reported_on():
    runs = [record(1.0, 0.2, 0.5), record(2.0, 0.1, 0.6)]
    assert best_runs(runs, 1_998_848, "smk") == [runs[1]]
    lines = [*table(runs)]
    assert "| smk | 1 | 0.5000 |" in lines[-2]
    assert "| smk at rate x 2 | 1 | 0.6000 |" in lines[-1]


def test_a_rival_has_its_best_rate_and_ours_the_one_with_most_seeds():
    for arm, rate in (("smk", 1.0), ("smk, states x 4", 1.0), ("half-width", 2.0)):
        runs = [record(1.0, 0.2, 0.5, arm=arm, seed=seed) for seed in range(2)]
        runs.append(record(2.0, 0.1, 0.6, arm=arm))
        best = best_runs(runs, 1_998_848, arm)
        assert {run["rate"] for run in best} == {rate}
        (*_, line) = arms_findings.rates(runs)
        assert line == f"| 2M | {arm} | 0.200 | 0.100 | x {rate:g} |"


def test_rates_are_compared_in_the_seeds_that_both_have():
    runs = [record(1.0, kl, 0.5, arm="half-width", seed=seed) for seed, kl in enumerate((0.1, 0.9))]
    # In its seed this rate is worse, although the mean of the other rate is higher.
    runs.append(record(2.0, 0.2, 0.6, arm="half-width"))
    assert best_runs(runs, 1_998_848, "half-width") == runs[:2]
    # It has no seed with the other in common.
    runs.append(record(3.0, 0.01, 0.6, arm="half-width", seed=7))
    assert best_runs(runs, 1_998_848, "half-width") == runs[:2]


def test_a_lead_over_a_rival_of_one_rate_is_open():
    ours, theirs = record(1.0, 0.2, 0.2), record(1.0, 0.4, 0.4, arm="half-width")
    (*_, line) = arms_findings.goals([ours, theirs], [])
    assert line.endswith("| not run | 50.0: open, one rate |")
    (*_, line) = arms_findings.goals([ours, theirs, record(2.0, 0.35, 0.35, arm="half-width")], [])
    assert line.endswith("| not run | 42.9: yes |")


def test_the_goal_on_a_manual_is_of_its_own_study():
    manual = [record(1.0, 0.09, 0.09, arm="smk, muon, features x 16")]
    (line,) = (line for line in arms_findings.goals([], manual) if "manual" in line)
    assert line.endswith("at most 0.10 | 0.090: yes | not run | not run |")


def findings(leads):
    records = [record(1.0, 0.2, 0.2, seed=seed) for seed in range(len(leads))]
    records += [
        record(1.0, 0.2, 0.2 + lead, arm="half-width", seed=seed) for seed, lead in enumerate(leads)
    ]
    sections = arms_findings.sections(records, [], records, records, [])
    return {name: [*lines] for name, lines in sections.items() if name != "machines"}


def test_a_lead_is_established_by_three_seeds_and_an_interval_without_zero():
    sure = findings([0.10, 0.11, 0.12])
    assert "| 2M | 0.110 | 0.085 to 0.135 | 0.100, 0.110, 0.120 |" in sure["established"][-1]
    assert len(sure["open"]) == 2
    for leads in ([0.10, 0.11], [0.03, 0.004, 0.005]):
        unsure = findings(leads)
        assert len(unsure["established"]) == 2
        assert "| smk | half-width |" in unsure["open"][-1]


def test_a_budget_is_shown_by_both_ways_of_setting_thresholds():
    run = record(1.0, 0.2, 0.2)
    run["report"]["counted"] = {"mean_k": 15.6, "standard_error": 0.16}
    run["report"]["followed"] = {"counted": {"mean_k": 16.08, "standard_error": 0.016}}
    settled, followed = [*arms_findings.budgets([run])][2:]
    assert settled.endswith("| mixed | settled | 1 | 15.60 | -2.5 % | 1.0 % | 1 %: missed |")
    follows = "| mixed | follow each sequence | 1 | 16.08 | +0.5 % | 0.1 % | 1 %: kept |"
    assert followed.endswith(follows)


def test_a_diverged_run_is_compared_with_nothing():
    records = [record(1.0, 0.2, 0.2), record(1.0, 4.8, 4.7, arm="half-width")]
    assert [*arms_findings.compared(records)] == []


def test_a_planted_law_is_found_with_its_interval():
    lengths = (499_712, 1_998_848, 20_000_768)
    exact = [
        record(1.0, 0.1, 0.25 * (n / 1e6) ** -0.3, tokens=n, seed=seed)
        for n in lengths
        for seed in range(2)
    ]
    law = law_of(exact, "smk")
    assert law is not None
    assert (law.scale, law.exponent) == pytest.approx((0.25, 0.3))
    assert law.half == pytest.approx(0, abs=1e-9)
    assert law.local() == pytest.approx([0.3, 0.3])
    assert "KL 0.06 takes 120M tokens by the law, and 120M at the last" in law.sentence()
    flat = [*exact, record(1.0, 0.1, 0.1017, tokens=40_001_536)]
    bent = law_of(flat, "smk")
    assert bent is not None
    assert "and more than 400M at the last of these exponents" in bent.sentence()
    assert law_of(exact[:2], "smk") is None
    unsteady = [
        record(1.0, 0.1, kl, tokens=n) for n, kl in zip(lengths, (0.5, 1.4, 0.8), strict=True)
    ]
    assert law_of(unsteady, "smk") is None
    better = record(2.0, 0.05, 0.1, tokens=1_998_848)
    rival = [{**run, "arm": "half-width"} for run in (*exact, better)]
    assert law_of(rival[:-1], "half-width") is not None
    assert law_of(rival, "half-width") is None
    # A token in a longer row has more text before it, so that such a run is on no line with others.
    longer = record(1.0, 0.1, 0.01, tokens=99_999_744)
    longer["settings"] = ["data.row_tokens=4096", "data.row_tokens=8192"]
    assert law_of([*exact, longer], "smk") == law


def test_a_plan_lists_runs_in_order_and_once():
    defaults = {"arms": ["smk"], "tokens": 9, "seeds": [0], "rates": [1.0], "gate_rates": [1.0]}
    plan = [{"tokens": 99}, {"seeds": [1, 0], "arms": ["low-rank", "smk"]}, {}]
    assert arms.planned(plan, defaults) == [
        Job("smk", 99, 0, 1.0, 1.0),
        *(Job(arm, 9, seed, 1.0, 1.0) for seed in (1, 0) for arm in ("low-rank", "smk")),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("[", "see --help"),
        ('{"arms": ["smk"]}', "expected a list of entries"),
        ('[{"rate_s": [1]}]', "entry 1: got .*rate_s.* expected arms, tokens"),
        ('[{}, ["smk"]]', "entry 2: got"),
        ('[{"arms": ["smok"]}]', "arms: got 'smok', expected a list of arms"),
        ('[{"arms": "smk"}]', "arms: got 'smk', expected a list of arms"),
        ('[{"arms": [["smk"]]}]', "expected a list of arms"),
        ('[{"tokens": 0}]', "tokens: got 0, expected an integer of at least 1"),
        ('[{"seeds": ["a"]}]', "seeds: got 'a', expected a list of integers"),
        ('[{"seeds": []}]', r"seeds: got \[\]"),
        ('[{"rates": [-1]}]', "rates: got -1, expected a list of numbers above 0"),
        ('[{"gate_rates": [NaN]}]', "gate_rates: got nan"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused_with_its_entry(tmp_path, content, message):
    path = tmp_path / "plan.json"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        arms.read_plan(path)


@pytest.mark.parametrize(
    "options",
    [
        ("--jobs", "0"),
        ("--report-tokens", "-7"),
        ("--report-row-tokens", "2"),
        ("--rates", "nan"),
        ("--seeds", "-1"),
    ],
)
def test_a_number_that_is_out_of_range_is_refused_before_any_work(options, capsys):
    with pytest.raises(SystemExit):
        arms.main(["--smoke", *options])
    assert "expected" in capsys.readouterr().err


def test_a_run_of_other_settings_is_not_taken_for_the_one_asked_for(tmp_path):
    job, parts = Job("smk", 9, 0, 1.0, 1.0), split_text.Parts(*[tmp_path] * 4)
    options = argparse.Namespace(
        plan=None, out=tmp_path, processes=1, smoke=False, set=[], device="cpu", teacher="t",
        report_tokens=64, report_row_tokens=32, arms=["smk"], tokens=9, seeds=[0], rates=[1.0],
        gate_rates=[1.0],
    )  # fmt: skip
    made = {**asdict(job), "settings": arms.settings_of(job, options, parts), "report_tokens": 64}
    (tmp_path / "arms.jsonl").write_text(json.dumps(made) + "\n")
    assert arms.jobs_left(options, parts) == []
    options.set = ["router.target_k=8"]
    with pytest.raises(UserError, match=r"router\.target_k: got 8, expected not given"):
        arms.jobs_left(options, parts)
    options.set, options.report_tokens = [], 65
    with pytest.raises(UserError, match="--report-tokens: got 65, expected 64"):
        arms.jobs_left(options, parts)


@pytest.mark.parametrize("line", ['{"arm": "smk', "", "[1]"])
def test_a_damaged_record_is_told_with_its_line(tmp_path, line):
    path = tmp_path / "arms.jsonl"
    path.write_text("{}\n" + line + "\n")
    with pytest.raises(UserError, match=r"arms\.jsonl line 2: got .* remove the line"):
        read_records(path)


def test_a_record_that_a_page_needs_is_not_taken_for_an_empty_one(tmp_path):
    assert read_records(tmp_path / "x") == []
    with pytest.raises(UserError, match="expected a record; restore it"):
        read_records(tmp_path / "x", needed=True)


def test_a_run_that_another_process_makes_is_refused(tmp_path):
    job = Job("smk", 9, 0, 1.0, 1.0)
    asked = {"job": asdict(job), "out": str(tmp_path), "settings": [], "report": {}}
    asked["parts"] = dict.fromkeys(("folder", "learn", "report", "unseen"))
    with run_lock(tmp_path / "locks" / job.name()):
        message = f"{job.name()}: got a folder in use by .* wait for that run"
        with pytest.raises(UserError, match=message):
            arms_runs.main(json.dumps(asked))


def test_the_committed_plan_lists_runs_that_can_be_made():
    lines = [*arms_findings.missing([])]
    assert lines[0].startswith("Runs of the plan")
    assert len(lines) > 2


def test_a_rule_keeps_its_numbers_where_it_does_harm():
    rule = {"arm": "smk, smallest gain", "settings": ["smk.direction=min"]}
    records = [record(1.0, 0.2, 0.2, seed=seed) for seed in range(3)]
    records += [record(1.0, 1.5, 1.4, seed=seed, **rule) for seed in range(3)]
    assert "| 1.4000 ± 0.0000 |" in [*table(records)][-1]
    ((sure, line),) = arms_findings.compared(records)
    assert sure
    assert "| 1.200 |" in line


@pytest.mark.parametrize(
    "other",
    [
        record(0.5, 0.2, 0.2),
        record(1.0, 0.2, 0.2, seed=1),
        record(1.0, 1.1, 1.1),
        record(1.0, 0.2, 0.2, settings=["router.objective=none"]),
        record(1.0, 0.2, 0.2, arm="static choice", settings=["smk.direction=min"]),
    ],
    ids=["another rate", "another seed", "worse too", "another gate", "the same rule"],
)
def test_harm_is_the_rules_only_if_the_same_run_by_another_rule_came_nearer(other):
    harmed = record(1.0, 1.5, 1.4, settings=["smk.direction=min"])
    assert has_diverged(harmed, [harmed, other])
    assert not has_diverged(harmed, [harmed, other, record(1.0, 0.9, 0.9)])
    moved = record(1.0, 0.9, 0.9, settings=['data.sources=["elsewhere"]', "optim.name=adamw"])
    assert not has_diverged(harmed, [harmed, other, moved])


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_run_without_a_finite_kl_has_diverged_and_is_not_chosen(kl):
    broken, sound = record(2.0, kl, kl), record(1.0, 0.2, 0.2)
    assert has_diverged(broken, [broken, sound])
    assert best_runs([broken, sound], 1_998_848, "smk") == [sound]


@pytest.mark.parametrize("name", ["arms", "arms_controls", "arms_in_order"])
def test_every_record_is_of_a_known_arm_and_made_once(name):
    records = read_records(RESULTS / f"{name}.jsonl")
    jobs = [job_of(record) for record in records]
    assert len(jobs) == len(set(jobs)) > 0
    assert {job.arm for job in jobs} <= arms.ARMS.keys()


def test_thin_matrices_cost_no_more_than_the_share():
    rank = low_rank.rank_of(576, 1536, 0.5)
    assert rank * (576 + 1536) <= 0.5 * 576 * 1536 < (rank + 1) * (576 + 1536)


@pytest.mark.slow
def test_runs_leave_their_lines_and_are_not_made_again(tmp_path):
    options = ["--smoke", "--tokens", "128", "--out", tmp_path, "--arms", "smk", "low-rank"]
    first = run_module("experiments.arms", *options)
    lines = (tmp_path / "arms.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for record in map(json.loads, lines):
        assert record["tokens"] == 128
        assert record["report"]["kl_at_k"] >= 0
        # The rows that are measured are longer than those of training.
        assert record["report_row_tokens"] == 128
    again = run_module("experiments.arms", *options)
    assert (tmp_path / "arms.jsonl").read_text().splitlines() == lines
    assert first.splitlines()[-4:] == again.splitlines()[-4:]


STOPPABLE = """
import os, signal, sys, time
def stop(*_):
    {stop}
signal.signal(signal.SIGTERM, stop if {handled} else signal.SIG_DFL)
print("waits", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("stop", "failed"),
    [
        ("sys.exit(130)", 0),
        (None, 0),
        ("raise MemoryError", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1),
    ],
    ids=["saves", "ends at once", "crashes", "is killed"],
)
def test_a_run_that_crashes_when_all_are_stopped_has_failed(
    stop, failed, tmp_path, monkeypatch, capsys
):
    processes = []

    def start(job, *_):
        line = [sys.executable, "-c", STOPPABLE.format(stop=stop, handled=stop is not None)]
        process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        processes.append(process)
        assert process.stdout is not None
        # No signal comes before the process waits for it.
        arms.log_of(job, options).write_text(process.stdout.readline())
        return process

    monkeypatch.setattr(arms, "start", start)
    jobs = {"arms": ["smk"], "tokens": 9, "seeds": [0], "rates": [1.0], "gate_rates": [1.0]}
    times = {"seconds": 1e9, "stop_after": 0.2}
    options = argparse.Namespace(plan=None, out=tmp_path, jobs=1, processes=1, **jobs, **times)
    assert arms.run_all(options, split_text.Parts(*[tmp_path] * 4)) == failed
    (process,) = processes
    process.stdout.close()
    said = capsys.readouterr()
    assert ("smk-9-x1-g1-s0: stopped; the same command" in said.out) == (not failed)
    assert ("smk-9-x1-g1-s0: failed" in said.err) == bool(failed)


# It stands for Python, by which the study starts a run.
SAVES_AT_A_SIGNAL = """#!{python}
import json, pathlib, signal, sys, time
came = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: came.append(1))
out = pathlib.Path(json.loads(sys.argv[-1])["out"])
(out / "started").touch()
while not came:
    time.sleep(0.01)
time.sleep(0.3)
(out / "signals").write_text(str(len(came)))
"""
RUN_ALL = """
import argparse, pathlib, sys
from experiments import arms, split_text
out, sys.executable = pathlib.Path(sys.argv[1]), sys.argv[2]
options = argparse.Namespace(
    plan=None, out=out, jobs=1, arms=["smk"], tokens=9, seeds=[0], rates=[1.0], gate_rates=[1.0],
    seconds=1e9, stop_after=1e9, device="cpu", teacher="embedded", set=[], smoke=False, threads=1,
    gpus=[], processes=1, report_tokens=1, report_row_tokens=0, sampled=None,
)
arms.run_all(options, split_text.Parts(*[out] * 4))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_study_that_a_signal_ends_lets_its_runs_save_first(tmp_path, number):
    stand_in = tmp_path / "python"
    stand_in.write_text(SAVES_AT_A_SIGNAL.format(python=sys.executable))
    stand_in.chmod(0o755)
    command = [sys.executable, "-c", RUN_ALL, str(tmp_path), str(stand_in)]
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    ) as study:
        while not (tmp_path / "started").exists():
            assert study.poll() is None
            time.sleep(0.02)
        # A terminal sends Ctrl-C to all processes in its foreground.
        (os.killpg if number == signal.SIGINT else os.kill)(study.pid, number)
        assert study.wait(60) != 0
    assert (tmp_path / "signals").read_text() == "1"


@pytest.mark.slow
def test_a_stopped_run_goes_on_from_its_checkpoint(tmp_path):
    teacher = tiny_teacher(tmp_path / "teacher")
    options = ["--smoke", "--teacher", teacher, "--out", tmp_path / "out", "--arms", "smk"]
    options += ["--tokens", "1000000"]
    stopped = run_module("experiments.arms", *options, "--stop-after", "45")
    assert "smk-1000000-x1-g1-s0: stopped; the same command goes on with it" in stopped
    (checkpoint,) = (tmp_path / "out" / "runs").glob("*/checkpoints/step-*")
    again = run_module("experiments.arms", *options, "--stop-after", "45")
    assert "failed" not in again
    assert not checkpoint.exists()
