"""The loop of a run: prepare, step until the token budget is spent, evaluate and save.

`step.py` holds a step of the global stage, `blockwise.py` one of the blockwise stage.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tiny_onn.config.changes import with_absolute_paths, with_number_format_of
from tiny_onn.config.schema import RunConfig
from tiny_onn.console import say, status
from tiny_onn.conversion.pipeline import Prepared, prepare, prepare_to_resume
from tiny_onn.conversion.sharing import order_of_first
from tiny_onn.data.packing import PackedRow
from tiny_onn.data.rows import calibration_rows, training_rows
from tiny_onn.data.settling import threshold_rows
from tiny_onn.device import prepare_device
from tiny_onn.distill.assembly import Training, assemble
from tiny_onn.distill.blockwise import BlockErrors, block_errors, blockwise_step, teacher_power
from tiny_onn.distill.feed import RowFeed
from tiny_onn.distill.first_steps import FirstSteps
from tiny_onn.distill.run_log import RunLog, RunResult
from tiny_onn.distill.run_state import RunState, restore
from tiny_onn.distill.saving import Saver
from tiny_onn.distill.schedule import lr_factor, set_learning_rates
from tiny_onn.distill.stages import annealed, next_due, run_tokens, stage_named, step_tokens
from tiny_onn.distill.start_checks import check_start, keep_conversion
from tiny_onn.distill.step import StepResult, distill_step
from tiny_onn.evaluation.compare import Evaluation, evaluate_layers
from tiny_onn.parallel import ALONE, World
from tiny_onn.planning.advice import explain_out_of_memory
from tiny_onn.routing.steering import fitted_eval_thresholds
from tiny_onn.runs.checkpoint import hold_students, valid_checkpoints, way_on
from tiny_onn.runs.checkpointer import Checkpointer
from tiny_onn.runs.folder import (
    create_run_folder,
    forgotten_if_refused,
    read_run_config,
    reopen,
    resume_run_folder,
)
from tiny_onn.runs.lock import LOCK_NAME, run_lock
from tiny_onn.runs.shared_folder import check_shared
from tiny_onn.runs.signals import Stopped, StopRequest, stop_on_signal

AfterStep = Callable[[int, float], None]
# A stopped run still evaluates its last step if the evaluation before took no longer.
EVALUATION_PATIENCE_S = 5.0


def run_distill(
    config: RunConfig,
    *,
    out: Path,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    argv: Sequence[str] = (),
    track: Sequence[str] = (),
    prepared: Prepared | None = None,
    title: str = "distill",
    evaluate_first: bool = True,
    after_step: AfterStep = lambda _step, _seconds: None,
    world: World = ALONE,
) -> RunResult:
    """Distill into a run folder as the settings say; Ctrl-C gives up the step in hand and saves.

    Args:
        config: The settings.
        out: The run folder, a new one unless `resume`.
        resume: Whether to continue from the folder's newest checkpoint.
        allow_change: Names of settings that may differ from the run's when it is resumed.
        argv: The command line, which is recorded.
        track: Names of experiment trackers that get the records too, see `runs.trackers`.
        prepared: A teacher and student from the caller; None: they are made from the settings.
        title: The word with which the run's lines begin.
        evaluate_first: Whether to evaluate the untrained student.
        after_step: Called after each step with its number and seconds; an exception ends the run.
        world: The processes of the run, all of which make this call.

    Raises:
        UserError: Settings, text, teacher, folder, disk or memory are unfit, another run uses the
            folder, or too many updates in a row are not finite.
        KeyboardInterrupt: A signal came before the first step, or a second one came.
    """
    if resume:
        # Taking the lock creates the folder, so a missing run is refused first.
        config = with_number_format_of(read_run_config(out), config)
    config = with_absolute_paths(prepare_device(config)[0])
    check_start(config, out, track=track, world=world)
    begun: dict[str, Any] = {"argv": argv, "launch": world.launch}
    with (
        stop_on_signal(world) as stop,
        run_lock(out) if world.first else nullcontext(),
        forgotten_if_refused(out) if world.first and not resume else nullcontext(),
    ):
        if resume and world.first:
            resume_run_folder(out, config, allow_change=allow_change, **begun)
        elif world.first:
            create_run_folder(out, config, **begun)
        check_shared(out / LOCK_NAME, world)
        if prepared is None:
            saved = world.any_true(world.first and resume and hold_students(out / "checkpoints"))
            find_order = order_of_first(world)
            prepared = prepare_to_resume(config) if saved else prepare(config, find_order)
        keep_conversion(out / "conversion.json", prepared, title, world)
        return _train(
            config,
            prepared,
            out=out,
            resume=resume,
            track=track,
            title=title,
            evaluate_first=evaluate_first,
            after_step=after_step,
            stop=stop,
            world=world,
        )


def _train(
    config: RunConfig,
    prepared: Prepared,
    *,
    out: Path,
    resume: bool,
    track: Sequence[str],
    title: str,
    evaluate_first: bool,
    after_step: AfterStep,
    stop: StopRequest,
    world: World,
) -> RunResult:
    """Run the loop of a prepared run; write the student if there is a last evaluation."""
    training = assemble(config, prepared.student, prepared.teacher, world)
    stream = training_rows(config, prepared.tokenizer)
    state, checkpoints = RunState.new(config), out / "checkpoints"
    if resume:
        is_chosen = config.loss.chunk_tokens == 0
        state = restore(training, stream, checkpoints, title, world, chunk_is_chosen=is_chosen)
        if world.first:
            reopen(out, config)
    config = training.config
    span = (state.tokens, run_tokens(state.stage, config))
    with (
        explain_out_of_memory(
            config, training.student, training.teacher.config, partial(way_on, checkpoints)
        ),
        closing(training),
        RunLog(out, config, title, span, state, track, world) as log,
        Checkpointer(checkpoints, config.train.keep_checkpoints, world, stop.tell) as writer,
    ):
        feed = RowFeed(stream, partial(training.next_rows, stream, world))
        saver = Saver(
            training=training,
            feed=feed,
            state=state,
            log=log,
            writer=writer,
            title=title,
            world=world,
            saved_step=state.step or -1,
        )
        run = _Run(
            training=training,
            prepared=prepared,
            feed=feed,
            threshold_rows=threshold_rows(config, prepared.tokenizer, training.student.device),
            state=state,
            first_steps=FirstSteps(training.student, prepared.held_out, config, world),
            log=log,
            saver=saver,
            checkpoints=checkpoints,
            title=title,
            stop=stop,
            world=world,
        )
        after = run.loop(evaluate_first, after_step)
    if after is not None:
        saver.save_results(out, prepared, run.threshold_rows, after)
    # A launcher ends the first process while it writes if another one has ended.
    world.barrier()
    return RunResult(
        prepared=prepared,
        before=state.before,
        after=after,
        tokens=state.tokens,
        seconds=state.seconds,
        interrupted=bool(stop) and (after is None or state.tokens < span[1]),
    )


@dataclass(kw_only=True, slots=True)
class _Run:
    """The loop of a run, with all that it works on and writes to."""

    training: Training
    prepared: Prepared
    feed: RowFeed
    threshold_rows: list[PackedRow]
    state: RunState
    first_steps: FirstSteps
    log: RunLog
    saver: Saver
    checkpoints: Path
    title: str
    stop: StopRequest
    world: World
    eval_seconds: float = math.inf
    """Time that the last evaluation took; unknown before the first one."""

    def loop(self, evaluate_first: bool, after_step: AfterStep) -> Evaluation | None:
        """Step until the token budget is spent or a signal comes, then evaluate and save.

        Returns:
            The last evaluation; None if a stopped run leaves it out.
        """
        state = self.state
        if state.stage.name == "blockwise" and state.blockwise is None:
            state.blockwise = self._first_block_errors()
        if evaluate_first and state.step == 0 and state.before is None:
            state.before = self._evaluate("start")
        self.stop.graceful = True
        self._until_stopped(after_step)
        # Saving begins before the last evaluation, whose record a resumed run writes again.
        self.saver.save()
        after = self._last_evaluation()
        with status(f"{self.title}: saving step {state.step}"):
            self.saver.finish()
        return after

    def _last_evaluation(self) -> Evaluation | None:
        """Evaluate after the last step; return None if a stopped run leaves it out."""
        if not self.state.step:
            return self.state.before
        if self.stop.agreed() and self.world.any_true(self.eval_seconds > EVALUATION_PATIENCE_S):
            why = f"because it may take more than {EVALUATION_PATIENCE_S:g} s"
            say(f"{self.title}: the last evaluation is left out, {why}")
            return None
        try:
            return self._evaluate("end")
        except Stopped:
            return None

    def _until_stopped(self, after_step: AfterStep) -> None:
        """Do all steps, or those that finish before a signal."""
        try:
            self._do_what_is_due()
            self._steps(after_step)
            if self.stop and self.state.step == 0:
                raise Stopped
        except Stopped:
            if self.state.step == 0:
                say(f"{self.title}: no step is finished, there is nothing to save")
                raise

    def _steps(self, after_step: AfterStep) -> None:
        state, config = self.state, self.training.config
        eval_every, save_every = config.train.eval_every_tokens, config.train.save_every_tokens
        next_eval, next_save = (next_due(state.tokens, every) for every in (eval_every, save_every))
        while state.tokens < (end := run_tokens(state.stage, config)) and not self.stop.agreed():
            self.saver.read_on(self.stop)
            self.first_steps.before_step(state)
            started = time.perf_counter()
            rows, result = self._one_step()
            state.seconds += (seconds := time.perf_counter() - started)
            self._record_step(rows, result, seconds)
            if (error := self.first_steps.after_step(state)) is not None:
                self.saver.save_last()
                raise error
            after_step(state.step, seconds)
            if state.stage.name == "blockwise" and state.stage.over(state.tokens):
                state.due = ["switch", "eval"]
            elif state.tokens >= next_eval and state.tokens < end:
                state.due = ["eval"]
            if state.due:
                self._do_what_is_due()
                next_eval = next_due(state.tokens, eval_every)
            is_best = state.best is not None and state.best["step"] == state.step
            # The state after a skipped update may be no better, so the last good checkpoint stays.
            good = state.tokens < end and not state.guard.skipped_in_row
            if good and (is_best or state.tokens >= next_save):
                next_save = next_due(state.tokens, save_every)
                self.saver.save()
            self.saver.warn(self.saver.writer.poll())

    def _do_what_is_due(self) -> None:
        """Do the change of stage and the evaluation that follow a step."""
        while self.state.due:
            if self.state.due[0] == "switch":
                self._begin_global()
            else:
                self._evaluate("eval")
            del self.state.due[0]

    def _one_step(self) -> tuple[list[PackedRow], StepResult]:
        state, training, config = self.state, self.training, self.training.config
        # The rates are those at the step's middle, so that neither the first nor the last is 0.
        progress = state.stage.progress(state.tokens + step_tokens(config) / 2)
        set_learning_rates(training.optimizer, lr_factor(progress, config.optim))
        options: dict[str, Any] = {"step": state.step, "world": self.world, "commit": self._commit}
        banks = training.student.banks()
        with self.stop.breakable(), annealed(banks, config, state.stage, state.tokens):
            rows = self.feed.take()
            inputs = (training.student, training.teacher, training.optimizer, rows, config)
            if state.stage.name == "blockwise":
                assert state.blockwise is not None
                result = blockwise_step(*inputs, power=state.blockwise.power, **options)
            else:
                result = distill_step(*inputs, passes=training.passes, **options)
        state.step += 1
        state.tokens += step_tokens(config)
        self.feed.finish()
        return rows, result

    def _commit(self) -> None:
        """Let no signal break the step any more; a GPU has its work by now, so read on."""
        self.stop.commit()
        state, config = self.state, self.training.config
        if state.tokens + step_tokens(config) < run_tokens(state.stage, config):
            self.feed.read_ahead()

    def _first_block_errors(self) -> BlockErrors:
        """Measure the blockwise stage's unit of errors, and the errors before it."""
        config, student = self.training.config, self.training.student
        rows = calibration_rows(config, self.prepared.tokenizer, student.device)
        power = teacher_power(self.training.teacher, rows)
        return BlockErrors(power=power, error_before=self._block_errors())

    def _block_errors(self) -> list[float]:
        """Measure the held-out error of every layer, record it and show it."""
        training = self.training
        with self.stop.breakable():
            rows = self.prepared.held_out.rows
            errors = block_errors(training.student, training.teacher, rows, self.world)
        self.log.blocks(errors, step=self.state.step, tokens=self.state.tokens)
        return errors

    def _begin_global(self) -> None:
        """Close the blockwise stage and begin the global one with a new optimizer state."""
        state = self.state
        assert state.blockwise is not None
        state.blockwise.error_after = self._block_errors()
        state.stage = stage_named("global", state.tokens, self.training.config)
        # Moments of the blockwise gradients say nothing about the next ones.
        self.training.optimizer.state.clear()
        state.guard.forget()

    def _record_step(self, rows: Sequence[PackedRow], result: StepResult, seconds: float) -> None:
        """Record the step; end the run if too many in a row were skipped."""
        guard, train = self.state.guard, self.training.config.train
        position = {"step": self.state.step, "tokens": self.state.tokens}
        measured = self.log.anomaly(guard, rows, result, **position)
        if measured is None:
            if self.state.step % train.log_every_steps == 0:
                groups = self.training.optimizer.param_groups
                # Gains of norms follow the experts' schedule.
                lr = {g["system"]: g["lr"] for g in groups if g["system"] != "norms"}
                self.log.step(result, **position, lr=[*lr.values()], seconds=seconds)
        elif guard.skipped_in_row >= train.max_skipped_steps:
            self.saver.warn(self.saver.writer.wait())
            intact = valid_checkpoints(self.checkpoints)
            raise guard.error(self.state.step, measured, intact[0].name if intact else None)

    def _evaluate(self, kind: Literal["start", "eval", "end"]) -> Evaluation:
        state, config, student = self.state, self.training.config, self.training.student
        start = time.perf_counter()
        scope, world = config.router.budget_scope, self.world
        fitted = fitted_eval_thresholds(student, self.threshold_rows, scope, world)
        # A stopped run gets here only for a last evaluation that it can wait for.
        with nullcontext() if self.stop else self.stop.breakable(), fitted:
            result, layers = evaluate_layers(student, self.prepared.held_out, config.loss, world)
            self.stop.commit()
        self.eval_seconds = time.perf_counter() - start
        position = {"step": state.step, "tokens": state.tokens}
        self.log.evaluation(kind, result, layers, **position)
        best_kl = state.best["forward_kl"] if state.best else math.inf
        # An undisturbed run has no evaluation where a stopped one ends, so that is never the best.
        extra = kind == "end" and state.tokens < run_tokens(state.stage, config)
        if kind != "start" and not extra and result.forward_kl < best_kl:
            state.best = {**position, "forward_kl": result.forward_kl}
            self.saver.mark_best()
        return result
