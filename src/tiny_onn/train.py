"""The run: prepare, step until the token budget is spent, evaluate, save. `step.py` is one step."""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tiny_onn.activations import checkpoint_layers, loss_chunk_tokens
from tiny_onn.checkpoint import load_checkpoint, save_checkpoint
from tiny_onn.config import RunConfig
from tiny_onn.console import say
from tiny_onn.data import held_out_rows
from tiny_onn.determinism import ask_for_same_bits
from tiny_onn.errors import UserError
from tiny_onn.evaluate import Evaluation, evaluate
from tiny_onn.fusion import compile_backbone
from tiny_onn.modeling import head_of
from tiny_onn.optim import build_optimizer, lr_factor, set_learning_rates
from tiny_onn.packing import PackedRow
from tiny_onn.prepare import Prepared, prepare, training_rows
from tiny_onn.progress import RunProgress, show_conversion, show_evaluation
from tiny_onn.run_folder import (
    METRICS_NAME,
    MetricsWriter,
    create_run_folder,
    resume_run_folder,
    write_json,
)
from tiny_onn.step import StepResult, distill_step
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
    argv: Sequence[str] = (),
    prepared: Prepared | None = None,
    title: str = "distill",
) -> RunResult:
    """Distill as the settings say, into a run folder; Ctrl-C stops after the step and saves.

    Args:
        config: the settings.
        out: the run folder, new unless `resume`.
        resume: go on from the folder's newest checkpoint.
        argv: the command line, recorded.
        prepared: a teacher and student made by the caller; None: made here.
        title: what the progress bar is called.

    Raises:
        UserError: bad settings, text, teacher, folder or disk.
    """
    quiet_transformers()
    if config.train.deterministic:
        ask_for_same_bits(pick_device(config.train.device))
    (resume_run_folder if resume else create_run_folder)(out, config, argv=argv)
    prepared = prepared or prepare(config)
    write_json(out / "conversion.json", asdict(prepared.conversion))
    show_conversion(title, prepared.student, prepared.conversion)
    run = _Run(config, out, prepared, resume, title)
    return run.loop()


