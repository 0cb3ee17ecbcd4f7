"""The benchmarks run, end in one JSON line, and report no time where parity fails."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from tiny_onn.experts import ExpertBank
from tiny_onn.ops import reference
from tiny_onn.router import RoutingRule
from tiny_onn.surprise import SmkRule

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = (
    "surprise_overhead",
    "distill_loss",
    "distill_step",
    "scaling",
    "full_size",
    "routing_rules",
    "partitions",
    "partition_time",
    "blockwise",
    "decode",
)


@pytest.fixture(scope="module")
def load():
    """Import a module of the benchmarks' folder."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))


def smoke(name, out, *options):
    """What a benchmark prints in a short run that must succeed."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--smoke", "--out", str(out), *options]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "JAXTYPING_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_smoke_run_ends_in_one_json_line(name, tmp_path):
    record = json.loads(smoke(name, tmp_path).splitlines()[-1])
    assert record["benchmark"] == name
    assert record["rows"]
    assert record["ratios"]
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert record["settings"]["smoke"] is True
    assert not [part for part in record.get("records", ()) if "error" in part]
    assert json.loads((tmp_path / f"{name}.json").read_text()) == record


def test_smoke_run_of_everything_on_a_gpu_leaves_a_line_for_every_record(tmp_path):
    printed = smoke("gpu", tmp_path, "--device", "cpu")
    (file,) = tmp_path.glob("gpu_*.jsonl")
    assert file.read_text() == printed
    first, *records = [json.loads(line) for line in printed.splitlines()]
    assert first["versions"]["torch"] == torch.__version__
    assert {record["section"] for record in records} == set(first["sections"])
    assert [record for record in records if "error" in record] == []
    assert all(record["ok"] for record in records if record["section"] == "correctness")


@pytest.mark.parametrize("gap", [1.0, math.nan, math.inf])
def test_a_red_parity_gate_stops_the_benchmark(load, gap):
    with pytest.raises(SystemExit, match="no time is reported"):
        load("common").check("something", gap, 0.1)


def test_a_wrong_peer_is_caught_before_it_is_timed(load):
    module = load("distill_loss")
    found = {"ours": module.losses()[0]["ours"], "wrong": lambda *a: 1.01 * module.naive(*a)}
    with pytest.raises(SystemExit, match="parity gap"):
        module.parity(found, 64, 16, "cpu")


def test_functions_are_timed_in_turn_and_warm_up_is_left_out(load):
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "AB"}
    timings = load("common").measure(functions, repeats=3, warmup=1)
    assert "".join(calls) == "ABBAABBA"
    assert {name: timing.repeats for name, timing in timings.items()} == {"A": 3, "B": 3}
    assert all(t.p20_ms <= t.p50_ms <= t.p80_ms for t in timings.values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's accounts")
def test_peak_memory_counts_what_a_call_holds_for_a_moment(load):
    peak = load("common").peak_bytes(lambda: torch.ones(16 << 20).sum())
    assert peak == pytest.approx(64 << 20, rel=0.25)


def test_memory_fit_recovers_a_line(load):
    fixed, per_token = load("scaling").line(
        [512, 1024, 4096], [1e6 + 7 * n for n in (512, 1024, 4096)]
    )
    assert (fixed, per_token) == pytest.approx((1e6, 7))


@settings(max_examples=25, deadline=None)
@given(
    row_tokens=st.integers(4, 200),
    low=st.integers(2, 20),
    more=st.integers(0, 30),
    seed=st.integers(0, 9),
)
def test_random_rows_are_full_and_their_documents_as_long_as_asked(
    load, row_tokens, low, more, seed
):
    (row,) = load("steps").random_rows(50, row_tokens, documents=(low, low + more), seed=seed)
    lengths = row.cu_seqlens.diff().tolist()
    assert sum(lengths) == row.input_ids.numel() == row_tokens
    # The last one takes what is left, and one token more where one would remain.
    assert all(low <= length <= low + more for length in lengths[:-1])
    assert 2 <= lengths[-1] <= low + more + 1


@pytest.mark.parametrize("kind", ["gain", "parameters"])
def test_the_textbook_peer_computes_the_reference_surprise(load, kind):
    generator = torch.Generator().manual_seed(0)
    bank = ExpertBank(6, 3, 2, "silu", RoutingRule(target_k=2.0))
    bank.experts.reset(generator, 1.0)
    x_TD, grad_y_TD = (torch.randn(4, 6, generator=generator) for _ in range(2))
    got_TE = load("surprise_overhead").textbook_surprise(
        bank, x_TD, grad_y_TD, SmkRule(surprise=kind)
    )
    expected_TE = reference.surprise(
        kind,
        x_TD.double(),
        bank.experts.gate_up_proj.detach().double(),
        bank.experts.down_proj.detach().double(),
        grad_y_TD.double(),
        silu,
    )
    torch.testing.assert_close(got_TE.double(), expected_TE, rtol=1e-5, atol=1e-6)
