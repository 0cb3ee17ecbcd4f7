"""What a partition holds is weighed as the partition's own objective is defined."""

import pytest
import torch

from benchmarks import conversion
from tiny_onn.conversion import partition


def test_the_held_share_is_the_one_that_a_partition_maximises(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    planted = torch.arange(32) % 8
    x = torch.randn(512, 8, generator=generator)
    energy = x[:, planted].exp() * torch.rand(512, 32, generator=generator)
    start = partition.by_importance(energy, 8)
    learned = partition.learn_partition(energy, x, start, 8, 4.0)
    first, after, best = (
        conversion.held_share(energy, x, part, 8, 4.0) for part in (start, learned, planted)
    )
    assert first + 0.05 < after <= best + 1e-3
    # With every expert active all of the energy is held.
    assert conversion.held_share(energy, x, learned, 8, 8.0) == pytest.approx(1.0)


def test_parts_are_timed_within_the_context_alone():
    before = partition.by_importance, partition.balanced_assignment
    scores = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    with conversion.timed_parts() as seconds:
        expected = before[1](scores)
        assert torch.equal(partition.balanced_assignment(scores), expected)
    assert list(seconds) == ["balanced_assignment"]
    assert seconds["balanced_assignment"] > 0
    assert (partition.by_importance, partition.balanced_assignment) == before
