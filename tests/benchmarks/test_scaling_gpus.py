"""The benchmark of several GPUs: its launcher, its rows and its ratios."""

from dataclasses import asdict

import pytest

from benchmarks.registry import Goal
from benchmarks.scaling_gpus import (
    launch,
    losses_apart,
    numbers_of_gpus,
    predicted,
    scaling,
    with_plan,
)
from benchmarks.scaling_gpus_worker import settings_of, ways
from tiny_onn.planning.sources import find_device

CASE = {
    "model": "tiny",
    "gpus": 2,
    "rows": 4,
    "device": "cpu",
    "preset": "recommended",
    "tokens": 64,
    "repeats": 2,
    "set": [""],
    "full": False,
}


def row(gpus, num_rows, speed, shard="none", **more):
    return {
        "model": "m",
        "gpus": gpus,
        "rows_per_step": num_rows,
        "shard": shard,
        "tokens_per_s": speed,
        **more,
    }


def test_two_processes_measure_every_way_to_take_a_step():
    record = launch(CASE, seconds=200)
    assert "error" not in record, record["error"]
    ways = [(found["shard"], found["rows_per_step"]) for found in record["rows"]]
    # The same global batch comes first, since its first loss is compared.
    assert ways == [("none", 4), ("none", 2), ("optimizer", 4), ("optimizer", 2)]
    for found in record["rows"]:
        speed = 1e3 * 64 * found["rows_per_step"] / found["step_ms"]
        assert found["tokens_per_s"] == pytest.approx(speed)
        assert found["p20_ms"] <= found["step_ms"] <= found["p80_ms"]
        assert found["peak_bytes"] > 0
        assert found["all_reduce_ms"] > 0
    assert record["environment"]["versions"]["torch"]
    # Without a GPU there is no plan to hold them to.
    assert record["device"] is None
    assert with_plan(record, CASE, None)[0] == {"model": "tiny", "gpus": 2, **record["rows"][0]}


def test_rows_that_do_not_divide_over_the_gpus_are_left_out():
    assert ways({**CASE, "gpus": 1, "rows": 8}) == [("none", 8), ("none", 1)]
    assert ways({**CASE, "gpus": 3, "rows": 8}) == [("none", 3), ("optimizer", 3)]
    assert ways({**CASE, "gpus": 8, "rows": 8}) == [("none", 8), ("optimizer", 8)]


def test_a_large_model_is_measured_as_it_fits():
    large = {**CASE, "model": "Qwen3-8B", "rows": 4}
    assert ways({**large, "gpus": 1}) == ways({**large, "gpus": 2}) == []
    assert ways({**large, "gpus": 4}) == [("optimizer", 4)]
    assert ways({**large, "gpus": 4, "full": True}) == [("full", 4)]
    assert ways({**large, "gpus": 2, "full": True}) == [("full", 4), ("full", 2)]
    assert ways({**large, "gpus": 1, "full": True}) == []
    config = settings_of({**large, "full": True})
    assert (config.train.shard, config.optim.master_dtype) == ("full", "bfloat16")


@pytest.mark.slow
def test_two_processes_with_shares_start_at_the_loss_of_whole_weights():
    whole, shares = (launch({**CASE, "full": full}, seconds=200) for full in (False, True))
    assert "error" not in shares, shares["error"]
    found = [(row["shard"], row["rows_per_step"]) for row in shares["rows"]]
    assert found == [("full", 4), ("full", 2)]
    first = whole["rows"][0]["first_loss"]
    assert shares["rows"][0]["first_loss"] == pytest.approx(first, rel=1e-6)


def test_a_failure_and_a_limit_leave_an_error_and_what_was_measured():
    failed = launch({**CASE, "model": "no such shape", "gpus": 1}, seconds=200)
    assert failed["rows"] == []
    assert failed["error"].startswith("exit status 1")
    assert "no such shape" in failed["error"]
    late = launch({**CASE, "gpus": 1}, seconds=0.5)
    assert late["error"].startswith("took more than 0.5 s")


def test_ratios_compare_the_same_batch_and_the_same_batch_a_gpu():
    rows = [
        row(1, 4, 100.0),
        row(1, 1, 90.0),
        row(2, 4, 190.0),
        row(2, 2, 171.0),
        row(4, 4, 360.0),
        row(4, 4, 350.0, "optimizer"),
        {"model": "m", "gpus": 8, "error": "out of memory"},
    ]
    ratios, goals = scaling(rows)
    assert ratios == pytest.approx(
        {
            "m, same batch, shard none: 2 GPUs / 1, tokens/s": 1.9,
            "m, a row a GPU, shard none: 2 GPUs / 1, tokens/s": 1.9,
            "m, same batch, shard none: 4 GPUs / 1, tokens/s": 3.6,
            "m, a row a GPU, shard none: 4 GPUs / 1, tokens/s": 4.0,
            "m, same batch, shard optimizer: 4 GPUs / 1, tokens/s": 3.5,
            "m, a row a GPU, shard optimizer: 4 GPUs / 1, tokens/s": 350 / 90,
        }
    )
    assert goals["m, same batch, shard none: 2 GPUs / 1, tokens/s"] == Goal(at_least=1.9)
    assert not [name for name in goals if "optimizer" in name]


@pytest.mark.parametrize(
    ("losses", "apart"),
    [
        ({(1, False): 0.8}, False),
        ({(1, False): 0.8, (2, True): 0.803}, False),
        ({(1, False): 0.8, (1, True): 0.82}, True),
        ({(1, False): 0.8, (2, False): float("nan")}, True),
    ],
)
def test_first_losses_of_the_same_batch_must_agree(losses, apart):
    assert losses_apart(losses) is apart


def test_on_a_cpu_every_number_of_processes_is_there():
    assert numbers_of_gpus([2, 1, 2], "cpu") == [1, 2]
    with pytest.raises(SystemExit, match=r"--gpus: got \[0\], expected numbers of the 0 GPUs"):
        numbers_of_gpus([0], "cpu")


def test_the_plan_takes_its_efficiency_from_one_gpu_and_its_scaling_from_the_model():
    case = {**CASE, "model": "SmolLM2-135M", "tokens": 32_768}
    device = asdict(find_device("H100", settings_of(case).teacher.dtype))
    record = {"gpus": 1, "device": device, "document_tokens": 1600}
    one = predicted(record, case, {"rows_per_step": 1, "shard": "none"}, 0.2)
    assert one["plan_tokens_per_s"] == pytest.approx(32_768 / 0.2)
    assert one["plan_all_reduce_ms"] == 0
    assert 0 < one["efficiency"] < 1
    two = predicted({**record, "gpus": 2}, case, {"rows_per_step": 2, "shard": "none"}, 0.2)
    assert 1.9 < two["plan_tokens_per_s"] / one["plan_tokens_per_s"] < 2
    assert two["plan_peak_bytes"] == one["plan_peak_bytes"]
    sharded = {"rows_per_step": 2, "shard": "optimizer"}
    less = predicted({**record, "gpus": 2}, case, sharded, None)
    assert less["plan_peak_bytes"] < two["plan_peak_bytes"]
    assert less["plan_tokens_per_s"] is None
