"""The benchmarks run, end in one JSON line, and report no time where parity fails."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from benchmarks import base, common, distill_loss, runner, scaling, steps, surprise_overhead
from benchmarks.registry import NAMES, Benchmark, Goal, Option, Result, find
from forks import run_module_in_fork
from repository import ROOT, run_module
from tiny_onn.model.experts import ExpertBank
from tiny_onn.model.router import RoutingRule
from tiny_onn.ops import reference
from tiny_onn.ops.surprise import SmkRule

STUDIES = ("routing_rules", "partitions", "blockwise")
PROGRAMS = {
    **{name: ("benchmarks", name) for name in NAMES if name != "gpu"},
    **{name: (f"experiments.{name}",) for name in STUDIES},
}


# test_scaling_gpus.py runs the parts of the first, and tests/distill the stage of the second.
LONG = {"scaling_gpus", "blockwise"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in PROGRAMS]
)
def test_smoke_run_ends_in_one_json_line(name, tmp_path):
    printed = run_module_in_fork(tmp_path / "log", *PROGRAMS[name], "--smoke", "--out", tmp_path)
    record = json.loads(printed.splitlines()[-1])
    assert record["benchmark"] == name
    assert record["rows"]
    assert record["ratios"] or record["skipped"]
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert record["settings"]["smoke"] is True
    assert not [part for part in record.get("records", ()) if "error" in part]
    assert json.loads((tmp_path / f"{name}.json").read_text()) == record


@pytest.mark.slow
def test_smoke_run_of_everything_on_a_gpu_leaves_a_line_for_every_record(tmp_path):
    printed = run_module("benchmarks", "gpu", "--smoke", "--out", tmp_path, "--device", "cpu")
    (file,) = tmp_path.glob("gpu_*.jsonl")
    assert file.read_text() == printed
    first, *records = [json.loads(line) for line in printed.splitlines()]
    assert first["versions"]["torch"] == torch.__version__
    assert {record["section"] for record in records} == set(first["sections"])
    assert [record for record in records if "error" in record] == []


def test_the_list_names_every_benchmark_with_what_it_measures(capsys):
    assert runner.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(NAMES)
    assert [line.split(maxsplit=1)[1] for line in lines] == [find(name).measures for name in NAMES]
    # Every module that is a benchmark is in the list.
    texts = {path.stem: path.read_text("utf-8") for path in (ROOT / "benchmarks").glob("*.py")}
    assert {name for name, text in texts.items() if "\n@benchmark(" in text} == set(NAMES)


@pytest.mark.parametrize("given", [["nonsense"], [], ["--smoke"]])
def test_an_unknown_benchmark_is_refused_with_the_known_ones(given, capsys):
    with pytest.raises(SystemExit, match="2"):
        runner.main(given)
    assert "expert_layer" in capsys.readouterr().err.splitlines()[-1]


def counted(ratio, **options):
    """A benchmark of one ratio that says which options it got."""

    def run(arguments):
        given = {name: getattr(arguments, name) for name in options}
        return Result(
            rows=[{"way": "ours", "p50_ms": ratio}],
            ratios={"ours / peer": ratio},
            goals={"ours / peer": Goal(at_most=1.0)},
            settings=given,
        )

    return Benchmark(
        name="counted", measures="A ratio.", options=options, run=run, case=None, about=""
    )


def test_options_take_their_smoke_values_and_the_types_of_their_defaults(tmp_path):
    options = {
        "tokens": Option([8, 16], smoke=[2]),
        "model": Option("large", smoke="tiny"),
        "compile": Option(True),
        "seconds": Option(None, type=float),
    }

    def settings_of(*given):
        assert runner.run(counted(0.5, **options), [*given, "--out", str(tmp_path)]) == 0
        return json.loads((tmp_path / "counted.json").read_text())["settings"]

    plain = {"tokens": [8, 16], "model": "large", "compile": True, "seconds": None}
    assert settings_of() == {**plain, "smoke": False}
    small = {"tokens": [2], "model": "tiny", "compile": True, "seconds": None}
    assert settings_of("--smoke") == {**small, "smoke": True}
    given = {"tokens": [4, 5], "model": "large", "compile": False, "seconds": 1.5}
    assert settings_of("--tokens", "4", "5", "--no-compile", "--seconds", "1.5") == {
        **given,
        "smoke": False,
    }


@pytest.mark.parametrize(("ratio", "status"), [(0.9, 0), (1.0, 0), (1.1, 1)])
def test_a_missed_goal_is_said_and_fails_where_it_is_a_gate(ratio, status, tmp_path, capsys):
    options = ["--smoke", "--out", str(tmp_path)]
    assert runner.run(counted(ratio), options) == 0
    said = "goal missed: ours / peer: 1.1, expected at most 1"
    assert (said in capsys.readouterr().out) == bool(status)
    record = json.loads((tmp_path / "counted.json").read_text())
    assert record["missed"] == ["ours / peer"] * status
    assert runner.run(counted(ratio), [*options, "--gate"]) == status


def test_a_run_that_is_killed_leaves_the_rows_that_it_had(tmp_path):
    def run(arguments):
        rows = []
        for number in (1, 2):
            rows.append({"number": number, "p50_ms": 0.5})
            arguments.keep(Result(rows=rows, ratios={}, settings={}))
        raise KeyboardInterrupt

    killed = Benchmark(name="killed", measures="", options={}, run=run, case=None, about="")
    with pytest.raises(KeyboardInterrupt):
        runner.run(killed, ["--smoke", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "killed.json").read_text())
    assert record["unfinished"] is True
    assert [row["number"] for row in record["rows"]] == [1, 2]
    assert record["environment"]["versions"]["torch"] == torch.__version__
    # A whole record takes its place.
    whole = Result(rows=rows_of(3), ratios={}, settings={})
    ended = replace(killed, run=lambda _: whole)
    assert runner.run(ended, ["--smoke", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "killed.json").read_text())
    assert "unfinished" not in record
    assert [row["number"] for row in record["rows"]] == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["killed.json"]


def rows_of(*numbers):
    """Return rows that name a number."""
    return [{"number": number, "p50_ms": 0.5} for number in numbers]


def test_ratios_to_another_commit_divide_what_was_measured_and_keep_the_labels():
    ours = [{"loss": "naive", "tokens": 96, "p50_ms": 3.0, "peak_bytes": 50}]
    theirs = [{"loss": "naive", "tokens": 96, "p50_ms": 2.0, "peak_bytes": 100}]
    assert base.ratio_rows(ours, theirs) == [
        {"loss": "naive", "tokens": 96, "p50_ms": 1.5, "peak_bytes": 0.5}
    ]
    with pytest.raises(SystemExit, match="measure different things"):
        base.ratio_rows(ours, [theirs[0] | {"loss": "ours"}])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_base_of_a_comparison_is_the_package_of_its_commit(tmp_path):
    root, slow = tmp_path / "repository", "\n_old = distill\n\n\ndef distill(*args, **kwargs):\n"
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for folder in ("benchmarks", "src"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", str(root), *who, *arguments], check=True, capture_output=True)

    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message", "before")
    with (root / "src" / "tiny_onn" / "ops" / "distillation_loss.py").open("a") as file:
        file.write(f"{slow}    __import__('time').sleep(0.5)\n    return _old(*args, **kwargs)\n")
    options = ("distill_loss", "--smoke", "--base", "HEAD", "--out", str(tmp_path))
    variables = os.environ | {"PYTHONPATH": str(root / "src"), "JAXTYPING_DISABLE": "1"}
    command = [sys.executable, "-m", "benchmarks", *options]
    done = subprocess.run(
        command, cwd=root, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "this tree / HEAD, this tree's benchmark;" in done.stdout
    record = json.loads((tmp_path / "distill_loss.json").read_text())
    ratios = {row["loss"]: row["p50_ms"] for row in record["base"]["ratios"]}
    # Of each call of the working copy 0.5 s are sleep, which two equal copies would share.
    assert ratios["ours"] > 2
    left = subprocess.run(
        ["git", "-C", str(root), "worktree", "list"], capture_output=True, text=True, check=True
    )
    assert len(left.stdout.splitlines()) == 1
    unknown = subprocess.run(
        [*command[:-4], "--base", "none"], cwd=root, env=variables, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert "--base: got none, expected a commit" in unknown.stderr


@pytest.mark.parametrize("gap", [1.0, math.nan, math.inf])
def test_a_red_parity_gate_stops_the_benchmark(gap):
    with pytest.raises(SystemExit, match="no time is reported"):
        common.check("something", gap, 0.1)


def test_a_wrong_peer_is_caught_before_it_is_timed():
    found = {
        "ours": distill_loss.losses()[0]["ours"],
        "wrong": lambda *a: 1.01 * distill_loss.naive(*a),
    }
    with pytest.raises(SystemExit, match="parity gap"):
        distill_loss.parity(found, 64, 16, "cpu")


def test_functions_are_timed_in_turn_and_warm_up_is_left_out():
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "AB"}
    timings = common.measure(functions, repeats=3, warmup=1)
    assert "".join(calls) == "ABBAABBA"
    assert {name: timing.repeats for name, timing in timings.items()} == {"A": 3, "B": 3}
    assert all(t.p20_ms <= t.p50_ms <= t.p80_ms for t in timings.values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's accounts")
def test_peak_memory_counts_what_a_call_holds_for_a_moment():
    peak = common.peak_bytes(lambda: torch.ones(16 << 20).sum())
    assert peak == pytest.approx(64 << 20, rel=0.25)


def test_memory_fit_recovers_a_line():
    fixed, per_token = scaling.line([512, 1024, 4096], [1e6 + 7 * n for n in (512, 1024, 4096)])
    assert (fixed, per_token) == pytest.approx((1e6, 7))


@settings(max_examples=25, deadline=None)
@given(
    row_tokens=st.integers(4, 200),
    low=st.integers(2, 20),
    more=st.integers(0, 30),
    seed=st.integers(0, 9),
)
def test_random_rows_are_full_and_their_documents_as_long_as_asked(row_tokens, low, more, seed):
    (row,) = steps.random_rows(50, row_tokens, documents=(low, low + more), seed=seed)
    lengths = row.cu_seqlens.diff().tolist()
    assert sum(lengths) == row.input_ids.numel() == row_tokens
    # The last one takes what is left, and one token more where one would remain.
    assert all(low <= length <= low + more for length in lengths[:-1])
    assert 2 <= lengths[-1] <= low + more + 1


@pytest.mark.parametrize("kind", ["gain", "parameters"])
def test_the_textbook_peer_computes_the_reference_surprise(kind):
    generator = torch.Generator().manual_seed(0)
    bank = ExpertBank(6, 3, 2, "silu", RoutingRule(target_k=2.0))
    bank.experts.reset(generator, 1.0)
    x_TD, grad_y_TD = (torch.randn(4, 6, generator=generator) for _ in range(2))
    got_TE = surprise_overhead.textbook_surprise(bank, x_TD, grad_y_TD, SmkRule(surprise=kind))
    expected_TE = reference.surprise(
        kind,
        x_TD.double(),
        bank.experts.gate_up_proj.detach().double(),
        bank.experts.down_proj.detach().double(),
        grad_y_TD.double(),
        silu,
    )
    torch.testing.assert_close(got_TE.double(), expected_TE, rtol=1e-5, atol=1e-6)
