"""Ranks, ends and intervals against definitions in plain loops."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_onn.probe.statistics import estimate, fit_ridge, levels, per_token, ranks, spearman

# Few values, so that ties are common.
VALUES = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=2, max_size=7)


def naive_ranks(values):
    """Each value's mean position in the sorted list."""
    ordered = sorted(values)
    return [
        statistics.mean(i for i, other in enumerate(ordered) if other == value) for value in values
    ]


def naive_spearman(first, second):
    first, second = naive_ranks(first), naive_ranks(second)
    if len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan
    return statistics.correlation(first, second)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_spearman_is_the_correlation_of_mean_ranks(data):
    first = data.draw(VALUES)
    n = len(first)
    second = data.draw(st.lists(st.sampled_from([0.0, 1.0, 3.0]), min_size=n, max_size=n))
    mask = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    chosen = [i for i in range(n) if mask[i]]
    got = spearman(torch.tensor([first]), torch.tensor([second]), torch.tensor([mask])).item()
    if len(chosen) < 2:
        assert math.isnan(got)
        return
    expected = naive_spearman([first[i] for i in chosen], [second[i] for i in chosen])
    assert got == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_ranks_leave_out_what_is_no_candidate():
    values = torch.tensor([[5.0, 1.0, 3.0, 3.0, -9.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    assert ranks(values, mask).tolist() == [[3.0, 0.0, 1.5, 1.5, 0.0]]


def test_ends_point_at_candidates_and_average_over_ties():
    score = torch.tensor([[1.0, 1.0, 4.0, -7.0], [0.0, 0.0, 0.0, 0.0]])
    truth = torch.tensor([[0.2, 0.4, 0.9, 5.0], [1.0, 2.0, 3.0, 6.0]])
    magnitude = torch.tensor([[3.0, 1.0, 2.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    got = {
        name: values.tolist() for name, values in per_token(score, truth, magnitude, mask).items()
    }
    assert got["truth_at_min"] == pytest.approx([0.3, 3.0])
    assert got["truth_at_max"] == pytest.approx([0.9, 3.0])
    assert got["tied_min"] == [1.0, 1.0]
    assert got["tied_max"] == [0.0, 1.0]
    assert got["magnitude_rank_min"] == [1.0, 1.5]
    assert got["magnitude_rank_max"] == [1.0, 1.5]
    assert got["constant"] == [0.0, 1.0]
    assert got["zero"] == [0.0, 1.0]
    assert math.isnan(got["spearman"][1])


def test_levels_are_mean_best_and_worst_of_the_candidates():
    truth = torch.tensor([[0.5, -1.0, 4.0, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    got = {name: value.item() for name, value in levels(truth, mask).items()}
    assert got == pytest.approx({"random": 3.5 / 3, "best": 4.0, "worst": -1.0})


def test_intervals_resample_whole_groups():
    generator = torch.Generator().manual_seed(0)
    # Two groups that agree within: as tokens the mean is sure, as groups it is anything between.
    values, groups = torch.tensor([0.0] * 200 + [1.0] * 200), torch.arange(400) // 200
    by_group = estimate(values, groups, generator)
    by_token = estimate(values, torch.arange(400), generator)
    assert by_group == pytest.approx((0.5, 0.0, 1.0))
    assert by_token.mean == 0.5
    assert 0.44 < by_token.low < 0.47
    assert 0.53 < by_token.high < 0.56


def test_missing_values_are_left_out():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([1.0, math.nan, 3.0])
    assert estimate(values, torch.arange(3), generator).mean == 2.0
    assert all(math.isnan(x) for x in estimate(values[1:2], torch.arange(1), generator))


def test_ridge_finds_a_linear_map_and_shrinks_noise_to_the_mean():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 10, generator=generator)
    weight = torch.randn(10, 3, generator=generator)
    noise = torch.randn(600, 3, generator=generator)
    new = torch.randn(50, 10, generator=generator)
    signal = fit_ridge(x, x @ weight + 2)(new)
    torch.testing.assert_close(signal.float(), new @ weight + 2, rtol=0.05, atol=0.05)
    guess = fit_ridge(x, noise)(new)
    assert (guess - noise.mean(0)).abs().mean() < 0.1
