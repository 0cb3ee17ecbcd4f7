"""Models, rows and steps that the benchmarks of whole training steps share."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from benchmarks.common import seeded
from tiny_onn.config.read import load_config
from tiny_onn.config.schema import Checkpointing, Objective, RunConfig
from tiny_onn.conversion.convert import convert
from tiny_onn.data.packing import PackedRow, build_row
from tiny_onn.device import ask_for_same_bits, number_format
from tiny_onn.distill.assembly import assemble
from tiny_onn.distill.clock import Clock
from tiny_onn.distill.row_graphs import RowGraphs
from tiny_onn.distill.step import StepResult, distill_step
from tiny_onn.model.attention import DOCUMENT_ATTENTION
from tiny_onn.model.expert_path import set_objective
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.parallel import ALONE, World
from tiny_onn.planning.sources import load_shape
from tiny_onn.teacher.load import load_dense, quiet_transformers, teacher_for

# Divisible into 32 experts and into NF4's blocks of 64.
TINY = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 65536,
}
# No text is read: experts are slices and gates are random, which costs a step the same. The loss'
# chunk is fixed, so that a number does not depend on how much memory was free.
FIXED = (
    "experts.init=slices",
    "experts.gate_init=random",
    "loss.chunk_tokens=512",
    # Also where the gate is frozen, for which `auto` may choose another path.
    "train.expert_path=dense",
)


@dataclass(kw_only=True, slots=True)
class Step:
    """A student, its teacher and optimizer, and the rows it reads in turn."""

    student: TinyOnnForCausalLM
    teacher: PreTrainedModel
    optimizer: torch.optim.Optimizer
    rows: Iterator[PackedRow]
    config: RunConfig
    graphs: dict[tuple[Objective, Checkpointing], RowGraphs]
    """The captured passes of each objective and checkpointing, filled as they are asked for."""

    def __call__(
        self, objective: Objective | None = None, *, clock: Clock | None = None
    ) -> StepResult:
        """One update; the gate learns by `objective`, the settings' own where it is None.

        With a clock that waits, it runs without CUDA graphs, whose passes have no phases.
        """
        config = self.config
        if objective is not None:
            config = replace(config, router=replace(config.router, objective=objective))
            set_objective(self.student.banks(), config)
        rows, models = [next(self.rows)], (self.student, self.teacher)
        name = config.router.objective, config.train.checkpointing
        passes = self.graphs.setdefault(name, RowGraphs(*models)) if clock is None else None
        return distill_step(*models, self.optimizer, rows, config, clock=clock, passes=passes)


class GradientRecorder(torch.optim.Optimizer):
    """An optimizer that changes nothing and keeps every gradient it is given, by name."""

    def __init__(self, student: TinyOnnForCausalLM) -> None:
        self.names = {p: name for name, p in student.trainable().items()}
        self.gradients: dict[str, torch.Tensor] = {}
        super().__init__(list(self.names), {})

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Copy the gradients."""
        del closure
        self.gradients = {n: p.grad.clone() for p, n in self.names.items() if p.grad is not None}


def settings(*overrides: str) -> RunConfig:
    """The defaults with `section.field=value` changes."""
    return load_config(None, None, [*FIXED, *overrides])


def shape_of(name: str) -> PreTrainedConfig:
    """A model's configuration: `tiny`'s, or a bundled one."""
    if name == "tiny":
        return AutoConfig.for_model(**TINY)
    return load_shape(name, RunConfig().teacher)[1]


def dense_model(name: str, config: RunConfig, device: torch.device | str) -> PreTrainedModel:
    """The embedded teacher, or a model of a bundled shape with random weights."""
    if name != "embedded":
        return random_dense(name, config, device)
    quiet_transformers()
    return load_dense(config.teacher, torch.device(device))[0]


def random_dense(
    shape: str | PreTrainedConfig, config: RunConfig, device: torch.device | str
) -> PreTrainedModel:
    """A frozen dense model of a shape (a bundled one by its name), random, reading packed rows."""
    found = shape_of(shape) if isinstance(shape, str) else shape
    with seeded(0), torch.device(device):
        dtype = getattr(torch, number_format(config.teacher.dtype, torch.device(device)))
        dense = AutoModelForCausalLM.from_config(found, dtype=dtype).train(False)
    dense.requires_grad_(False)
    dense.set_attn_implementation(DOCUMENT_ATTENTION)
    return dense


def make_step(
    dense: PreTrainedModel, config: RunConfig, rows: Sequence[PackedRow], world: World = ALONE
) -> Step:
    """A student of the dense model, ready to take steps over the rows, again and again.

    A GPU repeats its bits from here on if the settings say so, as it does in `distill`.
    """
    torch.use_deterministic_algorithms(False)
    if config.train.deterministic:
        ask_for_same_bits(dense.device)
    generator = torch.Generator().manual_seed(0)
    student = convert(dense, config.experts, config.router, generator=generator)
    set_objective(student.banks(), config)
    dtype = number_format(config.teacher.dtype, dense.device)
    config = replace(config, teacher=replace(config.teacher, dtype=dtype))
    training = assemble(config, student, teacher_for(dense, config.teacher), world)
    return Step(
        student=student,
        teacher=training.teacher,
        optimizer=training.optimizer,
        rows=itertools.cycle(rows),
        config=training.config,
        graphs={},
    )


def random_rows(
    vocab: int,
    row_tokens: int,
    *,
    documents: tuple[int, int] | None = None,
    num_rows: int = 1,
    seed: int = 0,
) -> list[PackedRow]:
    """Rows of random tokens: one document each, or documents of lengths in the given range."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    rows = []
    for _ in range(num_rows):
        lengths, left = [], row_tokens
        while left:
            length = left if documents is None else min(left, draw(*documents))
            # No document of a single token.
            length = left if left - length < 2 else length
            lengths.append(length)
            left -= length
        fragments = [
            torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths
        ]
        rows.append(build_row(fragments, row_tokens=row_tokens, pad_token_id=0))
    return rows


@torch.no_grad()
def perturb(student: TinyOnnForCausalLM) -> None:
    """Move the experts away from the teacher's, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    for bank in student.banks():
        for weight in (bank.experts.gate_up_proj, bank.experts.down_proj):
            noise = torch.randn(weight.shape, generator=generator) * 0.1
            weight.add_(noise.to(weight.device))
