"""The program of a training step: student, teacher and optimizer as the settings ask.

The loop, the profiler, the benchmarks and the tests all assemble it here, so that measurements are
of the program that trains.
"""

from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from tiny_onn.config.schema import RunConfig
from tiny_onn.data.packing import PackedRow
from tiny_onn.data.stream import TokenStream
from tiny_onn.distill.checkpointing import checkpoint_layers
from tiny_onn.distill.optim import SplitOptimizer, build_optimizer, cast_experts
from tiny_onn.distill.row_graphs import RowGraphs
from tiny_onn.model.backbone import head_of
from tiny_onn.model.compile import compile_backbones
from tiny_onn.model.full_sharding import shard_fully
from tiny_onn.model.norms import own_norms
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.ops.loss_chunks import loss_chunk_tokens
from tiny_onn.parallel import ALONE, World
from tiny_onn.planning.cluster import check_blocks
from tiny_onn.planning.costs import sizes_of
from tiny_onn.teacher.cache_reader import TeacherCache, open_cache


@dataclass(kw_only=True, slots=True)
class Training:
    """The models, optimizer and settings on which `distill_step` and `blockwise_step` work."""

    student: TinyOnnForCausalLM
    teacher: PreTrainedModel
    optimizer: SplitOptimizer
    config: RunConfig
    """The settings, with `loss.chunk_tokens` as a number."""
    passes: RowGraphs
    """The passes of a row in the global stage."""
    cache: TeacherCache | None
    """The teacher's hidden states on the training rows; None: the teacher computes them."""

    def next_rows(self, stream: TokenStream, world: World = ALONE) -> list[PackedRow]:
        """Return the rows of the next step; this process's with the teacher's states of a cache.

        Raises:
            UserError: the cache does not hold a row, or is damaged.
        """
        rows = [next(stream) for _ in range(self.config.train.rows_per_step)]
        if self.cache is not None:
            return self.cache.taught(rows, world)
        return rows

    def close(self) -> None:
        """Begin no more of the work that was planned for later steps."""
        if self.cache is not None:
            self.cache.close()


def assemble(
    config: RunConfig,
    student: TinyOnnForCausalLM,
    teacher: PreTrainedModel,
    world: World = ALONE,
) -> Training:
    """Set up the program of a step: checkpointing, sharding, compilation, chunks, the optimizer.

    Args:
        config: The settings.
        student: A converted model, changed in place.
        teacher: The dense model, changed in place if its layers are compiled or cut.
        world: The processes of the run, which agree on the chunks.

    Raises:
        UserError: The backbone cannot recompute its layers or has no norms to train, an optimizer
            is not installed, or the teacher's cache is not whole.
    """
    if config.optim.norm_lr:
        own_norms(student)
    checkpoint_layers(student, config.train.checkpointing)
    if config.train.shard == "full":
        check_blocks(config.optim, sizes_of(student), world.size)
        # A share keeps its format, so that the experts get theirs before.
        cast_experts(student, config.optim)
        shard_fully(student, teacher, world)
    if config.train.compile:
        compile_backbones(student, teacher)
    chunk_tokens = world.least(loss_chunk_tokens(config.loss, head_of(student).weight))
    config = replace(config, loss=replace(config.loss, chunk_tokens=chunk_tokens))
    return Training(
        student=student,
        teacher=teacher,
        optimizer=build_optimizer(
            student, config.optim, seed=config.train.seed, world=world, shard=config.train.shard
        ),
        config=config,
        passes=RowGraphs(student, teacher),
        cache=open_cache(config),
    )
