"""The run: prepare, step until the token budget is spent, evaluate, save. `step.py` is one step."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tiny_onn.activations import checkpoint_layers, loss_chunk_tokens
from tiny_onn.blockwise import Blocks, block_errors, blockwise_step, teacher_power
from tiny_onn.budgets import tabulate
from tiny_onn.checkpoint import (
    Checkpointer,
    checkpoint_name,
    load_checkpoint,
    take_snapshot,
    valid_checkpoints,
)
from tiny_onn.config import RunConfig
from tiny_onn.console import say
from tiny_onn.data import held_out_rows
from tiny_onn.determinism import ask_for_same_bits
from tiny_onn.errors import UserError
from tiny_onn.evaluate import Evaluation, evaluate_layers
from tiny_onn.fusion import compile_backbones
from tiny_onn.guard import Guard, provenance
from tiny_onn.health import HealthWatch
from tiny_onn.lock import run_lock
from tiny_onn.memory_advice import explain_out_of_memory
from tiny_onn.modeling import head_of
from tiny_onn.optim import build_optimizer, lr_factor, set_learning_rates
from tiny_onn.packing import PackedRow
from tiny_onn.prepare import (
    Prepared,
    calibration_rows,
    prepare,
    save_student,
    settling_rows,
    training_rows,
)
from tiny_onn.progress import RunProgress, show_blocks, show_conversion, show_evaluation
from tiny_onn.records import blocks_record, evaluation_record, step_record
from tiny_onn.resuming import with_absolute_paths
from tiny_onn.run_folder import (
    METRICS_NAME,
    MetricsWriter,
    create_run_folder,
    keep_settings,
    read_metrics,
    read_run_config,
    record_conversion,
    resume_run_folder,
    write_json,
)
from tiny_onn.stages import annealed, run_tokens, stage_named, step_tokens
from tiny_onn.steering import settle
from tiny_onn.step import StepResult, distill_step
from tiny_onn.stopping import StopRequest, stop_on_signal
from tiny_onn.teacher import pick_device, quiet_transformers


@dataclass(kw_only=True, slots=True)
class RunResult:
    """What a finished or stopped run leaves behind."""

    prepared: Prepared
    held_out: list[PackedRow]
    before: Evaluation
    after: Evaluation
    tokens: int
    seconds: float
    interrupted: bool


def run_distill(
    config: RunConfig,
    *,
    out: Path,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    argv: Sequence[str] = (),
    prepared: Prepared | None = None,
    title: str = "distill",
) -> RunResult:
    """Distill as the settings say, into a run folder; Ctrl-C stops after the step and saves.

    Args:
        config: the settings.
        out: the run folder, new unless `resume`.
        resume: go on from the folder's newest checkpoint.
        allow_change: settings that may differ from the run's when it goes on.
        argv: the command line, recorded.
        prepared: a teacher and student made by the caller; None: made here.
        title: what the progress bar is called.

    Raises:
        UserError: bad settings, text, teacher, folder, disk or memory; another run in the folder;
            or updates that are not finite.
        KeyboardInterrupt: a signal before the first step, or a second one.
    """
    quiet_transformers()
    if config.train.deterministic:
        ask_for_same_bits(pick_device(config.train.device))
    config = with_absolute_paths(config)
    if resume:
        # Before a lock would make the folder.
        read_run_config(out)
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
        return run.loop()


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
        self.config, self.out, self.prepared, self.title = config, out, prepared, title
        self.stop, self.checkpoints, self.guard = stop, out / "checkpoints", Guard()
        self.student, self.teacher = prepared.student, prepared.teacher
        checkpoint_layers(self.student, config.train.checkpointing)
        if config.train.compile:
            compile_backbones(self.student, self.teacher)
        self._set_loss_chunk(loss_chunk_tokens(config.loss, head_of(self.student).weight))
        if config.loss.chunk_tokens == 0 and self.student.device.type == "cuda":
            say(f"{title}: loss.chunk_tokens = {self.config.loss.chunk_tokens}, from free memory")
        self.optimizer = build_optimizer(self.student, config.optim, seed=config.train.seed)
        self.stream = training_rows(config, prepared.tokenizer)
        self.held_out = held_out_rows(
            config.data, prepared.tokenizer, config.data.row_tokens, config.data.eval_tokens
        )
        self.settling_rows = settling_rows(config, prepared.tokenizer, self.student.device)
        self.step, self.tokens, self.metrics_offset, self.seconds = 0, 0, 0, 0.0
        first = "blockwise" if config.train.blockwise_tokens else "global"
        self.stage = stage_named(first, 0, config)
        self.before: Evaluation | None = None
        self.blocks: Blocks | None = None
        self.best: dict[str, Any] | None = None
        self.saved_step = -1
        if resume:
            self._restore(chosen_chunk=config.loss.chunk_tokens == 0)

    def loop(self) -> RunResult:
        """Steps until the token budget is spent or someone stops the run."""
        self.stop.graceful = True
        teacher = self.teacher.config
        with (
            explain_out_of_memory(self.config, self.student, teacher, self.checkpoints),
            MetricsWriter(self.out / METRICS_NAME, self.metrics_offset) as self.metrics,
            RunProgress(
                self.title, run_tokens(self.stage, self.config), self.tokens
            ) as self.progress,
            Checkpointer(self.checkpoints, self.config.train.keep_checkpoints) as self.writer,
        ):
            self.writer.best = self.best["step"] if self.best else None
            self.health = HealthWatch(
                self.config, self.title, read_metrics(self.out / METRICS_NAME)
            )
            if self.stage.name == "blockwise" and self.blocks is None:
                self.blocks = self._first_blocks()
            before = self.before or self._evaluate("start")
            self.before = before
            after = self._steps() or before
            # Before the last evaluation, whose record a resumed run writes again.
            self._save()
            if self.step:
                after = self._evaluate("end")
            if (error := self.writer.wait()) is not None:
                raise UserError(error)
            self.writer.tidy()
        self.student.train(False)
        tabulate(self.student, self.settling_rows, self.config.router.budget_scope)
        save_student(self.out / "student", self.prepared)
        write_json(self.out / "summary.json", self._summary(before, after))
        return RunResult(
            prepared=self.prepared,
            held_out=self.held_out,
            before=before,
            after=after,
            tokens=self.tokens,
            seconds=self.seconds,
            interrupted=bool(self.stop),
        )

    def _steps(self) -> Evaluation | None:
        """The training itself; the last evaluation, if there was one."""
        train, after = self.config.train, None
        next_eval, next_save = (
            self._next(train.eval_every_tokens),
            self._next(train.save_every_tokens),
        )
        while self.tokens < (end := run_tokens(self.stage, self.config)) and not self.stop:
            started = time.perf_counter()
            rows, result = self._one_step()
            self.seconds += time.perf_counter() - started
            self._watch(rows, result)
            if self.step % train.log_every_steps == 0 and result.finite:
                record = self._record(result, time.perf_counter() - started)
                self.progress.update(self.tokens, record)
            is_best, switch = False, self.stage.name == "blockwise" and self.stage.over(self.tokens)
            if switch:
                self._begin_global()
            if (self.tokens >= next_eval or switch) and self.tokens < end:
                after, next_eval = self._evaluate("eval"), self._next(train.eval_every_tokens)
                is_best = self.writer.best == self.step
            due = is_best or self.tokens >= next_save
            # What follows a skipped update may be no better: the last good checkpoint stays.
            if due and self.tokens < end and not self.guard.skipped_in_row:
                next_save = self._next(train.save_every_tokens)
                self._save()
            self._warn(self.writer.poll())
        return after

    def _one_step(self) -> tuple[list[PackedRow], StepResult]:
        rows = [next(self.stream) for _ in range(self.config.train.rows_per_step)]
        # The factor at the step's middle, so that neither the first nor the last step is at rate 0.
        progress = self.stage.progress(self.tokens + step_tokens(self.config) / 2)
        set_learning_rates(self.optimizer, lr_factor(progress, self.config.optim))
        inputs = (self.student, self.teacher, self.optimizer, rows, self.config)
        with annealed(self.student.banks(), self.config, self.stage, self.tokens):
            if self.stage.name == "blockwise":
                assert self.blocks is not None
                result = blockwise_step(*inputs, self.blocks.power, step=self.step)
            else:
                result = distill_step(*inputs, step=self.step)
        self.step += 1
        self.tokens += step_tokens(self.config)
        return rows, result

    def _first_blocks(self) -> Blocks:
        """What the blockwise stage starts from."""
        rows = calibration_rows(self.config, self.prepared.tokenizer, self.student.device)
        power = teacher_power(self.teacher, rows)
        return Blocks(power=power, error_before=self._block_errors())

    def _block_errors(self) -> list[float]:
        """Held-out error of every layer, recorded and shown."""
        errors = block_errors(self.student, self.teacher, self.held_out)
        self.metrics.write(blocks_record(errors, step=self.step, tokens=self.tokens))
        show_blocks(self.title, self.tokens, errors)
        return errors

    def _begin_global(self) -> None:
        """Close the blockwise stage; moments of its gradients say nothing about the next ones."""
        assert self.blocks is not None
        self.blocks.error_after = self._block_errors()
        self.stage = stage_named("global", self.tokens, self.config)
        self.optimizer.state.clear()
        self.guard.forget()

    def _watch(self, rows: Sequence[PackedRow], result: StepResult) -> None:
        """Record an update that was skipped, or a loss that jumped, with the batch's documents."""
        if result.finite:
            kind, extra = "spike", self.guard.spike(float(result.loss))
        else:
            self.guard.skip()
            kind, extra = "skipped", {"in_row": self.guard.skipped_in_row}
        if extra is None:
            return
        measured = {
            "loss": float(result.loss),
            "expert_grad_norm": float(result.expert_grad_norm),
            "gate_grad_norm": float(result.gate_grad_norm),
        }
        where = {"kind": kind, "step": self.step, "tokens": self.tokens}
        documents = provenance(rows, result.token_losses)
        self.metrics.write({**where, **measured, **extra, "rows": documents})
        if result.finite:
            return
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
        say(f"step {self.step}: not finite, skipped ({numbers}); its documents are in the metrics")
        if self.guard.skipped_in_row >= self.config.train.max_skipped_steps:
            self._warn(self.writer.wait())
            whole = valid_checkpoints(self.checkpoints)
            raise self.guard.refusal(self.step, numbers, whole[0].name if whole else None)

    def _record(self, result: StepResult, seconds: float) -> dict[str, Any]:
        every = self.config.train.stats_every_steps
        record = step_record(
            result,
            step=self.step,
            tokens=self.tokens,
            lr=[group["lr"] for group in self.optimizer.param_groups],
            tokens_per_s=step_tokens(self.config) / seconds,
            loss_chunk_tokens=self.config.loss.chunk_tokens,
            with_layers=every > 0 and self.step % every == 0,
        )
        self.metrics.write(record)
        self.health.see(record)
        return record

    def _evaluate(self, kind: Literal["start", "eval", "end"]) -> Evaluation:
        settle(self.student, self.settling_rows, self.config.router.budget_scope)
        result, layers = evaluate_layers(
            self.student, self.teacher, self.held_out, self.config.loss
        )
        show_evaluation(self.title, self.tokens, result)
        record = evaluation_record(kind, result, layers, step=self.step, tokens=self.tokens)
        self.metrics.write(record)
        self.health.see(record)
        best = self.best["forward_kl"] if self.best else math.inf
        if kind != "start" and result.forward_kl < best:
            self.best = {"step": self.step, "tokens": self.tokens, "forward_kl": result.forward_kl}
            self.writer.best = self.step
        return result

    def _summary(self, before: Evaluation, after: Evaluation) -> dict[str, Any]:
        best = self.best
        if best is not None:
            path = self.checkpoints / checkpoint_name(best["step"])
            kept = path in valid_checkpoints(self.checkpoints)
            best = {**best, "checkpoint": str(path.relative_to(self.out)) if kept else None}
        return {
            "before": before.as_dict(),
            "after": after.as_dict(),
            "best": best,
            "blockwise": asdict(self.blocks) if self.blocks else None,
            "tokens": self.tokens,
            "steps": self.step,
            "skipped_steps": self.guard.skipped,
            "training_seconds": self.seconds,
            "interrupted": bool(self.stop),
            "health": self.health.verdict(),
        }

    def _set_loss_chunk(self, chunk_tokens: int) -> None:
        """One number for the whole run, resumptions included, however much memory is free then."""
        self.config = replace(
            self.config, loss=replace(self.config.loss, chunk_tokens=chunk_tokens)
        )

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
            "metrics_offset": self.metrics.offset,
            "loss_chunk_tokens": self.config.loss.chunk_tokens,
            "stream": self.stream.state_dict(),
            "guard": self.guard.state_dict(),
            "before": asdict(self.before) if self.before else None,
            "blocks": asdict(self.blocks) if self.blocks else None,
            "best": self.best,
        }
        try:
            # The checkpoint counts on them.
            self.metrics.sync()
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
            self._set_loss_chunk(state["loss_chunk_tokens"])
        self.guard.load_state_dict(state["guard"])
        self.best, self.saved_step = state["best"], self.step
        self.stream.load_state_dict(state["stream"])
        self.stage = stage_named(**state["stage"], config=self.config)
        self.before = Evaluation(**state["before"]) if state["before"] else None
        self.blocks = Blocks(**state["blocks"]) if state["blocks"] else None
        say(f"{self.title}: going on after step {self.step:,}, {self.tokens:,} tokens")
