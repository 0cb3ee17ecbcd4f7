"""The checkpoints of a run: what they hold, and what happens when one cannot be written."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tiny_onn.console import say
from tiny_onn.data.stream import TokenStream
from tiny_onn.distill.assembly import Training
from tiny_onn.distill.run_log import RunLog
from tiny_onn.distill.run_state import RunState
from tiny_onn.errors import UserError
from tiny_onn.parallel import World
from tiny_onn.runs.checkpoint import Checkpointer, optimizer_tensors, take_snapshot


@dataclass(kw_only=True, slots=True)
class Saver:
    """The checkpoints of a run, which the first process writes for all."""

    training: Training
    stream: TokenStream
    state: RunState
    log: RunLog
    writer: Checkpointer
    title: str
    world: World
    saved_step: int
    """The step of the last checkpoint that is written or in flight; -1 if there is none."""
    position: dict[str, Any] | None = None
    """The text's state before the step in hand; None outside of steps."""

    def __post_init__(self) -> None:
        self.mark_best()

    def save(self) -> None:
        """Begin to write a checkpoint, unless this step has one; call it in every process."""
        state, training, world = self.state, self.training, self.world
        # The first process alone knows whether writing failed, and gathering needs all of them.
        if not world.any_true(self.saved_step != state.step) or world.any_true(not self._synced()):
            return
        self.saved_step = state.step
        sharded = training.config.train.shard == "optimizer"
        if not world.first:
            if sharded:
                world.gather(optimizer_tensors(training.student, training.optimizer))
            return
        state.metrics_offset = self.log.offset
        saved = {
            **state.as_dict(),
            "loss_chunk_tokens": training.config.loss.chunk_tokens,
            "stream": self.position or self.stream.state_dict(),
        }
        gather = world.gather if sharded else dict[str, Tensor]
        models = training.student, training.optimizer
        self.warn(self.writer.save(take_snapshot(state.step, *models, saved, gather)))
        self.saved_step = state.step

    def _synced(self) -> bool:
        """Return True once the disk has the metrics up to the offset that a checkpoint stores."""
        try:
            self.log.sync()
        except UserError as error:
            self.warn(str(error))
            return False
        return True

    def warn(self, error: str | None) -> None:
        """Report a checkpoint that could not be written; the next interval tries again."""
        if error is not None:
            self.saved_step = -1
            say(f"{self.title}: the run goes on, but {error}")

    def finish(self) -> None:
        """Wait for the write in flight, and remove checkpoints that are no longer kept.

        Raises:
            UserError: The last checkpoint could not be written.
        """
        if (error := self.writer.wait()) is not None:
            raise UserError(error)
        if self.world.first:
            self.writer.tidy()

    def mark_best(self) -> None:
        """Let the writer keep the checkpoint of the best evaluation."""
        self.writer.best = self.state.best["step"] if self.state.best else None
