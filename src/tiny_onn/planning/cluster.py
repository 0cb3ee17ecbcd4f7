"""Several GPUs of a run: what they exchange in a step, how long that takes, and what each holds.

Time is that of rings: of a tensor that n members reduce or gather, each sends (n - 1) / n, member
by member. Members are first the GPUs of a node and then the nodes, whose GPUs exchange a part of
the tensor each. Nothing overlaps, because `distill` reduces gradients after all backward passes.
Full sharding, which overlaps, is planned in the same way, and so by its slowest case.

The bytes of small collectives (counts of routing, losses, norms) are left out, and so is the
waiting for a slower GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from tiny_onn.config.schema import OptimConfig, RunConfig, Shard
from tiny_onn.errors import UserError
from tiny_onn.parallel import balanced, check_shares, messages
from tiny_onn.planning.costs import Parameters, Sizes
from tiny_onn.planning.device_names import device_rows
from tiny_onn.planning.memory import Moment
from tiny_onn.planning.optimizer_state import (
    BLOCK_SIZE_8BIT,
    MIN_8BIT_SIZE,
    muon_bytes,
    state_bytes,
)
from tiny_onn.planning.sources import Device

GPUS_PER_NODE = 8
NETWORK_GBPS = 3200.0
"""Rate of a node's network, Gbit/s: eight adapters of 400 Gbit/s, as a DGX H100 has."""
LINK_SHARE = 0.8
"""Share of a link's rate that a collective reaches. NCCL's own cost model (src/graph/topo.h) counts
18 x 20.6 GB/s for the 450 GB/s of an H100's NVLink, and 12 x 20 for the 300 of an A100's. NCCL's
authors name the same 370 of 450 GB/s for rings (github.com/NVIDIA/nccl-tests, issue 212)."""
MESSAGE_COPIES = 4
"""Passes over a GPU's memory of tensors that share a message: they are read and written when they
are joined, and again when the sums are put back."""
HOST_TENSOR_S = 20e-6
"""Seconds of the host that a tensor takes on its way into a message and out of it. Python handles
each tensor several times; `World.all_reduce_sum` takes 19 us for each of 261 small tensors on a CPU
of this project where nothing is sent, and the measured steps of docs/scaling.md 19 to 24."""
TALLIES = 3
"""Small tensors of each layer that are added up beside the gradients if gates learn."""
CALL_S = 8.4e-6
"""Seconds that a collective takes at least. This and the seconds of each hop are those of rings
with NCCL's Simple protocol in its cost model (src/graph/tuning.cc)."""
NVLINK_HOP_S, PCIE_HOP_S, NETWORK_HOP_S = 3.4e-6, 5.7e-6, 14e-6
PCIE_GB_S = 32.0
"""Rate of PCIe 4.0 x16, assumed for GPUs that `devices.toml` does not name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """The GPUs of a run, all of one kind, and how the run is divided over them."""

    gpus: int
    gpus_per_node: int = GPUS_PER_NODE
    network_gbps: float = NETWORK_GBPS
    """Rate of a node's network in one direction, Gbit/s."""
    shard: Shard = "none"

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def gpus_of_node(self) -> int:
        """The number of GPUs that a node uses."""
        return min(self.gpus, self.gpus_per_node)

    def check(self, config: RunConfig, device: Device) -> None:
        """Refuse what cannot be planned.

        Raises:
            UserError: a number is out of range, the GPUs do not fill their nodes, the rows of a
                step or the experts that are cut do not divide over the GPUs, or the device is a
                CPU.
        """
        if self.gpus < 1:
            raise UserError(f"--gpus: got {self.gpus}, expected an integer >= 1, such as 8")
        if self.gpus_per_node < 1:
            raise UserError(
                f"--gpus-per-node: got {self.gpus_per_node}, expected an integer >= 1; leave it"
                f" out for {GPUS_PER_NODE}"
            )
        if not 0 < self.network_gbps < 1e6:
            raise UserError(
                f"--network-gbps: got {self.network_gbps:g}, expected a node's Gbit/s, a number"
                f" > 0; leave it out for {NETWORK_GBPS:g}"
            )
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise UserError(
                f"--gpus: got {self.gpus}, expected a multiple of the {self.gpus_per_node} GPUs of"
                " a node; give the number of a node's as --gpus-per-node"
            )
        if self.gpus > 1 and device.type == "cpu":
            raise UserError(
                f"--gpus: got {self.gpus} with a CPU as the device, expected 1; name a GPU as"
                " --device"
            )
        rows = config.train.rows_per_step
        if rows % self.gpus:
            raise UserError(
                f"train.rows_per_step: got {rows}, expected a multiple of the {self.gpus} GPUs over"
                f" which a step's rows are divided, such as --set train.rows_per_step={self.gpus}"
            )
        if self.shard == "full":
            check_shares(config.experts.num_experts, self.gpus)

    @property
    def num_shares(self) -> int:
        """The number of GPUs that step the experts, each its own share."""
        return 1 if self.shard == "none" else self.gpus

    def of_one_gpu(self, config: RunConfig) -> RunConfig:
        """Return the settings with the rows that one GPU reads in a step."""
        rows = config.train.rows_per_step // self.gpus
        return replace(config, train=replace(config.train, rows_per_step=rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """The way between the GPUs of a node."""

    name: str
    gb_s: float
    """Peak rate in one direction."""
    hop_s: float
    """Seconds that a part of a tensor takes from one GPU to the next beside its transfer."""


@dataclass(frozen=True, slots=True)
class Collective:
    """The exchanges of one kind in a step."""

    name: str
    bytes: int
    """Bytes of the whole tensors, of all calls."""
    calls: int
    seconds: float


def link_of(device: Device) -> Link:
    """Return the link between GPUs of a kind, by the kind's name."""
    words = f" {device.name.replace('-', ' ')} "
    for name, row in device_rows().items():
        if f" {name} " in words and " pcie " not in words.lower():
            hop_s = NVLINK_HOP_S if row["link"].startswith("NVLink") else PCIE_HOP_S
            return Link(name=row["link"], gb_s=float(row["link_gb_s"]), hop_s=hop_s)
    return Link(name="PCIe 4.0 x16, assumed", gb_s=PCIE_GB_S, hop_s=PCIE_HOP_S)


def check_blocks(config: OptimConfig, sizes: Sizes, num_shares: int) -> None:
    """Refuse shares of weights that end within a block of 8-bit optimizer state.

    Args:
        config: the settings of the optimizer.
        sizes: the student's sizes.
        num_shares: the number of processes that hold a share each.

    Raises:
        UserError: a share of gates, ups or downs, which are cut apart, is no multiple of a block.
    """
    projection = sizes.neurons * sizes.hidden
    share, is_8bit = projection // num_shares, "8bit" in config.name
    # Gates and ups are one weight, and a small weight has no blocks.
    if num_shares > 1 and is_8bit and 2 * projection >= MIN_8BIT_SIZE and share % BLOCK_SIZE_8BIT:
        raise UserError(
            f'optim.name: got "{config.name}" with train.shard = "full" and {share} weights of'
            f" a projection in each of {num_shares} processes, expected a multiple of"
            f" {BLOCK_SIZE_8BIT}, which share a scale; set optim.name = "
            '"adamw" or "muon", or train.shard = "optimizer"'
        )


class _Wires:
    """The seconds of collectives on a cluster."""

    def __init__(self, cluster: Cluster, link: Link, bandwidth_gb_s: float) -> None:
        self.memory_rate = bandwidth_gb_s * 1e9
        self.gpus, self.nodes = cluster.gpus_of_node, cluster.nodes
        self.link_rate = LINK_SHARE * link.gb_s * 1e9
        self.network_rate = LINK_SHARE * cluster.network_gbps / 8 * 1e9
        self.hops_s = (self.gpus - 1) * link.hop_s + (self.nodes - 1) * NETWORK_HOP_S

    def gather(self, num_bytes: int, calls: int = 1) -> float:
        """Return the seconds of all-gathers or reduce-scatters of so many bytes altogether."""
        inside = (self.gpus - 1) / self.gpus * num_bytes / self.link_rate
        between = (self.nodes - 1) / self.nodes * num_bytes / self.network_rate
        return inside + between + calls * (CALL_S + self.hops_s)

    def all_reduce(self, num_bytes: int, calls: int) -> float:
        """Return the seconds of all-reduces, each a reduce-scatter and an all-gather in one."""
        return 2 * self.gather(num_bytes, calls) - calls * CALL_S

    def copies(self, num_bytes: int) -> float:
        """Return the seconds in which a GPU joins so many bytes of tensors and parts them again."""
        return MESSAGE_COPIES * num_bytes / self.memory_rate

    def broadcast(self, num_bytes: int, calls: int) -> float:
        """Return the seconds of broadcasts one after the other, of so many bytes altogether."""
        rate = self.link_rate if self.gpus > 1 else self.network_rate
        if self.nodes > 1:
            rate = min(rate, self.network_rate)
        return num_bytes / rate + calls * (CALL_S + self.hops_s)


def collectives(
    config: RunConfig, sizes: Sizes, parameters: Parameters, cluster: Cluster, device: Device
) -> tuple[Collective, ...]:
    """Return what the GPUs exchange in a step; nothing if there is one GPU.

    Args:
        config: the settings, with the rows that one GPU reads in a step.
        sizes: the student's sizes.
        parameters: the numbers of parameters.
        cluster: the GPUs.
        device: their kind.
    """
    if cluster.gpus == 1:
        return ()
    wires = _Wires(cluster, link_of(device), device.bandwidth_gb_s)
    tensors = _trained_tensors(config, sizes, parameters)
    if cluster.shard == "full":
        return _of_full_sharding(config, sizes, parameters, wires, tensors)
    gradients = _added_up("all-reduce of gradients", tensors, config, sizes, wires)
    if cluster.shard == "none":
        return (gradients,)
    owned = [tensor.bytes for tensor in tensors if not tensor.of_gate]
    seconds = wires.broadcast(sum(owned), len(owned))
    return (gradients, Collective("broadcast of experts", sum(owned), len(owned), seconds))


def _of_full_sharding(
    config: RunConfig,
    sizes: Sizes,
    parameters: Parameters,
    wires: _Wires,
    tensors: "Sequence[Trained]",
) -> tuple[Collective, ...]:
    """Return the exchanges if MLPs and experts are gathered layer by layer where they are used.

    A row needs the teacher's MLPs once and the student's experts twice, in the forward and the
    backward pass, and its gradients are scattered at once. The gradients of gates, mean outputs and
    scales are added up after the last row.
    """
    rows, layers = config.train.rows_per_step, sizes.layers
    experts = layers * _layer_bytes(config, sizes)
    exchanged = (
        ("all-gather of the teacher", _teacher_mlp_bytes(config, sizes, parameters), 1),
        ("all-gather of the student", experts, 2),
        ("reduce-scatter of gradients", experts, 1),
    )
    found = []
    for name, once, times in exchanged:
        if num_bytes := rows * times * once:
            calls = rows * times * layers
            found.append(Collective(name, num_bytes, calls, wires.gather(num_bytes, calls)))
    whole = [tensor for tensor in tensors if not _is_cut(tensor, config, sizes)]
    return (*found, _added_up("all-reduce of other gradients", whole, config, sizes, wires))


def _added_up(
    name: str, tensors: "Sequence[Trained]", config: RunConfig, sizes: Sizes, wires: _Wires
) -> Collective:
    """Return the sums of gradients over all GPUs, with the joining of tensors into messages."""
    num_bytes = [tensor.bytes for tensor in tensors]
    groups = messages(num_bytes)
    joined = sum(num_bytes[number] for group in groups if len(group) > 1 for number in group)
    tallies = TALLIES * sizes.layers if config.router.objective != "none" else 0
    host_s = HOST_TENSOR_S * (len(tensors) + tallies)
    seconds = wires.all_reduce(sum(num_bytes), len(groups)) + wires.copies(joined) + host_s
    return Collective(name, sum(num_bytes), len(groups), seconds)


def _is_cut(tensor: "Trained", config: RunConfig, sizes: Sizes) -> bool:
    """Return True if full sharding cuts a tensor, which it does with projections of experts."""
    return tensor.bytes >= _layer_bytes(config, sizes) // 3


def _layer_bytes(config: RunConfig, sizes: Sizes) -> int:
    """Return the bytes of one layer's experts, which are those of their gradients."""
    master = 2 if config.optim.master_dtype == "bfloat16" else 4
    return 3 * master * sizes.neurons * sizes.hidden


def _teacher_mlp_bytes(config: RunConfig, sizes: Sizes, parameters: Parameters) -> int:
    """Return the bytes of the teacher's MLPs that are cut: all of them unless it is quantised."""
    if config.teacher.quantization != "none":
        return 0
    return (2 if config.teacher.dtype == "bfloat16" else 4) * parameters.dense_mlps


def moments_of_rank(
    moments: Sequence[Moment],
    config: RunConfig,
    sizes: Sizes,
    parameters: Parameters,
    cluster: Cluster,
) -> tuple[Moment, ...]:
    """Return the moments of a step on the GPU that holds most, from those of a GPU that holds all.

    Args:
        moments: the moments of `planning.memory.moments`.
        config: the settings, with the rows that one GPU reads in a step.
        sizes: the student's sizes.
        parameters: the numbers of parameters.
        cluster: the GPUs.
    """
    if cluster.gpus == 1 or cluster.shard == "none":
        return tuple(moments)
    if cluster.shard == "optimizer":
        tensors = _trained_tensors(config, sizes, parameters)
        held = state_of_rank(tensors, cluster.gpus)
        return tuple(replace(m, parts={**m.parts, "optimizer state": held}) for m in moments)
    given = (config, sizes, parameters, cluster.gpus)
    return tuple(_with_shares(moment, *given) for moment in moments)


def _with_shares(
    moment: Moment, config: RunConfig, sizes: Sizes, parameters: Parameters, gpus: int
) -> Moment:
    """Return a moment on one of the GPUs that each hold a share of experts and teacher's MLPs.

    The next layer is gathered while one is used, and the gradients of a layer are whole, and once
    more in their message, until they are sent.
    """
    layer, mlps = _layer_bytes(config, sizes), _teacher_mlp_bytes(config, sizes, parameters)
    tensors = _trained_tensors(config, sizes, parameters)
    small = [tensor for tensor in tensors if not _is_cut(tensor, config, sizes)]
    kept = {
        "teacher's weights": moment.parts.get("teacher's weights", 0) - mlps,
        "expert weights to train": sum(t.bytes for t in small if not t.of_gate),
        "optimizer state": sum(tensor.state_bytes for tensor in small),
    }
    parts = dict(moment.parts)
    for name in (*kept, "gradients"):
        if name in parts:
            whole = min(parts[name], kept.get(name, 0))
            parts[name] = whole + -(-(parts[name] - whole) // gpus)
    if "directions" in parts:
        shape = (sizes.layers, sizes.experts // gpus, sizes.expert_dim, sizes.hidden)
        parts["directions"] = muon_bytes(*shape, config.optim.master_dtype, device="cuda")
    # The random bits of rounding are those of a whole weight, of three numbers of four bytes.
    parts["rounding"] = parts.get("rounding", 0) // 3 * (gpus + 2) // gpus
    gathered = {"teacher's forward": 2 * mlps // sizes.layers, "loss": 0, "update": 0}
    parts["gathered weights and gradients"] = gathered.get(moment.name, 4 * layer)
    return replace(moment, parts=parts)


class Trained(NamedTuple):
    """A tensor that learns: its bytes, which are those of its gradient, and those of its state."""

    bytes: int
    state_bytes: int
    of_gate: bool = False


def state_of_rank(tensors: Sequence[Trained], num_ranks: int) -> int:
    """Return the most bytes of optimizer state that a rank holds.

    The state of each of the experts' tensors is on one rank, and that of gates on all ranks.
    """
    states = [0] * num_ranks
    experts = [tensor for tensor in tensors if not tensor.of_gate]
    ranks = balanced([tensor.bytes for tensor in experts], num_ranks)
    for tensor, rank in zip(experts, ranks, strict=True):
        states[rank] += tensor.state_bytes
    return max(states) + sum(tensor.state_bytes for tensor in tensors if tensor.of_gate)


def _trained_tensors(config: RunConfig, sizes: Sizes, parameters: Parameters) -> list[Trained]:
    """Return the tensors that learn, layer by layer."""
    E, I, D = sizes.experts, sizes.expert_dim, sizes.hidden
    master = 2 if config.optim.master_dtype == "bfloat16" else 4
    shapes = [(2, E, I, D), (E, I, D)]
    # Mean outputs and scales have a number of values for each expert.
    others = parameters.experts // sizes.layers - sum(prod(shape) for shape in shapes)
    shapes += [(E, others // E)] if others else []
    # Paged state lies in the memory of the host.
    paged = config.optim.name == "paged_adamw8bit"
    layer = [
        Trained(master * prod(shape), 0 if paged else state_bytes(config.optim.name, shape))
        for shape in shapes
    ]
    if config.router.objective != "none":
        for size in (parameters.gate_weights, parameters.gate_biases):
            layer.append(Trained(4 * size // sizes.layers, 8 * size // sizes.layers, True))
    return layer * sizes.layers
