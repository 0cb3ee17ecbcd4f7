"""The run: prepare, step until the token budget is spent, evaluate, save. `step.py` is one step."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tiny_onn.config.changes import with_absolute_paths, with_number_format_of
from tiny_onn.config.schema import RunConfig
from tiny_onn.console import say, status
from tiny_onn.conversion.pipeline import Prepared, prepare
from tiny_onn.data.packing import PackedRow
from tiny_onn.data.rows import calibration_rows, threshold_rows, training_rows
from tiny_onn.device import prepare_device
from tiny_onn.distill.anomalies import Guard
from tiny_onn.distill.assembly import assemble
from tiny_onn.distill.blockwise import BlockErrors, block_errors, blockwise_step, teacher_power
from tiny_onn.distill.optim import lr_factor, set_learning_rates
from tiny_onn.distill.progress import show_conversion
from tiny_onn.distill.run_log import RunLog, RunResult
from tiny_onn.distill.stages import annealed, run_tokens, stage_named, step_tokens
from tiny_onn.distill.step import StepResult, distill_step
from tiny_onn.errors import UserError
from tiny_onn.evaluation.compare import Evaluation, evaluate_layers
from tiny_onn.evaluation.evaluate import budget_report
from tiny_onn.planning.advice import explain_out_of_memory
from tiny_onn.routing.budgets import fill_threshold_tables
from tiny_onn.routing.steering import fitted_eval_thresholds
from tiny_onn.runs.checkpoint import (
    Checkpointer,
    checkpoint_name,
    load_checkpoint,
    take_snapshot,
    valid_checkpoints,
    way_on,
)
from tiny_onn.runs.files import write_json
from tiny_onn.runs.folder import (
    create_run_folder,
    keep_settings,
    read_run_config,
    record_conversion,
    resume_run_folder,
)
from tiny_onn.runs.lock import run_lock
from tiny_onn.runs.signals import Stopped, StopRequest, stop_on_signal
from tiny_onn.runs.students import save_student

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
    prepared: Prepared | None = None,
    title: str = "distill",
    evaluate_first: bool = True,
    after_step: AfterStep = lambda _step, _seconds: None,
) -> RunResult:
    """Distill as the settings say, into a run folder; Ctrl-C gives up the step in hand and saves.

    Args:
        config: the settings.
        out: the run folder, new unless `resume`.
        resume: go on from the folder's newest checkpoint.
        allow_change: settings that may differ from the run's when it goes on.
        argv: the command line, recorded.
        prepared: a teacher and student made by the caller; None: made here.
        title: what the progress bar is called.
        evaluate_first: whether to evaluate the untrained student.
        after_step: called after each step with its number and seconds; what it raises ends the run.

    Raises:
        UserError: bad settings, text, teacher, folder, disk or memory; another run in the folder;
            or updates that are not finite.
        KeyboardInterrupt: a signal before the first step, or a second one.
    """
    if resume:
        # A missing run is refused here, because taking the lock makes the folder.
        config = with_number_format_of(read_run_config(out), config)
    config = with_absolute_paths(prepare_device(config)[0])
    with stop_on_signal() as stop, run_lock(out):
        if resume:
            resume_run_folder(out, config, argv=argv, allow_change=allow_change)
        else:
            create_run_folder(out, config, argv=argv)
        prepared = prepared or prepare(config)
        record_conversion(out / "conversion.json", asdict(prepared.conversion))
        show_conversion(title, prepared.student, prepared.conversion)
        run = _Run(config, out, prepared, resume=resume, title=title, stop=stop)
        if resume:
            keep_settings(out, config)
        return run.loop(evaluate_first, after_step)


class _Run:
    """The loop's state: counters, stream, optimizer, metrics."""

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        prepared: Prepared,
        *,
        resume: bool,
        title: str,
        stop: StopRequest,
    ) -> None:
        self.out, self.prepared, self.title = out, prepared, title
        self.stop, self.checkpoints, self.guard = stop, out / "checkpoints", Guard()
        self.student, self.teacher = prepared.student, prepared.teacher
        self.held_out = prepared.held_out
        training = assemble(config, self.student, self.teacher)
        self.config, self.optimizer = training.config, training.optimizer
        self.stream = training_rows(config, prepared.tokenizer)
        self.threshold_rows = threshold_rows(config, prepared.tokenizer, self.student.device)
        self.step, self.tokens, self.metrics_offset, self.seconds = 0, 0, 0, 0.0
        first = "blockwise" if config.train.blockwise_tokens else "global"
        self.stage = stage_named(first, 0, config)
        self.before: Evaluation | None = None
        self.blocks: BlockErrors | None = None
        self.best: dict[str, Any] | None = None
        # What is due after the last step and not done yet, in order.
        self.due: list[Literal["switch", "eval"]] = []
        # The text's state before the step in hand; None outside of steps.
        self.position: dict[str, Any] | None = None
        # How long the last evaluation took; unknown before the first one.
        self.saved_step, self.eval_seconds = -1, math.inf
        if resume:
            self._restore(chosen_chunk=config.loss.chunk_tokens == 0)

    def loop(self, evaluate_first: bool, after_step: AfterStep) -> RunResult:
        """Steps until the token budget is spent or someone stops the run."""
        config, teacher = self.config, self.teacher.config
        span = (self.tokens, run_tokens(self.stage, config))
        with (
            explain_out_of_memory(config, self.student, teacher, partial(way_on, self.checkpoints)),
            RunLog(self.out, config, self.title, span, self.metrics_offset) as self.log,
            Checkpointer(self.checkpoints, config.train.keep_checkpoints) as self.writer,
        ):
            self.writer.best = self.best["step"] if self.best else None
            if self.stage.name == "blockwise" and self.blocks is None:
                self.blocks = self._first_blocks()
            if evaluate_first and self.step == 0 and self.before is None:
                self.before = self._evaluate("start")
            self.stop.graceful = True
            self._until_stopped(after_step)
            # Saving begins before the last evaluation, whose record a resumed run writes again.
            self._save()
            after = self._last_evaluation()
            with status(f"{self.title}: saving step {self.step}"):
                if (error := self.writer.wait()) is not None:
                    raise UserError(error)
                self.writer.tidy()
        if after is not None:
            self._finish(after)
        return RunResult(
            prepared=self.prepared,
            before=self.before,
            after=after,
            tokens=self.tokens,
            seconds=self.seconds,
            interrupted=bool(self.stop) and (after is None or self.tokens < span[1]),
        )

    def _finish(self, after: Evaluation) -> None:
        """Write the student and the summary."""
        self.student.train(False)
        with status(f"{self.title}: saving the student"):
            fill_threshold_tables(
                self.student, self.threshold_rows, self.config.router.budget_scope
            )
            save_student(self.out / "student", self.prepared)
            write_json(self.out / "summary.json", self._summary(after))

    def _last_evaluation(self) -> Evaluation | None:
        """The evaluation of the last step; None where a stopped run leaves it out."""
        if not self.step:
            return self.before
        if self.stop and self.eval_seconds > EVALUATION_PATIENCE_S:
            patience = f"more than {EVALUATION_PATIENCE_S:g} s"
            say(f"{self.title}: the last evaluation is left out, because it may take {patience}")
            return None
        try:
            return self._evaluate("end")
        except Stopped:
            return None

    def _until_stopped(self, after_step: AfterStep) -> None:
        """All steps, or those that finish before a signal."""
        try:
            self._do_what_is_due()
            self._steps(after_step)
            if self.stop and self.step == 0:
                raise Stopped
        except Stopped:
            if self.step == 0:
                say(f"{self.title}: no step is finished, there is nothing to save")
                raise

    def _steps(self, after_step: AfterStep) -> None:
        train = self.config.train
        next_eval, next_save = map(self._next, (train.eval_every_tokens, train.save_every_tokens))
        while self.tokens < (end := run_tokens(self.stage, self.config)) and not self.stop:
            started = time.perf_counter()
            rows, result = self._one_step()
            self.seconds += (seconds := time.perf_counter() - started)
            self._tell(rows, result, seconds)
            after_step(self.step, seconds)
            if self.stage.name == "blockwise" and self.stage.over(self.tokens):
                self.due = ["switch", "eval"]
            elif self.tokens >= next_eval and self.tokens < end:
                self.due = ["eval"]
            if self.due:
                self._do_what_is_due()
                next_eval = self._next(train.eval_every_tokens)
            due = self.writer.best == self.step or self.tokens >= next_save
            # What follows a skipped update may be no better: the last good checkpoint stays.
            if due and self.tokens < end and not self.guard.skipped_in_row:
                next_save = self._next(train.save_every_tokens)
                self._save()
            self._warn(self.writer.poll())

    def _do_what_is_due(self) -> None:
        """The change of stage and the evaluation that follow a step."""
        while self.due:
            if self.due[0] == "switch":
                self._begin_global()
            else:
                self._evaluate("eval")
            del self.due[0]

    def _one_step(self) -> tuple[list[PackedRow], StepResult]:
        self.position = self.stream.state_dict()
        # The factor at the step's middle, so that neither the first nor the last step is at rate 0.
        progress = self.stage.progress(self.tokens + step_tokens(self.config) / 2)
        set_learning_rates(self.optimizer, lr_factor(progress, self.config.optim))
        options: dict[str, Any] = {"step": self.step, "commit": self.stop.commit}
        banks = self.student.banks()
        with self.stop.breakable(), annealed(banks, self.config, self.stage, self.tokens):
            rows = [next(self.stream) for _ in range(self.config.train.rows_per_step)]
            inputs = (self.student, self.teacher, self.optimizer, rows, self.config)
            if self.stage.name == "blockwise":
                assert self.blocks is not None
                result = blockwise_step(*inputs, self.blocks.power, **options)
            else:
                result = distill_step(*inputs, **options)
        self.step += 1
        self.tokens += step_tokens(self.config)
        self.position = None
        return rows, result

    def _first_blocks(self) -> BlockErrors:
        """What the blockwise stage starts from."""
        rows = calibration_rows(self.config, self.prepared.tokenizer, self.student.device)
        power = teacher_power(self.teacher, rows)
        return BlockErrors(power=power, error_before=self._block_errors())

    def _block_errors(self) -> list[float]:
        """Held-out error of every layer, recorded and shown."""
        with self.stop.breakable():
            errors = block_errors(self.student, self.teacher, self.held_out.rows)
        self.log.blocks(errors, step=self.step, tokens=self.tokens)
        return errors

    def _begin_global(self) -> None:
        """Close the blockwise stage; moments of its gradients say nothing about the next ones."""
        assert self.blocks is not None
        self.blocks.error_after = self._block_errors()
        self.stage = stage_named("global", self.tokens, self.config)
        self.optimizer.state.clear()
        self.guard.forget()

    def _tell(self, rows: Sequence[PackedRow], result: StepResult, seconds: float) -> None:
        """Record the step; too many in a row that were skipped end the run."""
        where = {"step": self.step, "tokens": self.tokens}
        numbers = self.log.anomaly(self.guard, rows, result, **where)
        if numbers is None:
            if self.step % self.config.train.log_every_steps == 0:
                lr = [group["lr"] for group in self.optimizer.param_groups]
                self.log.step(result, **where, lr=lr, seconds=seconds)
        elif self.guard.skipped_in_row >= self.config.train.max_skipped_steps:
            self._warn(self.writer.wait())
            whole = valid_checkpoints(self.checkpoints)
            raise self.guard.error(self.step, numbers, whole[0].name if whole else None)

    def _evaluate(self, kind: Literal["start", "eval", "end"]) -> Evaluation:
        start = time.perf_counter()
        # A stopped run comes here only for a last evaluation that it can wait for.
        breakable = nullcontext() if self.stop else self.stop.breakable()
        budget = (self.threshold_rows, self.config.router.budget_scope)
        with breakable, fitted_eval_thresholds(self.student, *budget):
            result, layers = evaluate_layers(self.student, self.held_out, self.config.loss)
            self.stop.commit()
        self.eval_seconds = time.perf_counter() - start
        self.log.evaluation(kind, result, layers, step=self.step, tokens=self.tokens)
        best = self.best["forward_kl"] if self.best else math.inf
        # A stopped run's last evaluation is none of the whole run's, and so never its best.
        extra = kind == "end" and self.tokens < run_tokens(self.stage, self.config)
        if kind != "start" and not extra and result.forward_kl < best:
            self.best = {"step": self.step, "tokens": self.tokens, "forward_kl": result.forward_kl}
            self.writer.best = self.step
        return result

    def _summary(self, after: Evaluation) -> dict[str, Any]:
        best = self.best
        if best is not None:
            path = self.checkpoints / checkpoint_name(best["step"])
            kept = path in valid_checkpoints(self.checkpoints)
            best = {**best, "checkpoint": str(path.relative_to(self.out)) if kept else None}
        return {
            "before": self.before.as_dict() if self.before else None,
            "after": after.as_dict(),
            "budget": budget_report(after.mean_k, self.config.router),
            "best": best,
            "blockwise": asdict(self.blocks) if self.blocks else None,
            "tokens": self.tokens,
            "steps": self.step,
            "skipped_steps": self.guard.skipped,
            "training_seconds": self.seconds,
            "interrupted": self.tokens < run_tokens(self.stage, self.config),
            "health": self.log.verdict(),
        }

    def _next(self, every: int) -> int | float:
        return (self.tokens // every + 1) * every if every else math.inf

    def _save(self) -> None:
        """Begin to write a checkpoint, unless this step's is there already."""
        if self.saved_step == self.step:
            return
        state = {
            "stage": {"name": self.stage.name, "begin": self.stage.begin},
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "metrics_offset": self.log.metrics.offset,
            "loss_chunk_tokens": self.config.loss.chunk_tokens,
            "stream": self.position or self.stream.state_dict(),
            "due": self.due,
            "guard": self.guard.state_dict(),
            "before": asdict(self.before) if self.before else None,
            "blocks": asdict(self.blocks) if self.blocks else None,
            "best": self.best,
        }
        try:
            # The checkpoint counts on them.
            self.log.metrics.sync()
        except UserError as error:
            self._warn(str(error))
            return
        self._warn(self.writer.save(take_snapshot(self.step, self.student, self.optimizer, state)))
        self.saved_step = self.step

    def _warn(self, error: str | None) -> None:
        """Tell of a checkpoint that could not be written; the next interval tries again."""
        if error is not None:
            self.saved_step = -1
            say(f"{self.title}: the run goes on, but {error}")

    def _restore(self, *, chosen_chunk: bool) -> None:
        state = load_checkpoint(self.checkpoints, self.student, self.optimizer)
        if state is None:
            say(f"{self.out}: no checkpoint yet, starting from the first step")
            return
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.metrics_offset = state["metrics_offset"]
        if chosen_chunk:
            # One number for the whole run, however much memory is free at a resumption.
            loss = replace(self.config.loss, chunk_tokens=state["loss_chunk_tokens"])
            self.config = replace(self.config, loss=loss)
        self.guard.load_state_dict(state["guard"])
        self.best, self.saved_step = state["best"], self.step
        self.stream.load_state_dict(state["stream"])
        # Checkpoints of earlier versions were only written where nothing was due.
        self.due = state.get("due", [])
        self.stage = stage_named(**state["stage"], config=self.config)
        self.before = Evaluation(**state["before"]) if state["before"] else None
        self.blocks = BlockErrors(**state["blocks"]) if state["blocks"] else None
        say(f"{self.title}: going on after step {self.step:,}, {self.tokens:,} tokens")
