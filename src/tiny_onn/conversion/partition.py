"""Partitions of a dense MLP's neurons into experts, made from its weights or from text.

Every partition gives each neuron one expert and each expert equally many neurons. Partitions from
text use a bounded sample of each layer's inputs, so that the samples do not grow with the text. A
neuron's energy at a token is `(h |down|)^2`, which is its part of the squared output if neurons do
not interfere.

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
LEARNING_ROUNDS, LEAST_GAIN = 16, 1e-4
DIRECTIONS = 512
LAYER_BYTES = 2**32
"""Bytes for the energies and inputs, float32, of the layers that are learned at the same time."""
CHUNK_TOKENS = 512
"""Tokens whose neurons are computed at once, so that elementwise work finds them in the cache."""


@torch.no_grad()
def partition_neurons(
    inputs: MlpInputs,
    experts: ExpertsConfig,
    target_k: float,
    generator: torch.Generator,
    *,
    first_neurons: Sequence[Sequence[int]] = (),
) -> list[Int[Tensor, " neurons"]] | None:
    """Return per layer the order in which neurons fill the experts; None keeps their own order.

    Shared experts come first and get the neurons of largest energy; the other neurons are
    partitioned. `slices` cuts all neurons in their own order.

    Args:
        inputs: the MLP inputs of the model to cut on calibration text; `slices`, and `cluster`
            without shared experts, need no text.
        experts: `init` names the partition.
        target_k: active experts per token that `learned` partitions for.
        generator: CPU generator of k-means' first centres and of random directions.
        first_neurons: per layer, neurons that are put before all others; empty if no layer has any.
    """
    mlps = gated_mlps(inputs.dense)
    width, S = mlps[0].gate_proj.out_features, experts.num_shared
    if experts.init in ("random", "slices"):
        if not any(first_neurons):
            return None
        return [put_first(torch.arange(width), first) for first in first_neurons]
    first_neurons = first_neurons or [()] * len(mlps)
    num_routed, num_neurons = experts.num_experts - S, S * (width // experts.num_experts)
    orders = []
    if experts.init == "cluster":
        unknown = torch.zeros(width)
        scores = neuron_importance(inputs) if S else [unknown] * len(mlps)
        for mlp, score_F, first in zip(mlps, scores, first_neurons, strict=True):
            shared_F, rest_F = split_neurons(score_F, first, num_neurons)
            rows_FD = F.normalize(mlp.gate_proj.weight.float(), dim=1)[rest_F]
            expert_F = balanced_kmeans(rows_FD, num_routed, generator)
            orders.append(torch.cat((shared_F, rest_F[expert_F.argsort(stable=True)])))
        return orders
    activation = ACT2FN[activation_name(inputs.dense.config.get_text_config())]
    samples = sample_inputs(inputs, SAMPLED_TOKENS)

    @torch.no_grad()
    def order(mlp: GatedMlp, x_TD: Tensor, first: Sequence[int]) -> Tensor:
        energy_TF = neuron_energy(mlp, x_TD, activation)
        shared_F, rest_F = split_neurons(energy_TF.sum(0), first, num_neurons)
        if S:
            energy_TF = energy_TF[:, rest_F]
        if experts.init == "coactivation":
            expert_F = coactivation(energy_TF, num_routed, generator)
        else:
            expert_F = by_importance(energy_TF, num_routed)
            expert_F = learn_partition(energy_TF, x_TD, expert_F, num_routed, target_k - S)
        return torch.cat((shared_F, rest_F[expert_F.argsort(stable=True)]))

    layers = list(zip(mlps, samples, first_neurons, strict=True))
    # Co-activation draws random directions, and layers must draw them in a fixed order.
    parallel = experts.init == "learned" and inputs.dense.device.type == "cpu"
    # A layer holds its energies, once more without those of shared experts, and its inputs twice.
    layer_bytes = 4 * max(1, len(samples[0])) * (width * (2 if S else 1) + 2 * samples[0].shape[1])
    max_layers = LAYER_BYTES // layer_bytes if parallel else 1
    return _map_layers(order, layers, max_layers, f"{experts.init} partition, layers")


def _map_layers(
    function: Callable[..., Tensor],
    layers: Sequence[tuple[object, ...]],
    max_layers: int,
    text: str,
) -> list[Tensor]:
    """Apply the function to every layer, to up to `max_layers` at once on torch's threads.

    Many operations of one layer are too small to be shared by threads, and where other processes
    held the cores, operations that waited for a second thread took several times as long.
    """
    num_threads = torch.get_num_threads()
    workers = max(1, min(max_layers, num_threads, len(layers)))
    if workers == 1:
        return [function(*layer) for layer in track(layers, text)]
    torch.set_num_threads(num_threads // workers)
    pool = ThreadPoolExecutor(workers)
    try:
        results = pool.map(function, *zip(*layers, strict=True))
        return [next(results) for _ in track(layers, text)]
    finally:
        # Ctrl-C shall not wait for layers that have not begun.
        try:
            pool.shutdown(cancel_futures=True)
        finally:
            torch.set_num_threads(num_threads)


def neuron_energy(
    mlp: GatedMlp, x_TD: Float[Tensor, "tokens hidden"], activation: torch.nn.Module
) -> Float[Tensor, "tokens neurons"]:
    """Return `h^2 * |down|^2` of every neuron, float32.

    On a CPU the whole computation is in float32, because many CPUs emulate products in bfloat16.
    """
    dtype = torch.float32 if x_TD.device.type == "cpu" else x_TD.dtype
    down_sq_F = mlp.down_proj.weight.float().square().sum(0)
    energy_TF = down_sq_F.new_empty(len(x_TD), len(down_sq_F))
    for chunk_CD, out_CF in zip(
        x_TD.split(CHUNK_TOKENS), energy_TF.split(CHUNK_TOKENS), strict=True
    ):
        hidden_CF = mlp.hidden(chunk_CD.to(dtype), activation).float()
        torch.mul(hidden_CF.square_(), down_sq_F, out=out_CF)
    return energy_TF


def by_importance(
    energy_TF: Float[Tensor, "tokens neurons"], num_experts: int
) -> Int[Tensor, " neurons"]:
    """Return each neuron's expert where neurons are sorted by falling total energy and cut."""
    num_neurons = energy_TF.shape[1]
    ranked_F = energy_TF.sum(0).argsort(descending=True, stable=True).cpu()
    expert_F = torch.empty(num_neurons, dtype=torch.long)
    expert_F[ranked_F] = torch.arange(num_neurons) // (num_neurons // num_experts)
    return expert_F


