"""Neurons into experts of equal size: the transportation problem, solved by auction.

Bertsekas' auction (Linear Network Optimization, 1991, chapter 4; BASE layers, arXiv 2103.16716, use
it for tokens): every expert has as many places as it has neurons and a price, the lowest bid among
its places. Each neuron without a place bids for the expert of largest score minus price, so much
that it would rather take the second best; an expert keeps its highest bids. With a bid's increment
of `eps` the total score ends within F * eps of the best one; eps falls by steps, prices are kept.

Legend: F neurons, E experts, I = F / E neurons per expert.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Increments of the bids, as shares of the scores' spread.
INCREMENTS = (0.3, 0.1, 0.03, 0.01)


@torch.no_grad()
def balanced_assignment(
    scores_FE: Float[Tensor, "neurons experts"],
) -> Int[Tensor, " neurons"]:
    """Each neuron's expert, F / E neurons each, of a total score within 1 % of spread per neuron.

    The spread is the mean over neurons of the largest minus the smallest score. Runs on the CPU.
    """
    F, E = scores_FE.shape
    assert F % E == 0
    scores_FE = scores_FE.detach().cpu().double()
    spread = (scores_FE.amax(1) - scores_FE.amin(1)).mean()
    expert_F = torch.arange(F) // (F // E)
    if spread == 0 or E == 1:
        return expert_F
    prices_E = torch.zeros(E, dtype=torch.float64)
    with _one_thread():
        for increment in INCREMENTS:
            expert_F, prices_E = _auction(scores_FE, prices_E, spread * increment)
    return expert_F


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within the context torch computes in one thread.

    Thousands of small operations: where other processes hold the cores, those that wait for a
    second thread each time took a hundred times as long.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _auction(scores_FE: Tensor, prices_E: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    F, E = scores_FE.shape
    places = F // E
    bids_FE = torch.full((F, E), float("-inf"), dtype=torch.float64)
    while True:
        free_U = (bids_FE.amax(1) == float("-inf")).nonzero()[:, 0]
        if len(free_U) == 0:
            return bids_FE.argmax(1), prices_E
        best_U2, expert_U2 = (scores_FE[free_U] - prices_E).topk(2, dim=1)
        wanted_U = expert_U2[:, 0]
        bids_FE[free_U, wanted_U] = prices_E[wanted_U] + best_U2[:, 0] - best_U2[:, 1] + eps
        kept_PE, holder_PE = bids_FE.topk(places, dim=0)
        bids_FE = torch.full_like(bids_FE, float("-inf")).scatter_(0, holder_PE, kept_PE)
        # An expert with places left keeps the price it started with.
        prices_E = torch.where(kept_PE[-1].isfinite(), kept_PE[-1], prices_E)
