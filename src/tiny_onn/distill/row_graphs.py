"""A row's passes as CUDA graphs, which spare the host the launches of thousands of kernels.

A step of a small model launches some seven thousand kernels, and on a fast GPU the host takes
longer to launch them than the GPU to run them. A captured graph is launched at once. Whatever
differs between rows lies in tensors that are filled before a replay: tokens, masks, document bounds
and the step's scales. Two numbers shape the launches of attention and are no tensors: how many
documents a row has and how long the longest is. Both are rounded up to powers of two, and each pair
has a graph of its own: its first row runs without one, its second row captures it.

Rows give the same bits with and without a graph, since the kernels are the same.
"""

import gc
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tiny_onn.config.schema import RunConfig
from tiny_onn.console import say
from tiny_onn.data.packing import PackedRow
from tiny_onn.distill.clock import Clock
from tiny_onn.distill.passes import RowValues, row_passes
from tiny_onn.model.attention import varlen_supported
from tiny_onn.model.full_sharding import is_fully_sharded
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.routing.gate_step import GateStep, StepScales

# Rows of further pairs of numbers run without a graph.
MAX_GRAPHS = 12
MIN_LENGTH = 256

Key = tuple[int, int]


class RowGraphs:
    """`row_passes` of two models, replayed from CUDA graphs where that is possible.

    Args:
        student: The student; its parameters must stay where they are in memory.
        teacher: The teacher, likewise.
    """

    def __init__(self, student: TinyOnnForCausalLM, teacher: PreTrainedModel) -> None:
        self.student, self.teacher = student, teacher
        self._config: RunConfig | None = None
        self._obstacle: str | None = None
        self._seen: set[Key] = set()
        self._graphs: dict[Key, _RowGraph] = {}

    def __call__(
        self,
        row: PackedRow,
        gates: GateStep,
        config: RunConfig,
        *,
        num_rows: int = 1,
        clock: Clock | None = None,
    ) -> RowValues:
        """Do what `row_passes` does."""
        models = (self.student, self.teacher)
        clock = clock or Clock(row.input_ids.device)
        if config != self._config:
            self._begin(config)
        if self._obstacle is not None or gates.banks[0].router.annealing:
            return row_passes(*models, row, gates, config, num_rows=num_rows, clock=clock)
        row, key = rounded(row)
        graph = self._graphs.get(key)
        if graph is None and (key not in self._seen or len(self._graphs) >= MAX_GRAPHS):
            self._seen.add(key)
            options: dict[str, Any] = {"num_rows": num_rows, "clock": clock}
            return row_passes(
                *models, row, gates, config, attention=attention_kwargs(row), **options
            )
        if graph is None:
            graph = _RowGraph(self.student, row, gates.scales)
            graph.capture(self.teacher, config, num_rows, self._pool())
            self._graphs[key] = graph
        with clock.phase("passes, one graph"):
            return graph.replay(row, gates, keep=num_rows > 1)

    def _begin(self, config: RunConfig) -> None:
        """Drop the graphs of other settings."""
        self._config, self._obstacle = config, obstacle(self.student, config)
        self._seen.clear()
        self._graphs.clear()
        if (
            self._obstacle is not None
            and config.train.cuda_graphs
            and self.student.device.type == "cuda"
        ):
            say(f"train.cuda_graphs: steps run without graphs, because {self._obstacle}")

    def _pool(self) -> Any:  # noqa: ANN401 - torch's handle of a memory pool
        """Return the memory pool that the graphs share, of which one is in use at a time."""
        return next((g.graph.pool() for g in self._graphs.values()), None)


