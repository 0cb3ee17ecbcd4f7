"""The reports of a run while it goes on: its metrics file, its lines and bar, and its health."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tiny_onn.config.schema import RunConfig
from tiny_onn.console import say
from tiny_onn.conversion.pipeline import Prepared
from tiny_onn.data.packing import PackedRow
from tiny_onn.distill.anomalies import Guard, provenance
from tiny_onn.distill.health import HealthWatch
from tiny_onn.distill.progress import RunProgress, show_blocks, show_evaluation
from tiny_onn.distill.records import blocks_record, evaluation_record, step_record
from tiny_onn.distill.run_state import RunState
from tiny_onn.distill.stages import step_tokens
from tiny_onn.distill.step import StepResult
from tiny_onn.parallel import ALONE, World
from tiny_onn.runs.metrics import METRICS_NAME, MetricsWriter, read_metrics
from tiny_onn.runs.records import Evaluation
from tiny_onn.runs.trackers import Trackers


@dataclass(kw_only=True, slots=True)
class RunResult:
    """The outcome of a finished or stopped run."""

    prepared: Prepared
    before: Evaluation | None
    """The evaluation before the first step; None if the run began without one."""
    after: Evaluation | None
    """The evaluation after the last step; None if a stopped run left it out."""
    tokens: int
    """Number of training tokens, those before a resumption included."""
    seconds: float
    """Time in training steps, that before a resumption included."""
    interrupted: bool
    """True if a signal stopped the run before its last step or last evaluation."""


class RunLog(ExitStack):
    """Writes each record, shows it, and lets the health watch see it. A context manager.

    Of several processes the first one alone writes and shows; the others count anomalies too.

    Args:
        out: The run folder.
        config: The settings.
        title: The word with which the run's lines begin.
        span: Numbers of tokens at which the bar begins and ends.
        state: The progress so far, of which it takes the steps, and the number of bytes of an
            existing metrics file to keep.
        track: Names of experiment trackers that get the records too.
        world: The processes of the run.
    """

    def __init__(  # noqa: PLR0917
        self,
        out: Path,
        config: RunConfig,
        title: str,
        span: tuple[int, int],
        state: RunState,
        track: Sequence[str],
        world: World = ALONE,
    ) -> None:
        super().__init__()
        self._config, self._title, self._world = config, title, world
        kept: list[dict[str, Any]] = []
        with ExitStack() as opened:
            if world.first:
                self._trackers = opened.enter_context(Trackers(out, track, config, state.step))
                path, offset = out / METRICS_NAME, state.metrics_offset
                self._metrics = opened.enter_context(closing(MetricsWriter(path, offset)))
                kept = read_metrics(path)
                self._trackers.replay(kept)
            self._health = HealthWatch(config, title, kept)
            done_tokens, total_tokens = span
            self._progress = opened.enter_context(RunProgress(title, total_tokens, done_tokens))
            self.push(opened.pop_all())

    def step(
        self,
        result: StepResult,
        *,
        step: int,
        tokens: int,
        lr: Sequence[float],
        seconds: float,
    ) -> None:
        """Record a finished update and show it on the bar."""
        every = self._config.train.stats_every_steps
        record = step_record(
            result,
            step=step,
            tokens=tokens,
            lr=list(lr),
            tokens_per_s=step_tokens(self._config) / seconds,
            loss_chunk_tokens=self._config.loss.chunk_tokens,
            with_layers=every > 0 and step % every == 0,
        )
        self._write(record)
        self._progress.update(tokens, record)

    def evaluation(
        self,
        kind: Literal["start", "eval", "end"],
        result: Evaluation,
        layers: dict[str, Any],
        *,
        step: int,
        tokens: int,
    ) -> None:
        """Record an evaluation and show it in a line."""
        show_evaluation(self._title, tokens, result, self._config.router)
        self._write(evaluation_record(kind, result, layers, step=step, tokens=tokens))

    def blocks(self, errors: Sequence[float], *, step: int, tokens: int) -> None:
        """Record every layer's held-out error and show it in a line."""
        self._record(blocks_record(list(errors), step=step, tokens=tokens))
        show_blocks(self._title, tokens, errors)

    def anomaly(
        self,
        guard: Guard,
        rows: Sequence[PackedRow],
        result: StepResult,
        *,
        step: int,
        tokens: int,
    ) -> str | None:
        """Record a skipped update, or a loss that jumped, with the documents of its rows.

        Returns:
            The loss and gradient norms of a skipped update, in words; None if it was applied.
        """
        kind, extra = "spike", None
        if result.finite:
            extra = guard.spike(float(result.loss))
        else:
            guard.skip()
            kind, extra = "skipped", {"in_row": guard.skipped_in_row}
        if extra is None:
            return None
        measured = {
            "loss": float(result.loss),
            "expert_grad_norm": float(result.expert_grad_norm),
            "gate_grad_norm": float(result.gate_grad_norm),
        }
        position = {"kind": kind, "step": step, "tokens": tokens}
        documents = provenance(rows, gathered_losses(result.token_losses, rows, self._world))
        self._record({**position, **measured, **extra, "rows": documents})
        if result.finite:
            return None
        measured_text = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
        say(f"step {step}: not finite, skipped ({measured_text}); its documents are in the metrics")
        return measured_text

    def verdict(self) -> dict[str, Any]:
        """Return the verdict on the run's health so far."""
        return self._health.verdict()

    @property
    def offset(self) -> int:
        """Number of bytes of the metrics file so far."""
        return self._metrics.offset

    def sync(self) -> None:
        """Wait until the disk has every record that this process writes.

        Raises:
            UserError: The file system refuses.
        """
        if self._world.first:
            self._metrics.sync()

    def _write(self, record: dict[str, Any]) -> None:
        self._record(record)
        if self._world.first:
            self._trackers.log(record)
        self._health.observe(record)

    def _record(self, record: dict[str, Any]) -> None:
        if self._world.first:
            self._metrics.write(record)


def gathered_losses(
    own: Sequence[Tensor], rows: Sequence[PackedRow], world: World
) -> Sequence[Tensor]:
    """Return the losses of all rows' tokens from those of this process's share of the rows."""
    if world.size == 1:
        return own
    shares, device = iter(own), own[0].device
    everyone = [
        next(shares)
        if number % world.size == world.rank
        else torch.zeros(row.labels.numel(), device=device)
        for number, row in enumerate(rows)
    ]
    world.all_reduce_sum(everyone)
    return everyone
