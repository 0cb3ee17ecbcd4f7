"""Which neurons share an expert: partitions of a dense MLP from its weights or from text.

Every function here gives one expert per neuron, equally many neurons each. What text says about a
layer is read from a bounded sample of its inputs, layer after layer, so that memory grows neither
with the text nor with the MLP's width. A neuron's energy at a token is `(h |down|)^2`, what it adds
to the squared output if neurons do not interfere.

Legend: T sampled tokens, D hidden, F neurons, E experts, R random directions.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers.activations import ACT2FN

from tiny_onn.config.schema import ExpertsConfig
from tiny_onn.console import track
from tiny_onn.conversion.assignment import balanced_assignment
from tiny_onn.conversion.gates import Ridge
from tiny_onn.data.packing import PackedRow
from tiny_onn.model.backbone import GatedMlp, activation_name, gated_mlps
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.routing.thresholds import exact_threshold

SAMPLED_TOKENS = 8192
KMEANS_ROUNDS = 15
LEARNING_ROUNDS = 16
DIRECTIONS = 512
# Layers are learned side by side as far as their tables, (T, F) in float32, fit into these bytes.
LAYER_BYTES = 2**31
TABLES = 4


@torch.no_grad()
def partition_neurons(
    inputs: MlpInputs,
    experts: ExpertsConfig,
    target_k: float,
    generator: torch.Generator,
    *,
    kept: Sequence[Sequence[int]] = (),
) -> list[Int[Tensor, " neurons"]] | None:
    """Per layer, the order in which neurons fill the experts; None: as they are.

    Shared experts come first. They get the neurons of largest energy, and the partition is that of
    the others; `slices` cuts all neurons as they come.

    Args:
        inputs: the MLP inputs of the model to cut on calibration text; `slices`, and `cluster`
            without shared experts, need no text.
        experts: `init` names the partition.
        target_k: active experts per token that `learned` partitions for.
        generator: CPU generator of k-means' first centres and of random directions.
        kept: per layer, neurons that come first; none: no layer has any.
    """
    mlps = gated_mlps(inputs.dense)
    width, S = mlps[0].gate_proj.out_features, experts.num_shared
    kept = kept or [()] * len(mlps)
    if experts.init in ("random", "slices"):
        return [kept_first(torch.arange(width), first) for first in kept] if any(kept) else None
    num_routed, num_shared = experts.num_experts - S, S * (width // experts.num_experts)
    orders = []
    if experts.init == "cluster":
        unknown = torch.zeros(width)
        scores = neuron_importance(inputs) if S else [unknown] * len(mlps)
        for mlp, score_F, first in zip(mlps, scores, kept, strict=True):
            shared_F, rest_F = split_neurons(score_F, first, num_shared)
            rows_FD = F.normalize(mlp.gate_proj.weight.float(), dim=1)[rest_F]
            expert_F = balanced_kmeans(rows_FD, num_routed, generator)
            orders.append(torch.cat((shared_F, rest_F[expert_F.argsort(stable=True)])))
        return orders
    activation = ACT2FN[activation_name(inputs.dense.config.get_text_config())]
    samples = sample_inputs(inputs, SAMPLED_TOKENS)

    @torch.no_grad()
    def order(mlp: GatedMlp, x_TD: Tensor, first: Sequence[int]) -> Tensor:
        energy_TF = neuron_energy(mlp, x_TD, activation)
        shared_F, rest_F = split_neurons(energy_TF.sum(0), first, num_shared)
        if S:
            energy_TF = energy_TF[:, rest_F]
        if experts.init == "coactivation":
            expert_F = coactivation(energy_TF, num_routed, generator)
        else:
            expert_F = by_importance(energy_TF, num_routed)
            expert_F = learn_partition(energy_TF, x_TD, expert_F, num_routed, target_k - S)
        return torch.cat((shared_F, rest_F[expert_F.argsort(stable=True)]))

    layers = list(zip(mlps, samples, kept, strict=True))
    # Layers take their random directions in turn.
    several = experts.init == "learned" and inputs.dense.device.type == "cpu"
    room = LAYER_BYTES // (TABLES * 4 * max(1, len(samples[0])) * width) if several else 1
    return _each(order, layers, room, f"{experts.init} partition, layers")


def _each(
    function: Callable[..., Tensor], layers: Sequence[tuple[object, ...]], room: int, text: str
) -> list[Tensor]:
    """The function of every layer, of up to `room` at once, which share torch's threads.

    Many operations of a layer are too small to be shared by threads, and where other processes
    hold the cores, those that wait for a second thread took several times as long.
    """
    num_threads = torch.get_num_threads()
    workers = max(1, min(room, num_threads, len(layers)))
    if workers == 1:
        return [function(*layer) for layer in track(layers, text)]
    torch.set_num_threads(num_threads // workers)
    pool = ThreadPoolExecutor(workers)
    try:
        results = pool.map(function, *zip(*layers, strict=True))
        return [next(results) for _ in track(layers, text)]
    finally:
        # After Ctrl-C the layers that have not begun are left out.
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)


def neuron_energy(
    mlp: GatedMlp, x_TD: Float[Tensor, "tokens hidden"], activation: torch.nn.Module
) -> Float[Tensor, "tokens neurons"]:
    """`h^2 * |down|^2` of every neuron, float32.

    A CPU computes all of it in float32, because many emulate products in bfloat16.
    """
    dtype = torch.float32 if x_TD.device.type == "cpu" else x_TD.dtype
    hidden_TF = mlp.hidden(x_TD.to(dtype), activation).float()
    return hidden_TF.square_().mul_(mlp.down_proj.weight.float().square().sum(0))


def by_importance(
    energy_TF: Float[Tensor, "tokens neurons"], num_experts: int
) -> Int[Tensor, " neurons"]:
    """Neurons by falling total energy, cut into experts."""
    num_neurons = energy_TF.shape[1]
    ranked_F = energy_TF.sum(0).argsort(descending=True, stable=True).cpu()
    expert_F = torch.empty(num_neurons, dtype=torch.long)
    expert_F[ranked_F] = torch.arange(num_neurons) // (num_neurons // num_experts)
    return expert_F


def coactivation(
    energy_TF: Float[Tensor, "tokens neurons"], num_experts: int, generator: torch.Generator
) -> Int[Tensor, " neurons"]:
    """Neurons that are large at the same tokens: clusters of `|h| |down|` over tokens.

    Tokens are mixed into few random directions, which keeps angles (Johnson-Lindenstrauss).
    """
    size_FT = F.normalize(energy_TF.sqrt().T, dim=1)
    if len(energy_TF) > DIRECTIONS:
        mix_TR = torch.randn(len(energy_TF), DIRECTIONS, generator=generator)
        size_FT = F.normalize(size_FT @ mix_TR.to(size_FT.device), dim=1)
    return balanced_kmeans(size_FT, num_experts, generator)


def balanced_kmeans(
    points_FN: Float[Tensor, "neurons features"], num_experts: int, generator: torch.Generator
) -> Int[Tensor, " neurons"]:
    """Spherical k-means with clusters of equal size; points have length 1."""
    first = torch.randperm(len(points_FN), generator=generator)[:num_experts]
    centres_EN = points_FN[first.to(points_FN.device)]
    expert_F = torch.empty(0, dtype=torch.long)
    prices_E = torch.zeros(num_experts, dtype=torch.float64)
    for _ in range(KMEANS_ROUNDS):
        previous, expert_F = expert_F, balanced_assignment(points_FN @ centres_EN.T, prices_E)
        if torch.equal(previous, expert_F):
            break
        centres_EN = F.normalize(_members(expert_F, num_experts, points_FN) @ points_FN, dim=1)
    return expert_F


def learn_partition(
    energy_TF: Float[Tensor, "tokens neurons"],
    x_TD: Float[Tensor, "tokens hidden"],
    expert_F: Int[Tensor, " neurons"],
    num_experts: int,
    target_k: float,
) -> Int[Tensor, " neurons"]:
    """The experts of which `target_k` a token, chosen by a linear gate, hold most of the energy.

    Two steps alternate until the share of the energy that active experts hold stops rising:

    1. A linear gate is fitted to the log energies of the experts (ridge regression; each half of
       the tokens is routed by the gate of the other half, so that what a gate cannot predict does
       not count) and activates the experts of largest softmax probability, `target_k` on average.
    2. Neurons move: `sum_t active[t, e] * energy[t, f]` is what neuron f brings in expert e, and
       the balanced assignment takes the largest total. It starts from the prices of the round
       before.

    Energies are shares of their token's, so that every token counts the same.
    """
    share_TF = energy_TF / energy_TF.sum(1, keepdim=True).clamp_min(1e-30)
    counted_T = torch.ones(len(share_TF), dtype=torch.bool, device=share_TF.device)
    halves = (slice(0, None, 2), slice(1, None, 2))
    inputs = [x_TD[half].float() for half in halves]
    gates = [Ridge(x_TD) for x_TD in inputs]
    prices_E = torch.zeros(num_experts, dtype=torch.float64)
    best, best_F = -1.0, expert_F
    for _ in range(LEARNING_ROUNDS):
        energy_TE = share_TF @ _members(expert_F, num_experts, share_TF).T
        target_TE = energy_TE.clamp_min(1e-12).log()
        logits_TE = torch.empty_like(target_TE)
        for own, other in ((0, 1), (1, 0)):
            weight_DE, bias_E = gates[other].fit(target_TE[halves[other]])
            logits_TE[halves[own]] = inputs[own] @ weight_DE.float() + bias_E.float()
        probs_TE = logits_TE.softmax(-1)
        active_TE = (probs_TE > exact_threshold(probs_TE, counted_T, target_k)).float()
        captured = (energy_TE * active_TE).sum().item() / len(energy_TE)
        if captured <= best + 1e-4:
            break
        best, best_F = captured, expert_F
        expert_F = balanced_assignment(share_TF.T @ active_TE, prices_E)
    return best_F


def _members(
    expert_F: Int[Tensor, " neurons"], num_experts: int, like: Tensor
) -> Float[Tensor, "experts neurons"]:
    """1 where a neuron belongs to an expert."""
    return F.one_hot(expert_F, num_experts).T.to(like)


def split_neurons(
    score_F: Float[Tensor, " neurons"], kept: Sequence[int], num_shared: int
) -> tuple[Int[Tensor, " shared"], Int[Tensor, " rest"]]:
    """The neurons of the shared experts, and all others by rising index; both on the CPU.

    Args:
        score_F: of each neuron; the largest are shared.
        kept: neurons that are shared before those.
        num_shared: how many neurons are shared, S * I.
    """
    ranked_F = kept_first(score_F.argsort(descending=True, stable=True).cpu(), kept)
    return ranked_F[:num_shared], ranked_F[num_shared:].sort().values


def kept_first(order_F: Int[Tensor, " neurons"], kept: Sequence[int]) -> Int[Tensor, " neurons"]:
    """The same neurons with `kept` moved to the front."""
    kept_K = torch.tensor(kept, dtype=order_F.dtype, device=order_F.device)
    return torch.cat((kept_K, order_F[~torch.isin(order_F, kept_K)]))


@torch.no_grad()
def neuron_importance(inputs: MlpInputs) -> list[Float[Tensor, " neurons"]]:
    """Per layer, each neuron's squared contribution to the output, `sum_t h^2 * |down|^2`."""
    mlps = gated_mlps(inputs.dense)
    activation = ACT2FN[activation_name(inputs.dense.config.get_text_config())]
    sums = [torch.zeros(1, device=inputs.dense.device) for _ in mlps]

    def see(index: int, x_TD: Tensor, row: PackedRow) -> None:
        hidden_TF = mlps[index].hidden(x_TD, activation)
        sums[index] = sums[index] + hidden_TF[row.router_mask[0]].float().square().sum(0)

    inputs.visit(see, "importance of neurons, rows")
    return [
        total * mlp.down_proj.weight.float().square().sum(0)
        for total, mlp in zip(sums, mlps, strict=True)
    ]


@torch.no_grad()
def sample_inputs(inputs: MlpInputs, max_tokens: int) -> list[Float[Tensor, "tokens hidden"]]:
    """Per layer, the MLP's inputs at about `max_tokens` counted tokens, evenly spaced.

    Memory: `L * max_tokens * D` numbers in the model's own format, whatever the text's length.
    """
    counts = [int(row.router_mask.sum()) for row in inputs.rows]
    stride = max(1, -(-sum(counts) // max_tokens))
    kept: list[list[Tensor]] = [[] for _ in gated_mlps(inputs.dense)]
    # Of each row, the first token that is taken, so that the stride goes on across rows.
    starts = [-before % stride for before in accumulate(counts, initial=0)]

    def see(index: int, x_TD: Tensor, row: PackedRow) -> None:
        kept[index].append(x_TD[row.router_mask[0]][starts[len(kept[index])] :: stride])

    inputs.visit(see, "reading calibration text, rows")
    return [torch.cat(layer) for layer in kept]


def importance_order(
    importance: Sequence[Float[Tensor, " neurons"]],
) -> list[Int[Tensor, " neurons"]]:
    """Per layer, neurons by falling importance, so that experts differ in it as they can."""
    return [scores.argsort(descending=True, stable=True) for scores in importance]
