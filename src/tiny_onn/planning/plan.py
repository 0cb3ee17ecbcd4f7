"""The plan of a run, which is what a teacher, settings and a device will need before it starts.

Only a hub id's config.json is downloaded, and no weight is read. `costs.py` counts parameters and
FLOPs, `memory.py` the peak memory, and `devices.toml` holds devices with the source of every
number. Time is FLOPs / (peak rate * efficiency), and on several GPUs also that of `cluster.py`.
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from tiny_onn.config.schema import RunConfig
from tiny_onn.errors import UserError
from tiny_onn.planning.cluster import (
    Cluster,
    Collective,
    check_blocks,
    collectives,
    link_of,
    moments_of_rank,
)
from tiny_onn.planning.costs import (
    Parameters,
    Sizes,
    StepFlops,
    TokenFlops,
    count_parameters,
    document_context,
    meta_models,
    sizes_of,
    step_flops,
    token_flops,
)
from tiny_onn.planning.disk import DiskUse, disk_use
from tiny_onn.planning.memory import RUNTIME_BYTES, Moment, moments
from tiny_onn.planning.sources import Device, find_device, load_shape

EFFICIENCY = 0.3
"""Share of the peak rate that a step reaches unless `--efficiency` gives another. Megatron-Turing
NLG 530B reached 30.2 % of its GPUs' rate (PaLM, arXiv 2204.02311, table 3); smaller matrices reach
less."""
DOCUMENT_TOKENS = 2048
"""Tokens of a document, an assumption that `--document-tokens` replaces."""
ONE_GPU = Cluster(gpus=1)


@dataclass(frozen=True, slots=True)
class CardLine:
    """A number of the model card beside the same number counted here."""

    quantity: str
    card: str
    section: str
    true: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The needs of one run, which `render` shows and `as_dict` returns for JSON."""

    model: str
    config: RunConfig
    device: Device
    efficiency: float
    document_tokens: int
    sizes: Sizes
    parameters: Parameters
    token: TokenFlops
    whole_rows: StepFlops
    """FLOPs of a step, on each GPU, whose rows are one document each."""
    packed: StepFlops
    """FLOPs of a step, on each GPU, whose rows hold documents of `document_tokens`, kept apart by
    attention."""
    moments: tuple[Moment, ...]
    disk: DiskUse
    cluster: Cluster
    collectives: tuple[Collective, ...]
    """The exchanges of a step; empty for one GPU."""

    @property
    def peak(self) -> Moment:
        """The moment of a step at which most memory is in use."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak_bytes(self) -> int:
        """The memory at the peak, with interpreter, libraries and CUDA context."""
        return self.peak.total + RUNTIME_BYTES[self.device.type]

    @property
    def fits(self) -> bool:
        """True if the memory at the peak is at most the device's."""
        return self.peak_bytes <= self.device.memory_bytes

    @property
    def steps(self) -> int:
        """The number of steps until `train.tokens` are read."""
        step = self.config.train.rows_per_step * self.config.data.row_tokens
        return math.ceil(self.config.train.tokens / step)

    @property
    def has_rate(self) -> bool:
        """True if the device's rate is one for the run's number format."""
        return self.device.type == "cpu" or self.config.teacher.dtype == "bfloat16"

    @property
    def communication_s(self) -> float:
        """The seconds of a step in which the GPUs exchange tensors."""
        return sum((collective.seconds for collective in self.collectives), 0.0)

    def step_seconds(self, step: StepFlops) -> float | None:
        """Return the time of such a step; None if the rate is for another number format."""
        rate = self.device.bf16_tflops * 1e12 * self.efficiency
        return step.total / rate + self.communication_s if self.has_rate else None

    def seconds(self, step: StepFlops) -> float | None:
        """Return the time of a run of such steps; None if the rate is for another number format."""
        rate = self.device.bf16_tflops * 1e12 * self.efficiency
        communication_s = self.steps * self.communication_s
        return self.steps * step.total / rate + communication_s if self.has_rate else None

    def tokens_per_s(self, step: StepFlops) -> float | None:
        """Return the tokens that all GPUs together read in a second; None if it is unknown."""
        seconds = self.step_seconds(step)
        tokens = self.config.train.rows_per_step * self.config.data.row_tokens
        return None if seconds is None else tokens / seconds

    def share_of_linear(self, step: StepFlops) -> float | None:
        """Return the speed as a share of what the GPUs would reach without exchanging anything."""
        seconds = self.step_seconds(step)
        return None if seconds is None else 1 - self.communication_s / seconds

    def decode_tokens_per_s(self, share_of_ffn: float) -> float:
        """Return an upper bound on the tokens a second of decoding one sequence.

        The bound is the rate at which bf16 weights are read once per token, without cache,
        computation or overhead.

        Args:
            share_of_ffn: the share of the MLPs' weights that a token reads.
        """
        p = self.parameters
        head = p.output_head or p.embeddings
        weights = head + p.attention + p.norms + p.dense_mlps * share_of_ffn
        return self.device.bandwidth_gb_s * 1e9 / (2 * weights)

    def as_dict(self) -> dict[str, object]:
        """Return every number as JSON values, in units that the names state."""
        derived = ("backbone", "gates", "trainable", "student_total", "dense_total")
        token_shares = {name: getattr(self.token, name) for name in ("ffn_saved", "model_saved")}
        k_share = self.config.router.target_k / self.sizes.experts
        numbers: dict[str, object] = {
            "model": self.model,
            "device": asdict(self.device),
            "teacher_dtype": self.config.teacher.dtype,
            "row_tokens": self.config.data.row_tokens,
            "rows_per_step": self.config.train.rows_per_step,
            "document_tokens": self.document_tokens,
            "parameters": asdict(self.parameters)
            | {name: getattr(self.parameters, name) for name in derived},
            "card": [asdict(line) for line in card_lines(self)],
            "token_forward_flops": {n: round(v) for n, v in asdict(self.token).items()}
            | token_shares,
            "step_flops": {
                name: asdict(step) | {"total": step.total}
                for name, step in (("whole_rows", self.whole_rows), ("packed", self.packed))
            },
            "memory": {
                "peak_at": self.peak.name,
                "parts_bytes": self.peak.parts,
                "step_bytes": self.peak.total,
                "runtime_bytes": RUNTIME_BYTES[self.device.type],
                "total_bytes": self.peak_bytes,
                "device_bytes": self.device.memory_bytes,
                "fits": self.fits,
            },
            "disk": asdict(self.disk) | {"total_bytes": self.disk.total_bytes},
            "time": {
                "tokens": self.config.train.tokens,
                "steps": self.steps,
                "efficiency": self.efficiency,
                "whole_rows_s": self.seconds(self.whole_rows),
                "packed_s": self.seconds(self.packed),
            },
            "decode_tokens_per_s_at_most": {
                "dense": self.decode_tokens_per_s(1.0),
                "student": self.decode_tokens_per_s(k_share),
            },
        }
        return numbers | ({"cluster": self._cluster_as_dict()} if self.cluster.gpus > 1 else {})

    def _cluster_as_dict(self) -> dict[str, object]:
        steps = (("whole_rows", self.whole_rows), ("packed", self.packed))
        return asdict(self.cluster) | {
            "nodes": self.cluster.nodes,
            "link": asdict(link_of(self.device)),
            "rows_per_gpu": self.cluster.of_one_gpu(self.config).train.rows_per_step,
            "collectives": [asdict(collective) for collective in self.collectives],
            "communication_s": self.communication_s,
            "tokens_per_s": {name: self.tokens_per_s(step) for name, step in steps},
            "share_of_linear": {name: self.share_of_linear(step) for name, step in steps},
        }