class _RowGraph:
    """The graph of one pair of numbers, its inputs and its results."""

    def __init__(self, student: TinyOnnForCausalLM, row: PackedRow, scales: StepScales) -> None:
        self.student, self.graph = student, torch.cuda.CUDAGraph()
        self.parameters = list(student.trainable().values())
        self.row = replace(
            row, **{name: tensor.clone() for name, tensor in _tensors(row).items()}, origins=()
        )
        self.scales = StepScales(**{k: v.clone() for k, v in _tensors(scales).items()})  # pyright: ignore[reportArgumentType]
        self.values: RowValues | None = None
        self.gates: GateStep | None = None
        self.gradients: list[Tensor | None] = []

    def capture(
        self,
        teacher: PreTrainedModel,
        config: RunConfig,
        num_rows: int,
        pool: Any,  # noqa: ANN401 - torch's handle of a memory pool
    ) -> None:
        """Record the passes, which run only when they are replayed."""
        before = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        # A collection inside the capture could free other graphs, which would break it.
        collects = gc.isenabled()
        gc.disable()
        try:
            # Other threads may use the GPU: NCCL watches its kernels from one.
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.gates = GateStep(self.student.banks(), config, self.scales, 0)
                self.values = row_passes(
                    self.student,
                    teacher,
                    self.row,
                    self.gates,
                    config,
                    num_rows=num_rows,
                    attention=attention_kwargs(self.row),
                )
            self.gradients = [parameter.grad for parameter in self.parameters]
        finally:
            if collects:
                gc.enable()
            for parameter, gradient in zip(self.parameters, before, strict=True):
                parameter.grad = gradient

    def replay(self, row: PackedRow, gates: GateStep, *, keep: bool) -> RowValues:
        """Run the passes on a row; add its gradients to the parameters, its routing to `gates`.

        Args:
            row: A rounded row of this graph's numbers.
            gates: The gates' side of the update.
            keep: Whether the gradients must outlive the next replay.
        """
        assert self.values is not None
        assert self.gates is not None
        for inputs, into in ((row, self.row), (gates.scales, self.scales)):
            for name, tensor in _tensors(inputs).items():
                getattr(into, name).copy_(tensor)
        self.graph.replay()
        gates.add(self.gates)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient.clone() if keep else gradient
            else:
                parameter.grad.add_(gradient)
        results = {name: tensor.clone() for name, tensor in _tensors(self.values).items()}
        return replace(self.values, **results)


def _tensors(values: PackedRow | StepScales | RowValues) -> dict[str, Tensor]:
    """Return the fields that are tensors, by name."""
    named = ((field.name, getattr(values, field.name)) for field in fields(values))
    return {name: value for name, value in named if isinstance(value, Tensor)}


def rounded(row: PackedRow) -> tuple[PackedRow, Key]:
    """Return the row with a power of two of documents, and the numbers that shape launches.

    Further bounds repeat the last one and stand for documents without a token. The longest length
    is an upper bound of the lengths.

    Few documents are not filled up to many: the deterministic backward pass of flash attention
    gives each document as many blocks of a GPU as if all documents were of one length, so that a
    long one among fifteen empty ones would keep one block for each head.
    """
    tokens, documents = row.input_ids.numel(), len(row.cu_seqlens) - 1
    num_documents = 1 << (documents - 1).bit_length()
    length = min(tokens, max(MIN_LENGTH, 1 << (row.max_seqlen - 1).bit_length()))
    filler = row.cu_seqlens[-1:].expand(num_documents - documents)
    cu_seqlens = torch.cat((row.cu_seqlens, filler))
    return replace(row, cu_seqlens=cu_seqlens, max_seqlen=length), (num_documents, length)


def attention_kwargs(row: PackedRow) -> dict[str, Any]:
    """Return `packed_kwargs` of a rounded row: without bounds on the host, which no graph reads."""
    torch._dynamo.maybe_mark_dynamic(row.cu_seqlens, 0)
    return {
        "position_ids": row.position_ids,
        "cu_seq_lens_q": row.cu_seqlens,
        "cu_seq_lens_k": row.cu_seqlens,
        "max_length_q": row.max_seqlen,
        "max_length_k": row.max_seqlen,
    }


def obstacle(student: TinyOnnForCausalLM, config: RunConfig) -> str | None:
    """Return why the passes cannot run from a graph, or None if they can."""
    router, smk = config.router, config.smk
    settings = {
        "train.cuda_graphs is false": not config.train.cuda_graphs,
        "the device is no GPU": student.device.type != "cuda",
        "router.objective = task with top_k or top_any has losses that count on the host": (
            router.objective == "task" and router.selection in ("top_k", "top_any")
        ),
        "smk.explore_fraction draws new numbers on the host": smk.explore_fraction > 0,
        "router.reseed_every_steps counts on the host": router.reseed_every_steps > 0,
        'train.shard = "full" gathers weights within a row': is_fully_sharded(student),
        'train.checkpointing = "offload" waits for the host': (
            config.train.checkpointing == "offload"
        ),
        'the layers take the path "grouped", which waits for the host': (
            student.banks()[0].execution.path == "grouped"
        ),
    }
    reason = next((reason for reason, holds in settings.items() if holds), None)
    return reason or _attention_obstacle(student)


def _attention_obstacle(student: TinyOnnForCausalLM) -> str | None:
    """Return why attention would loop over documents on the host, or None if it would not."""
    config = student.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "attention with a softcap loops over documents on the host"
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    dtype = student.backbone.dtype
    query = torch.empty(1, 1, 1, head_dim, device=student.device, dtype=dtype)
    if not varlen_supported(query, query):
        return f"attention in {dtype} loops over documents on the host"
    return None
