"""The checkpoints of a run: what they hold, and what happens when one cannot be written.

The student and the results at its end are written here too.
"""

from dataclasses import dataclass, field
from pathlib import Path

from tiny_onn.console import say, status
from tiny_onn.conversion.pipeline import Prepared
from tiny_onn.data.packing import PackedRow
from tiny_onn.distill.assembly import Training
from tiny_onn.distill.feed import RowFeed
from tiny_onn.distill.optim import SplitOptimizer, owners_of
from tiny_onn.distill.run_log import RunLog
from tiny_onn.distill.run_state import RunState
from tiny_onn.errors import UserError
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.parallel import World
from tiny_onn.routing.budgets import finish_tables
from tiny_onn.runs.checkpoint import take_snapshot
from tiny_onn.runs.checkpointer import Checkpointer
from tiny_onn.runs.files import write_json
from tiny_onn.runs.folder import SUMMARY_NAME
from tiny_onn.runs.model_card import write_model_card
from tiny_onn.runs.records import Evaluation
from tiny_onn.runs.signals import StopRequest
from tiny_onn.runs.students import save_student


def saving_ranks(
    student: TinyOnnForCausalLM, optimizer: SplitOptimizer, size: int
) -> dict[str, int]:
    """Return the rank of the process that saves each weight and its optimizer's state, by name.

    It is the weight's owner if there is one; other weights are divided by their sizes.

    Args:
        student: The model.
        optimizer: The optimizer of the model's parameters.
        size: The number of processes.
    """
    named = student.trainable()
    ranks = owners_of(list(named.values()), size) | optimizer.owners
    return {name: ranks[parameter] for name, parameter in named.items()}


def units_by_name(
    student: TinyOnnForCausalLM, optimizer: SplitOptimizer
) -> dict[str, float | list[float]]:
    """Return the units of weights (`units.py`), which follow from the weights before training."""
    units = ((name, optimizer.units.get(p)) for name, p in student.trainable().items())
    return {name: unit.tolist() for name, unit in units if unit is not None}


@dataclass(kw_only=True, slots=True)
class Saver:
    """The checkpoints of a run, of which every process writes a part."""

    training: Training
    feed: RowFeed
    state: RunState
    log: RunLog
    writer: Checkpointer
    title: str
    world: World
    saved_step: int
    """The step of the last checkpoint that is written or in flight; -1 if there is none."""
    _saved_by: dict[str, int] = field(init=False)
    """The ranks that save the weights; the first process saves the student's other tensors."""

    def __post_init__(self) -> None:
        self.mark_best()
        models = self.training.student, self.training.optimizer
        self._saved_by = saving_ranks(*models, self.world.size)

    def save(self) -> None:
        """Begin to write a checkpoint, unless this step has one; call it in every process."""
        state, training, world = self.state, self.training, self.world
        # Some processes may not know yet that writing failed, and all of them write.
        if not world.any_true(self.saved_step != state.step) or world.any_true(not self._synced()):
            return
        if world.first:
            state.metrics_offset = self.log.offset
        saved = {
            **state.as_dict(),
            "loss_chunk_tokens": training.config.loss.chunk_tokens,
            "stream": self.feed.state_dict(),
        }
        models = training.student, training.optimizer
        saved["units"] = units_by_name(*models)
        is_mine = self._is_mine if world.size > 1 else None
        self.warn(self.writer.save(take_snapshot(state.step, *models, saved, is_mine)))
        self.saved_step = state.step

    def save_last(self) -> None:
        """Write a checkpoint before an error ends the run; call it in every process."""
        self.save()
        self.warn(self.writer.wait())

    def read_on(self, stop: StopRequest) -> None:
        """Read the rows of the next step; if a process cannot, save the steps and end all of them.

        Args:
            stop: A signal may abandon the reading.

        Raises:
            UserError: This process cannot read them, or another one that has told why.
        """
        with stop.breakable():
            self.feed.read_ahead()
        error, world = self.feed.error, self.world
        if not world.any_true(error is not None):
            return
        if self.state.step:
            self.save_last()
        if error is not None:
            raise error
        # The process that cannot read its rows ends without coming here.
        world.barrier()

    def _is_mine(self, name: str) -> bool:
        """Return True if this process saves a tensor of the student and its optimizer's state."""
        return self._saved_by.get(name, 0) == self.world.rank

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

    def save_results(
        self, out: Path, prepared: Prepared, rows: list[PackedRow], after: Evaluation
    ) -> None:
        """Write the student and the summary into the run folder; call it in every process.

        Args:
            out: The run folder.
            prepared: The student and its tokenizer.
            rows: The text on which thresholds are settled.
            after: The last evaluation.
        """
        student, config, state = self.training.student, self.training.config, self.state
        student.train(False)
        with status(f"{self.title}: saving the student"):
            finish_tables(student, rows, config.router.budget_scope)
            save_student(out / "student", prepared, self.world)
            if self.world.first:
                summary = state.summary(after, config, out / "checkpoints")
                numbers = {"step": state.step, "summary": summary}
                write_model_card(out / "student", config, out, **numbers)
                # The summary of a finished run says that all is done, so that it is written last.
                write_json(out / SUMMARY_NAME, {**summary, "health": self.log.verdict()})

    def mark_best(self) -> None:
        """Let the writer keep the checkpoint of the best evaluation."""
        self.writer.best = self.state.best["step"] if self.state.best else None