def plan(
    config: RunConfig,
    shape: str | Path,
    device: str | Device,
    *,
    efficiency: float = EFFICIENCY,
    document_tokens: int = DOCUMENT_TOKENS,
    cluster: Cluster = ONE_GPU,
) -> Plan:
    """Plan the distillation of a teacher by these settings on a device, or on several of a kind.

    Args:
        config: the settings, whose `teacher.path` is not used.
        shape: a bundled name, `embedded`, a folder or file with a config.json, or a hub id.
        device: `auto`, `cpu` (measured now), a name of `devices.toml`, or numbers.
        efficiency: share of the device's peak rate that a step reaches, in (0, 1].
        document_tokens: tokens of a document, the mean over tokens.
        cluster: the GPUs that divide a step's rows.

    Raises:
        UserError: there is no such teacher or device, the architecture cannot be converted, or the
            sizes do not fit together.
    """
    if not 0 < efficiency <= 1:
        raise UserError(
            f"--efficiency: got {efficiency}, expected a number > 0 and <= 1, the share of the "
            f"device's peak rate; leave it out for {EFFICIENCY}"
        )
    if document_tokens < 1:
        raise UserError(
            f"--document-tokens: got {document_tokens}, expected an integer >= 1; leave it out "
            f"for {DOCUMENT_TOKENS}"
        )
    model, dense_config = load_shape(shape, config.teacher)
    device = find_device(device, config.teacher.dtype) if isinstance(device, str) else device
    if config.teacher.dtype == "auto":
        config = replace(config, teacher=replace(config.teacher, dtype=device.auto_dtype))
    cluster.check(config, device)
    dense, student = meta_models(config, dense_config)
    sizes, parameters = sizes_of(student), count_parameters(dense, student)
    if cluster.shard == "full":
        check_blocks(config.optim, sizes, cluster.gpus)
    document_tokens = min(document_tokens, config.data.row_tokens)
    token = token_flops(
        sizes,
        target_k=config.router.target_k,
        row_context=document_context(config.data.row_tokens),
        document_context=document_context(document_tokens),
    )
    mine = cluster.of_one_gpu(config)
    held = moments(mine, sizes, parameters, device.type, device.memory_bytes)
    flops_of = partial(step_flops, mine, sizes, token, num_shares=cluster.num_shares)
    return Plan(
        model=model,
        config=config,
        device=device,
        efficiency=efficiency,
        document_tokens=document_tokens,
        sizes=sizes,
        parameters=parameters,
        token=token,
        whole_rows=flops_of(packed=False),
        packed=flops_of(packed=True),
        moments=moments_of_rank(held, mine, sizes, parameters, cluster),
        disk=disk_use(config, student),
        cluster=cluster,
        collectives=collectives(mine, sizes, parameters, cluster, device),
    )


