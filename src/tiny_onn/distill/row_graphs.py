"""A row's passes as CUDA graphs, which spare the host the launches of thousands of kernels.

A step of a small model launches some seven thousand kernels, and on a fast GPU the host takes
longer to launch them than the GPU to run them. A captured graph is launched at once. Whatever
differs between rows lies in tensors that are filled before a replay: tokens, positions, masks and
the step's scales. The first row runs without a graph, which compiles what is to be compiled; the
second one captures it.

Rows give the same bits with and without a graph, since the kernels are the same.
"""

import gc
from dataclasses import fields, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tiny_onn.config.schema import RunConfig
from tiny_onn.console import say
from tiny_onn.data.packing import PackedRow
from tiny_onn.distill.clock import Clock
from tiny_onn.distill.passes import RowValues, row_passes
from tiny_onn.model.full_sharding import is_fully_sharded
from tiny_onn.model.fused_attention import block_obstacle
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.routing.gate_step import GateStep, StepScales


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
        self._num_rows_seen = 0
        self._graph: _RowGraph | None = None

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
        can_replay = self._obstacle is None and not gates.banks[0].router.annealing
        self._num_rows_seen += can_replay
        if not can_replay or self._num_rows_seen == 1:
            return row_passes(*models, row, gates, config, num_rows=num_rows, clock=clock)
        if self._graph is None:
            graph = _RowGraph(self.student, row, gates.scales, num_rows)
            graph.capture(self.teacher, config)
            self._graph = graph
        with clock.phase("passes, one graph"):
            assert num_rows == self._graph.num_rows
            return self._graph.replay(row, gates)

    def _begin(self, config: RunConfig) -> None:
        """Drop the graph of other settings."""
        self._config, self._obstacle = config, obstacle(self.student, config)
        self._num_rows_seen, self._graph = 0, None
        if (
            self._obstacle is not None
            and config.train.cuda_graphs
            and self.student.device.type == "cuda"
        ):
            say(f"train.cuda_graphs: steps run without graphs, because {self._obstacle}")


class _RowGraph:
    """A captured graph, its inputs and its results."""

    def __init__(
        self, student: TinyOnnForCausalLM, row: PackedRow, scales: StepScales, num_rows: int
    ) -> None:
        self.num_rows = num_rows
        self.student, self.graph = student, torch.cuda.CUDAGraph()
        self.parameters = list(student.trainable().values())
        self.row = replace(
            row,
            **{name: tensor.clone() for name, tensor in _tensors(row).items()},
            cu_seqlens=row.cu_seqlens[:0],
            origins=(),
        )
        self.scales = StepScales(**{k: v.clone() for k, v in _tensors(scales).items()})  # pyright: ignore[reportArgumentType]
        self.values: RowValues | None = None
        self.gates: GateStep | None = None
        self.gradients: list[Tensor | None] = []

    def capture(self, teacher: PreTrainedModel, config: RunConfig) -> None:
        """Record the passes, which run only when they are replayed."""
        before = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        # A collection inside the capture could free other graphs, which would break it.
        collects = gc.isenabled()
        gc.disable()
        try:
            # Other threads may use the GPU: NCCL watches its kernels from one.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.gates = GateStep(self.student.banks(), config, self.scales, 0)
                models = (self.student, teacher)
                self.values = row_passes(
                    *models, self.row, self.gates, config, num_rows=self.num_rows
                )
            self.gradients = [parameter.grad for parameter in self.parameters]
        finally:
            if collects:
                gc.enable()
            for parameter, gradient in zip(self.parameters, before, strict=True):
                parameter.grad = gradient

    def replay(self, row: PackedRow, gates: GateStep) -> RowValues:
        """Run the passes on a row; add its gradients to the parameters, its routing to `gates`.

        Args:
            row: A row of as many tokens as the captured one.
            gates: The gates' side of the update.
        """
        assert self.values is not None
        assert self.gates is not None
        # A row without the teacher's states must not be replayed on those of another row.
        assert _tensors(row).keys() == _tensors(self.row).keys()
        # Gradients must outlive the next replay if another row follows in the step.
        keep = self.num_rows > 1
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
    """Return the fields that are tensors, by name, without a row's document bounds.

    Rows differ in the number of their documents, and their positions say where these begin.
    """
    named = ((f.name, getattr(values, f.name)) for f in fields(values) if f.name != "cu_seqlens")
    return {name: value for name, value in named if isinstance(value, Tensor)}


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
    return reason or block_obstacle(student, config.train, config.data.row_tokens)