def coactivation(
    energy_TF: Float[Tensor, "tokens neurons"], num_experts: int, generator: torch.Generator
) -> Int[Tensor, " neurons"]:
    """Return each neuron's expert where neurons that are large at the same tokens are together.

    The experts are clusters of `|h| |down|` over tokens. Tokens are mixed into few random
    directions, which preserves angles (Johnson-Lindenstrauss).
    """
    size_FT = F.normalize(energy_TF.sqrt().T, dim=1)
    if len(energy_TF) > DIRECTIONS:
        mix_TR = torch.randn(len(energy_TF), DIRECTIONS, generator=generator)
        size_FT = F.normalize(size_FT @ mix_TR.to(size_FT.device), dim=1)
    return balanced_kmeans(size_FT, num_experts, generator)


def balanced_kmeans(
    points_FN: Float[Tensor, "neurons features"], num_experts: int, generator: torch.Generator
) -> Int[Tensor, " neurons"]:
    """Return each point's cluster by spherical k-means with clusters of equal size.

    Points have length 1.
    """
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
    """Return each neuron's expert so that the experts which a linear gate picks hold most energy.

    The gate picks `target_k` experts a token on average. Two steps alternate until the share of the
    energy that active experts hold stops rising:

    1. A linear gate is fitted to the log energies of the experts by ridge regression and activates
       the experts of largest softmax probability. Each half of the tokens is routed by the gate of
       the other half, so that energy which a gate cannot predict does not count.
    2. Neurons move: neuron f contributes `sum_t active[t, e] * energy[t, f]` in expert e, and the
       balanced assignment maximises the total. It starts from the prices of the previous round.

    Energies are divided by their token's total, so that every token counts the same. The total
    divides sums over neurons, and choices that are summed over tokens, so that no second table of
    energies is made.

    Args:
        energy_TF: energies of the neurons.
        x_TD: the MLP's inputs, from which the gate predicts.
        expert_F: the partition to start from.
        num_experts: experts of the partition.
        target_k: active experts per token, the mean.
    """
    scale_T1 = energy_TF.sum(1, keepdim=True).clamp_min(1e-30).reciprocal()
    counted_T = torch.ones(len(energy_TF), dtype=torch.bool, device=energy_TF.device)
    halves = (slice(0, None, 2), slice(1, None, 2))
    inputs = [x_TD[half].float() for half in halves]
    gates = [Ridge(x_TD) for x_TD in inputs]
    prices_E = torch.zeros(num_experts, dtype=torch.float64)
    best, best_F = -1.0, expert_F
    for _ in range(LEARNING_ROUNDS):
        energy_TE = (energy_TF @ _members(expert_F, num_experts, energy_TF).T).mul_(scale_T1)
        target_TE = energy_TE.clamp_min(1e-12).log()
        logits_TE = torch.empty_like(target_TE)
        for own, other in ((0, 1), (1, 0)):
            weight_DE, bias_E = gates[other].fit(target_TE[halves[other]])
            logits_TE[halves[own]] = inputs[own] @ weight_DE.float() + bias_E.float()
        probs_TE = logits_TE.softmax(-1)
        active_TE = (probs_TE > exact_threshold(probs_TE, counted_T, target_k)).float()
        captured = (energy_TE * active_TE).sum().item() / len(energy_TE)
        gain = captured - best
        if gain > 0:
            best, best_F = captured, expert_F
        if gain <= LEAST_GAIN:
            break
        expert_F = balanced_assignment(energy_TF.T @ (active_TE * scale_T1), prices_E)
    return best_F