def card_lines(plan: Plan) -> list[CardLine]:
    """Compare the model card's numbers with the counted ones, for the student that it describes.

    The numbers are transcribed from the card "Tiny-ONN 0.6B Hyper-SMoE", 2025-07-19. Other students
    get no lines.
    """
    s, p, t = plan.sizes, plan.parameters, plan.token
    described = (s.layers, s.hidden, s.vocab, s.experts, s.expert_dim) == (28, 1024, 151936, 32, 96)
    if not described or plan.config.router.target_k != 16:
        return []
    halved = "the card counts half of the attention (head_dim 64, or packed 4-bit weights)"
    matrices = "the card counts two of three matrices, and a multiply-add as 1"
    no_gate = "the card divides rounded numbers, and leaves out the gate"
    dense, at_k = t.ffn_dense / s.layers, (t.ffn_at_k + t.router) / s.layers
    rows = (
        ("shared backbone", "243.66 M", "2", millions(p.backbone), halved),
        ("experts and gates", "265.16 M", "2", millions(p.trainable), "agrees"),
        ("one expert", "0.295 M", "2", millions(p.one_expert), "agrees"),
        ("dense total", "0.508 B", "2", millions(p.dense_total), halved),
        ("student total", "0.509 B", "2", millions(p.student_total), halved),
        ("dense MLP, FLOPs per token and layer", "6.29 M", "3.2", millions(dense), matrices),
        ("16 experts and gate, the same", "3.15 M", "3.2", millions(at_k), matrices),
        ("MLP FLOPs saved", "49.92 %", "3.2", f"{100 * t.ffn_saved:.2f} %", no_gate),
        ("all matmul FLOPs saved", "-", "-", f"{100 * t.model_saved:.2f} %", "not on the card"),
    )
    return [CardLine(*row) for row in rows]


def millions(number: int | float) -> str:
    """Format a number in millions with two decimals, or three below one million."""
    return f"{number / 1e6:,.{2 if number >= 1e6 else 3}f} M"
