"""What a run tells while it goes on: its metrics file, its lines and bar, and its health."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tiny_onn.config.schema import RunConfig
from tiny_onn.console import say
from tiny_onn.conversion.pipeline import Prepared
from tiny_onn.data.packing import PackedRow
from tiny_onn.distill.anomalies import Guard, provenance
from tiny_onn.distill.health import HealthWatch
from tiny_onn.distill.progress import RunProgress, show_blocks, show_evaluation
from tiny_onn.distill.records import blocks_record, evaluation_record, step_record
from tiny_onn.distill.stages import step_tokens
from tiny_onn.distill.step import StepResult
from tiny_onn.evaluation.compare import Evaluation
from tiny_onn.runs.metrics import METRICS_NAME, MetricsWriter, read_metrics


@dataclass(kw_only=True, slots=True)
class RunResult:
    """What a finished or stopped run leaves behind."""

    prepared: Prepared
    before: Evaluation | None
    """None where the run began without an evaluation."""
    after: Evaluation | None
    """None where the run was stopped and its last evaluation left out."""
    tokens: int
    seconds: float
    interrupted: bool


class RunLog(ExitStack):
    """Writes each record, shows it, and lets the health watch see it. A context manager.

    Args:
        out: The run folder.
        config: The settings.
        title: What lines begin with.
        span: Tokens at which the bar begins and ends.
        offset: Bytes of the metrics file to keep.
    """

    def __init__(
        self, out: Path, config: RunConfig, title: str, span: tuple[int, int], offset: int
    ) -> None:
        super().__init__()
        self._config, self._title = config, title
        self.metrics = self.enter_context(closing(MetricsWriter(out / METRICS_NAME, offset)))
        self._health = HealthWatch(config, title, read_metrics(out / METRICS_NAME))
        done_tokens, total_tokens = span
        self._progress = self.enter_context(RunProgress(title, total_tokens, done_tokens))

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
        self._keep(record)
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
        self._keep(evaluation_record(kind, result, layers, step=step, tokens=tokens))

    def blocks(self, errors: Sequence[float], *, step: int, tokens: int) -> None:
        """Record every layer's held-out error and show it in a line."""
        self.metrics.write(blocks_record(list(errors), step=step, tokens=tokens))
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
            What a skipped update measured, in words; None if the step was applied.
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
        where = {"kind": kind, "step": step, "tokens": tokens}
        documents = provenance(rows, result.token_losses)
        self.metrics.write({**where, **measured, **extra, "rows": documents})
        if result.finite:
            return None
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
        say(f"step {step}: not finite, skipped ({numbers}); its documents are in the metrics")
        return numbers

    def verdict(self) -> dict[str, Any]:
        """The verdict on the run's health so far."""
        return self._health.verdict()

    def _keep(self, record: dict[str, Any]) -> None:
        self.metrics.write(record)
        self._health.see(record)