def _members(
    expert_F: Int[Tensor, " neurons"], num_experts: int, like: Tensor
) -> Float[Tensor, "experts neurons"]:
    """Return a table that is 1 where a neuron belongs to an expert and 0 elsewhere."""
    return F.one_hot(expert_F, num_experts).T.to(like)


def split_neurons(
    score_F: Float[Tensor, " neurons"], first: Sequence[int], num_neurons: int
) -> tuple[Int[Tensor, " shared"], Int[Tensor, " rest"]]:
    """Return the neurons of the shared experts, and all others by rising index, on the CPU.

    Args:
        score_F: score of each neuron; neurons of largest score are shared.
        first: neurons that are shared whatever their score.
        num_neurons: neurons that are shared, S * I.
    """
    ranked_F = put_first(score_F.argsort(descending=True, stable=True).cpu(), first)
    return ranked_F[:num_neurons], ranked_F[num_neurons:].sort().values


def put_first(order_F: Int[Tensor, " neurons"], first: Sequence[int]) -> Int[Tensor, " neurons"]:
    """Return the same neurons with those of `first` moved to the front."""
    first_K = torch.tensor(first, dtype=order_F.dtype, device=order_F.device)
    return torch.cat((first_K, order_F[~torch.isin(order_F, first_K)]))


@torch.no_grad()
def neuron_importance(inputs: MlpInputs) -> list[Float[Tensor, " neurons"]]:
    """Return per layer each neuron's squared part of the output, `sum_t h^2 * |down|^2`."""
    mlps = gated_mlps(inputs.dense)
    activation = ACT2FN[activation_name(inputs.dense.config.get_text_config())]
    sums = [torch.zeros(1, device=inputs.dense.device) for _ in mlps]

    def observe(index: int, x_TD: Tensor, row: PackedRow) -> None:
        hidden_TF = mlps[index].hidden(x_TD, activation)
        sums[index] = sums[index] + hidden_TF[row.router_mask[0]].float().square().sum(0)

    inputs.visit(observe, "importance of neurons, rows")
    return [
        total * mlp.down_proj.weight.float().square().sum(0)
        for total, mlp in zip(sums, mlps, strict=True)
    ]


@torch.no_grad()
def sample_inputs(inputs: MlpInputs, max_tokens: int) -> list[Float[Tensor, "tokens hidden"]]:
    """Return per layer the MLP's inputs at about `max_tokens` evenly spaced tokens of the text.

    Padding and first tokens of documents are left out. The samples are `L * max_tokens * D` numbers
    in the model's own format, whatever the text's length.
    """
    counts = [int(row.router_mask.sum()) for row in inputs.rows]
    stride = max(1, -(-sum(counts) // max_tokens))
    parts: list[list[Tensor]] = [[] for _ in gated_mlps(inputs.dense)]
    # Each row starts at the token at which the stride goes on from the row before.
    starts = [-before % stride for before in accumulate(counts, initial=0)]

    def observe(index: int, x_TD: Tensor, row: PackedRow) -> None:
        parts[index].append(x_TD[row.router_mask[0]][starts[len(parts[index])] :: stride])

    inputs.visit(observe, "reading calibration text, rows")
    return [torch.cat(layer) for layer in parts]


def importance_order(
    importance: Sequence[Float[Tensor, " neurons"]],
) -> list[Int[Tensor, " neurons"]]:
    """Return per layer the neurons by falling importance, so that experts differ most in it."""
    return [scores.argsort(descending=True, stable=True) for scores in importance]
