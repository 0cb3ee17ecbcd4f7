"""The check of a run's first steps: is the student on its way to its teacher, or away from it?

A rate that is too high for a teacher shows within steps, while the losses of different texts
differ too much to tell. The check therefore measures one and the same held-out row before the first
step and after a few.
"""

from dataclasses import dataclass, field

from tiny_onn.config.schema import RunConfig
from tiny_onn.distill.run_state import RunState
from tiny_onn.distill.stages import step_tokens
from tiny_onn.errors import UserError
from tiny_onn.evaluation.compare import compare
from tiny_onn.model.student import TinyOnnForCausalLM, eval_mode
from tiny_onn.parallel import ALONE, World
from tiny_onn.runs.checkpoint import checkpoint_name
from tiny_onn.teacher.held_out import HeldOut

# The row is measured after so many steps of the global stage. Adam's first steps may do harm that
# the next ones repair, and warm-up hides a high rate for a while.
CHECKED_STEPS = (4, 16, 64, 256)
# A run is stopped if the measure is above the start's by this factor, and by so many nats.
LARGEST_RATIO, LEAST_RISE = 1.5, 0.1


@dataclass(slots=True)
class FirstSteps:
    """The measure of a run's first steps.

    Args:
        student: The model that learns.
        held_out: The held-out rows, of which the first one is read.
        config: The run's settings.
        world: The processes, to which one of them tells the measure.
    """

    student: TinyOnnForCausalLM
    held_out: HeldOut
    config: RunConfig
    world: World = ALONE
    _first_row: HeldOut = field(init=False)

    def __post_init__(self) -> None:
        self._first_row = HeldOut(self.held_out.teacher, self.held_out.rows[:1])

    def before_step(self, state: RunState) -> None:
        """Measure the start once: before the global stage's first step, or where a resume asks."""
        steps = self._steps(state)
        if state.first_kl is None and steps is not None and steps < CHECKED_STEPS[-1]:
            state.first_kl = self._measure()

    def after_step(self, state: RunState) -> UserError | None:
        """Return the error that ends the run, if it is time to check and the student is worse."""
        if state.first_kl is None or self._steps(state) not in CHECKED_STEPS:
            return None
        limit = max(LARGEST_RATIO * state.first_kl, state.first_kl + LEAST_RISE)
        if (loss := self._measure()) <= limit:
            return None
        name = "loss above the teacher's" if self.config.loss.label_coef else "KL"
        unit = (
            ""
            if self.config.optim.lr_scale == "rms"
            else ' or set optim.lr_scale = "rms" with rates near 0.002,'
        )
        return UserError(
            f"step {state.step}: got a {name} of {loss:.3f} nats on a held-out row, expected less"
            f" than {limit:.3f} after {state.first_kl:.3f} at the start; the steps harm the"
            " student, so start again with another --out and lower optim.expert_lr and"
            f" optim.gate_lr,{unit} or go on from {checkpoint_name(state.step)} with --resume --set"
            " train.stop_if_worse=false --allow-change train.stop_if_worse"
        )

    def _steps(self, state: RunState) -> int | None:
        """Return the number of steps of the global stage; None if there is nothing to check."""
        if not self.config.train.stop_if_worse or state.stage.name != "global":
            return None
        return (state.tokens - state.stage.begin) // step_tokens(self.config)

    def _measure(self) -> float:
        """Return the KL, mixed with the cross-entropy above the teacher's as in the run's loss."""
        with eval_mode(self.student):
            found = compare(self.student, self._first_row, self.config.loss, world=self.world)
        share = self.config.loss.label_coef
        return (1 - share) * found.forward_kl + share * (found.nll - found.reference_nll)