class _Run:
    """The loop's state: counters, stream, optimizer, metrics."""

    def __init__(
        self, config: RunConfig, out: Path, prepared: Prepared, resume: bool, title: str
    ) -> None:
        self.config, self.out, self.prepared, self.title = config, out, prepared, title
        self.student, self.teacher = prepared.student, prepared.teacher
        checkpoint_layers(self.student, config.train.checkpointing)
        if config.train.compile:
            compile_backbone(self.student)
            compile_backbone(self.teacher)
        self._set_loss_chunk(loss_chunk_tokens(config.loss, head_of(self.student).weight))
        if config.loss.chunk_tokens == 0 and self.student.device.type == "cuda":
            say(f"{title}: loss.chunk_tokens = {self.config.loss.chunk_tokens}, from free memory")
        self.optimizer = build_optimizer(self.student, config.optim, seed=config.train.seed)
        self.stream = training_rows(config, prepared.tokenizer)
        self.held_out = held_out_rows(
            config.data, prepared.tokenizer, config.data.row_tokens, config.data.eval_tokens
        )
        self.step, self.tokens, self.metrics_offset, self.seconds = 0, 0, 0, 0.0
        self.before: Evaluation | None = None
        if resume:
            self._restore()

    def loop(self) -> RunResult:
        """Steps until the token budget is spent or someone stops the run."""
        train = self.config.train
        with (
            MetricsWriter(self.out / METRICS_NAME, self.metrics_offset) as metrics,
            stop_on_signal() as stop,
            RunProgress(self.title, train.tokens) as progress,
        ):
            self.metrics = metrics
            before = self.before or self._evaluate("start")
            self.before, after = before, before
            next_eval, next_save = (
                self._next(train.eval_every_tokens),
                self._next(train.save_every_tokens),
            )
            while self.tokens < train.tokens and not stop:
                started = time.perf_counter()
                result = self._one_step()
                self.seconds += time.perf_counter() - started
                if self.step % train.log_every_steps == 0:
                    record = self._record(result, time.perf_counter() - started)
                    progress.update(self.tokens, record)
                if self.tokens >= next_eval and self.tokens < train.tokens:
                    after, next_eval = self._evaluate("eval"), self._next(train.eval_every_tokens)
                if self.tokens >= next_save and self.tokens < train.tokens:
                    next_save = self._next(train.save_every_tokens)
                    self._save()
            # Before the last evaluation, whose record a resumed run writes again.
            self._save()
            if self.step:
                after = self._evaluate("end")
        self.student.train(False)
        save_student(self.out / "student", self.prepared)
        summary = {
            "before": before.as_dict(),
            "after": after.as_dict(),
            "tokens": self.tokens,
            "steps": self.step,
            "training_seconds": self.seconds,
            "interrupted": bool(stop),
        }
        write_json(self.out / "summary.json", summary)
        return RunResult(
            prepared=self.prepared,
            held_out=self.held_out,
            before=before,
            after=after,
            tokens=self.tokens,
            seconds=self.seconds,
            interrupted=bool(stop),
        )

    def _one_step(self) -> StepResult:
        rows = [next(self.stream) for _ in range(self.config.train.rows_per_step)]
        step_tokens = sum(row.input_ids.numel() for row in rows)
        # The factor at the step's middle, so that neither the first nor the last step is at rate 0.
        progress = min(1.0, (self.tokens + step_tokens / 2) / self.config.train.tokens)
        set_learning_rates(self.optimizer, lr_factor(progress, self.config.optim))
        result = distill_step(self.student, self.teacher, self.optimizer, rows, self.config)
        self.step += 1
        self._check_finite(result)
        self.tokens += step_tokens
        return result

    def _check_finite(self, result: StepResult) -> None:
        """Stop before anything of a diverged run is saved."""
        measured = {
            "loss": float(result.loss),
            "gradient norm of the experts": float(result.expert_grad_norm),
            "gradient norm of the gates": float(result.gate_grad_norm),
        }
        for name, value in measured.items():
            if not math.isfinite(value):
                raise UserError(
                    f"step {self.step}: the {name} is {value}, expected a finite number; lower "
                    "optim.expert_lr or optim.gate_lr and start a new run with another --out"
                )

    def _record(self, result: StepResult, seconds: float) -> dict[str, Any]:
        step_tokens = self.config.train.rows_per_step * self.config.data.row_tokens
        record: dict[str, Any] = {
            "kind": "step",
            "step": self.step,
            "tokens": self.tokens,
            "loss": result.loss.item(),
            "forward_kl": result.forward_kl.item(),
            "top1_agreement": result.agreement.item(),
            "expert_grad_norm": float(result.expert_grad_norm),
            "gate_grad_norm": float(result.gate_grad_norm),
            "lr": [group["lr"] for group in self.optimizer.param_groups],
            "tokens_per_s": step_tokens / seconds,
            "loss_chunk_tokens": self.config.loss.chunk_tokens,
            "seconds": result.seconds,
            **result.stats.summary(),
        }
        if result.tallies:
            agree, targets, chance, tokens = (
                sum(float(getattr(tally, name)) for tally in result.tallies)
                for name in ("num_agree", "num_targets", "chance", "num_tokens")
            )
            record["smk"] = {
                "agreement": agree / max(1.0, targets),
                "chance": chance / max(1.0, targets),
                "targets": targets / max(1.0, tokens),
                "mean_surprise": sum(float(t.surprise_E.mean()) for t in result.tallies)
                / max(1.0, tokens),
            }
        self.metrics.write(record)
        return record

    def _evaluate(self, kind: str) -> Evaluation:
        result = evaluate(self.student, self.teacher, self.held_out, self.config.loss)
        self.metrics.write(
            {"kind": kind, "step": self.step, "tokens": self.tokens, **result.as_dict()}
        )
        show_evaluation(self.title, self.tokens, result)
        return result

    def _set_loss_chunk(self, chunk_tokens: int) -> None:
        """One number for the whole run, resumptions included, however much memory is free then."""
        self.config = replace(
            self.config, loss=replace(self.config.loss, chunk_tokens=chunk_tokens)
        )

    def _next(self, every: int) -> int | float:
        return (self.tokens // every + 1) * every if every else math.inf

    def _save(self) -> None:
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "metrics_offset": self.metrics.offset,
            "loss_chunk_tokens": self.config.loss.chunk_tokens,
            "stream": self.stream.state_dict(),
            "before": asdict(self.before) if self.before else None,
        }
        save_checkpoint(self.out / "checkpoints", self.step, self.student, self.optimizer, state)

    def _restore(self) -> None:
        state = load_checkpoint(self.out / "checkpoints", self.student, self.optimizer)
        if state is None:
            say(f"{self.out}: no checkpoint yet, starting from the first step")
            return
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.metrics_offset = state["metrics_offset"]
        self._set_loss_chunk(state["loss_chunk_tokens"])
        self.stream.load_state_dict(state["stream"])
        self.before = Evaluation(**state["before"]) if state["before"] else None


def save_student(folder: Path, prepared: Prepared) -> None:
    """Write the student and its tokenizer in Hugging Face's layout.

    Raises:
        UserError: the disk refuses.
    """
    try:
        prepared.student.save_pretrained(folder)
        prepared.tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{folder}: cannot write the student ({reason}), expected free disk and permission; "
            "the last checkpoint is whole, free some space and use --resume"
        ) from error


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """A list that fills on the first Ctrl-C or SIGTERM; a second one interrupts at once."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        say("Stopping after this step; once more to stop at once.")

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
