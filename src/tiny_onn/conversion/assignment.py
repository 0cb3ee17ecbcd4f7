"""The assignment of neurons to experts of equal size, a transportation problem, solved exactly.

Every expert has a price, and a neuron is content with an expert of largest score minus price. At
the right prices all neurons are content and every expert holds equally many: the assignment's total
is then the largest there is (linear programming duality). Two steps find them:

1. Sweeps: expert after expert gets the price at which as many neurons as it has places prefer it to
   all others (coordinate descent of the dual, Bertsekas, Linear Network Optimization, 1991, chapter
   4). Sweeps alone do not reach the optimum, because the dual is not smooth.
2. Moves: each neuron joins an expert that it is content with. An expert with too many neurons then
   passes some of them on, along the path of experts that loses least, until they reach an expert
   with a place left (successive shortest paths, Ahuja, Magnanti and Orlin, Network Flows, 1993,
   section 9.7). A path passes each expert at most once, so that the graph has E nodes, whatever F
   is.

The code uses NumPy on one core: arrays of a few thousand numbers gain nothing from a second thread,
and where other processes held the cores, operations that waited for a second one took a hundred
times as long.

Legend: F neurons, E experts, M neurons of one expert; `loss_EE[a, b]` is what the total loses if
expert a's neuron that minds least moves to expert b.
"""

from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@torch.no_grad()
def balanced_assignment(
    scores_FE: Float[Tensor, "neurons experts"],
    prices_E: Float[Tensor, " experts"] | None = None,
) -> Int[Tensor, " neurons"]:
    """Return each neuron's expert (F / E neurons an expert) so that the total score is largest.

    The total is the largest up to rounding. The search runs on the CPU in float64, and equal scores
    give the same assignment every time.

    Args:
        scores_FE: finite scores.
        prices_E: each expert's price beyond its mean score, float64, on the CPU. The search starts
            at these prices and writes its last ones here, which makes the next search, for scores
            that changed little, several times as fast. None starts the search at zeros.
    """
    F, E = scores_FE.shape
    assert F % E == 0
    scores_EF = scores_FE.detach().double().cpu().T.contiguous().numpy()
    assert np.isfinite(scores_EF).all()
    mean_E = scores_EF.mean(1)
    offset_E = np.zeros(E) if prices_E is None else prices_E.numpy()
    price_E = mean_E + offset_E
    _sweep(scores_EF, price_E)
    expert_F = _move(scores_EF, price_E)
    offset_E[:] = price_E - mean_E
    return torch.from_numpy(expert_F)


def _sweep(scores_EF: np.ndarray, prices_E: np.ndarray) -> None:
    """Change prices, in place, until a sweep places E / 4 more neurons or fewer.

    A sweep takes about as long as placing E / 4 neurons one by one.
    """
    E, F = scores_EF.shape
    cut = F - F // E
    too_many = F
    while E > 1:
        worth_EF = scores_EF - prices_E[:, None]
        load_E = np.bincount(worth_EF.argmax(0), minlength=E)
        before, too_many = too_many, int((load_E - F // E).clip(0).sum())
        if before - too_many <= E // 4:
            return
        # The experts after each one are still at their old prices, so that their best value is
        # known in advance; `best_F` follows the experts that have new prices.
        after_EF = np.maximum.accumulate(worth_EF[::-1])[::-1]
        best_F = np.full(F, -np.inf)
        for e in range(E):
            others_F = best_F if e == E - 1 else np.maximum(best_F, after_EF[e + 1])
            bids_F = np.partition(scores_EF[e] - others_F, (cut - 1, cut))
            prices_E[e] = (bids_F[cut - 1] + bids_F[cut]) / 2
            np.maximum(best_F, scores_EF[e] - prices_E[e], out=best_F)


def _move(scores_EF: np.ndarray, prices_E: np.ndarray) -> np.ndarray:
    """Return the best balanced assignment (F,), starting at prices from `_sweep`.

    Prices change, in place, so that all neurons stay content.
    """
    E, F = scores_EF.shape
    expert_F = (scores_EF - prices_E[:, None]).argmax(0)
    spare_E = F // E - np.bincount(expert_F, minlength=E)
    loss_EE = np.full((E, E), np.inf)
    changed = range(E)
    while True:
        for e in changed:
            neurons_M = np.flatnonzero(expert_F == e)
            if len(neurons_M):
                loss_EE[e] = (scores_EF[e, neurons_M] - scores_EF[:, neurons_M]).min(1)
            else:
                loss_EE[e] = np.inf
        if not spare_E.any():
            return expert_F
        path = _shortest_path(loss_EE, prices_E, spare_E)
        movers = []
        for a, b in pairwise(path):
            neurons_M = np.flatnonzero(expert_F == a)
            loss_M = scores_EF[a, neurons_M] - scores_EF[b, neurons_M]
            movers.append(neurons_M[loss_M == loss_EE[a, b]])
        # Neurons of equal loss move together; all neurons without energy have equal losses.
        num_moved = min(-spare_E[path[0]], spare_E[path[-1]], *map(len, movers))
        for b, moved in zip(path[1:], movers, strict=True):
            expert_F[moved[:num_moved]] = b
        spare_E[path[0]] += num_moved
        spare_E[path[-1]] -= num_moved
        changed = path


def _shortest_path(loss_EE: np.ndarray, prices_E: np.ndarray, spare_E: np.ndarray) -> list[int]:
    """Return the path of least loss from an expert with too many neurons to one with a place left.

    This is Dijkstra's algorithm: losses less the difference in price are not negative where all
    neurons are content. Prices change, in place, by the distances.
    """
    distance_E = np.where(spare_E < 0, 0.0, np.inf)
    open_E = distance_E.copy()
    came_from = np.full(len(spare_E), -1)
    while True:
        nearest = int(open_E.argmin())
        if spare_E[nearest] > 0:
            break
        open_E[nearest] = np.inf
        # Rounding can leave a loss a little below zero.
        reduced_loss_E = loss_EE[nearest] + (prices_E - prices_E[nearest])
        through_E = distance_E[nearest] + np.maximum(reduced_loss_E, 0.0)
        nearer_E = through_E < distance_E
        distance_E[nearer_E] = open_E[nearer_E] = through_E[nearer_E]
        came_from[nearer_E] = nearest
    prices_E -= np.minimum(distance_E, distance_E[nearest])
    path = [nearest]
    while came_from[path[-1]] >= 0:
        path.append(int(came_from[path[-1]]))
    return path[::-1]
