"""Exponents are those of the times, in the range in which a power describes them."""

import pytest

from benchmarks import layer_scaling
from benchmarks.registry import find

NUMBERS = [2**power for power in range(11, 18)]


def test_the_exponent_of_a_power_is_found_in_its_whole_range():
    law = layer_scaling.fit(NUMBERS, [3.0 * number**0.75 for number in NUMBERS])
    assert law is not None
    assert law["exponent"] == pytest.approx(0.75)
    assert (law["low"], law["high"], law["points"]) == (NUMBERS[0], NUMBERS[-1], len(NUMBERS))
    assert law["off"] < 1e-9


def test_numbers_at_which_a_fixed_cost_dominates_are_left_out_of_the_range():
    law = layer_scaling.fit(NUMBERS, [max(1.0, number / 32_768) for number in NUMBERS])
    assert law is not None
    assert law["exponent"] == pytest.approx(0.0, abs=0.02)
    assert (law["low"], law["high"]) == (NUMBERS[0], 32_768)
    law = layer_scaling.fit(NUMBERS, [max(1.0, number / 16_384) for number in NUMBERS])
    assert law is not None
    # Of two ranges of the same length the one of larger numbers counts.
    assert law["exponent"] == pytest.approx(1.0)
    assert (law["low"], law["high"]) == (16_384, NUMBERS[-1])


@pytest.mark.parametrize("times", [[1.0, 2.0], [1.0, 9.0, 1.0]])
def test_too_few_or_too_scattered_times_have_no_exponent(times):
    assert layer_scaling.fit(NUMBERS[: len(times)], times) is None


def test_fits_are_those_of_each_sweep_rule_and_way():
    rows = [
        {"sweep": "k", "k": k, "rule": rule, "MLP": 5.0, "dense": 7.0}
        | ({"sparse": float(k)} if rule == "card" else {})
        for rule in ("default", "card")
        for k in (4, 8, 16)
    ]
    laws = {(law["rule"], law["way"]): law["exponent"] for law in layer_scaling.fits(rows)}
    expected = {("default", "MLP"): 0, ("default", "dense"): 0, ("card", "MLP"): 0}
    expected |= {("card", "dense"): 0, ("card", "sparse"): 1}
    assert laws == {key: pytest.approx(value, abs=1e-9) for key, value in expected.items()}


def test_each_sweep_changes_one_number_and_that_of_k_asks_every_rule():
    class Arguments:
        base_tokens = 64
        tokens = (8, 16)
        experts = (4, 8)
        k = (1, 2)
        rule = ("default", "card")

    found = list(layer_scaling.points(Arguments()))  # pyright: ignore[reportArgumentType]
    assert [(p["sweep"], p[p["sweep"]], p["rule"]) for p in found] == [
        ("tokens", 8, "default"), ("tokens", 16, "default"),
        ("k", 1, "default"), ("k", 2, "default"), ("k", 1, "card"), ("k", 2, "card"),
        ("experts", 4, "default"), ("experts", 8, "default"),
    ]  # fmt: skip
    base = {"tokens": 64, "experts": 32, "k": 16}
    for point in found:
        same = {key: value for key, value in base.items() if key != point["sweep"]}
        same |= {"k": point["experts"] // 2} if point["sweep"] == "experts" else {}
        assert {key: point[key] for key in same} == same


def test_a_path_that_computes_something_else_is_not_timed(monkeypatch):
    wrong = layer_scaling.dense_masked.expert_layer

    def doubled(*args, **kwargs):
        return 2 * wrong(*args, **kwargs)

    monkeypatch.setattr(layer_scaling, "paths", lambda *_, **__: {"dense": lambda *a, **k: doubled(
        *a, activation=layer_scaling.F.silu, **k)})  # fmt: skip
    arguments = layer_scaling.argparse.Namespace(
        smoke=True, device="cpu", repeats=1, seconds=60.0, tokens=[16], experts=[8], k=[1],
        base_tokens=16, rule=["default"], keep=print,
    )  # fmt: skip
    with pytest.raises(SystemExit, match="parity gap"):
        find("layer_scaling").run(arguments)


def run_with(monkeypatch, times, **options):
    """Run the benchmark with other times; what it returned, kept, timed and forgot, in order."""
    events, kept = [], []
    sizes = layer_scaling.Sizes
    monkeypatch.setattr(sizes, "parity", lambda *_: {"gap": 0.0})
    monkeypatch.setattr(sizes, "forget_other_sizes", lambda _: events.append("forget"))

    def timed(_, point):
        events.append((point["tokens"], point["experts"], point["k"]))
        return times(point)

    monkeypatch.setattr(sizes, "times", timed)
    given = {"smoke": True, "device": "cpu", "repeats": 1, "seconds": 60.0, "base_tokens": 32,
             "tokens": [16, 32], "experts": [16, 32], "k": [8, 16], "rule": ["default"],
             "keep": lambda result: kept.append(len(result.rows))}  # fmt: skip
    arguments = layer_scaling.argparse.Namespace(**(given | options))
    result = find("layer_scaling").run(arguments)
    assert result is not None
    return result, kept, events


def test_a_point_of_several_sweeps_is_timed_once_and_code_is_of_one_number_of_experts(monkeypatch):
    result, kept, events = run_with(monkeypatch, lambda _: {"MLP": 1.0, "dense": 2.0})
    assert events == [(16, 32, 16), (32, 32, 16), (32, 32, 8), "forget", (32, 16, 8)]
    found = [(row["sweep"], row[row["sweep"]]) for row in result.rows]
    assert found == [("tokens", 16), ("tokens", 32), ("k", 8), ("k", 16), ("experts", 16),
                     ("experts", 32)]  # fmt: skip
    # What is known so far is kept after every point.
    assert kept == [1, 2, 3, 4, 5, 6]
    assert result.ratios["dense / MLP, k=16, default"] == 2.0


def test_a_point_that_fails_is_named_and_the_others_are_timed(monkeypatch):
    def times(point):
        if point["k"] == 8 and point["experts"] == 32:
            raise RuntimeError("out of\nmemory")
        return {"MLP": 1.0}

    result, _, _ = run_with(monkeypatch, times)
    assert {"sweep": "k", "tokens": 32, "experts": 32, "k": 8, "rule": "default",
            "reason": "RuntimeError: out of memory"} in result.more["skipped"]  # fmt: skip
    assert [row["sweep"] for row in result.rows] == ["tokens"] * 2 + ["k"] + ["experts"] * 2
