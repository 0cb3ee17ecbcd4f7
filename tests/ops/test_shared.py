"""Shared experts come first among neurons and among the columns of a table."""

import torch

from tiny import normal
from tiny_onn.conversion.partition import put_first, split_neurons
from tiny_onn.ops.shared_experts import routed, with_shared

E, S = 8, 2


def test_kept_neurons_come_before_louder_ones():
    score = torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0, 0.0])
    shared, rest = split_neurons(score, (5, 4), 3)
    assert (shared.tolist(), rest.tolist()) == ([5, 4, 1], [0, 2, 3])
    shared, rest = split_neurons(score, (), 0)
    assert (shared.tolist(), rest.tolist()) == ([], [0, 1, 2, 3, 4, 5])
    assert put_first(torch.tensor([2, 0, 1]), (1,)).tolist() == [1, 2, 0]


def test_the_parts_of_a_table_fit_together():
    table = normal(4, E)
    assert torch.equal(with_shared(routed(table, S), S, 7.0)[:, S:], table[:, S:])
    assert with_shared(routed(table, S), S, 7.0)[:, :S].eq(7).all()
    assert routed(table, 0) is with_shared(table, 0, 1.0) is table
