"""The lines that a run shows: a live line with its progress, and a line per evaluation."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from tiny_onn.config.schema import RouterConfig
from tiny_onn.console import LINE_SECONDS, console, say
from tiny_onn.conversion.verify import Conversion
from tiny_onn.evaluation.evaluate import shown_k
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.runs.records import Evaluation


class RunProgress(ExitStack):
    """A live line with KL (and the loss if it is another), mean k, tokens/s and the time left.

    Without a terminal the numbers are printed as a line every `LINE_SECONDS`. The object is a
    context manager.

    Args:
        title: The word with which the line begins.
        total_tokens: Number of tokens at which the bar ends.
        done_tokens: Number of tokens at which the bar begins, so that the time left of a resumed
            run is estimated from its own speed.
    """

    def __init__(self, title: str, total_tokens: int, done_tokens: int = 0) -> None:
        super().__init__()
        self._title, self._total, self._last_line = title, total_tokens, time.monotonic()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            # At this width the line of a demo, whose title is the longest, fits 80 columns.
            BarColumn(bar_width=10),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console(),
        )
        self._task = self._progress.add_task(
            title, total=total_tokens, completed=done_tokens, numbers=""
        )
        self.enter_context(self._progress)

    def update(self, tokens: int, record: dict[str, Any]) -> None:
        """Show a step's record, after so many tokens of the run."""
        loss = f"{record['loss']:.3f}"
        if record["kind"] == "blockwise":
            distance = f"block error {loss}"
        else:
            kl = f"{record['forward_kl']:.3f}"
            distance = f"KL {kl}" if loss == kl else f"loss {loss}  KL {kl}"
        numbers = f"{distance}  k {record['mean_k']:.1f}  {record['tokens_per_s']:,.0f} tok/s"
        self._progress.update(self._task, completed=tokens, numbers=numbers)
        now = time.monotonic()
        if not self._progress.console.is_terminal and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            say(f"{self._title}: {tokens:,} of {self._total:,} tokens  {numbers}")


def show_conversion(title: str, student: TinyOnnForCausalLM, conversion: Conversion) -> None:
    """Print a line on the size and exactness of the conversion, and one per massive activation."""
    shape = student.config
    exact = (
        "experts are random"
        if conversion.logit_gap is None
        else f"all experts on, logits are within {conversion.logit_gap:.1e} of the teacher's"
        " (float32)"
    )
    num_shared = shape.routing_rule().num_shared
    always_on = f" ({num_shared} always on)" if num_shared else ""
    say(
        f"{title}: {len(student.banks())} layers x {shape.num_experts} experts{always_on} x "
        f"{shape.moe_intermediate_size} neurons; {exact}; backbone SHA-256 "
        f"{conversion.backbone_sha256[:12]} in both; experts are computed by the "
        f"{conversion.expert_path.path} path (train.expert_path), because "
        f"{conversion.expert_path.reason}"
    )
    for massive in conversion.massive_activations:
        say(
            f"{title}: massive activation: layer {massive.layer}'s MLP writes {massive.value:.0f} "
            f"({massive.ratio:,.0f} times its median) to feature {massive.feature} at "
            f"{'a first' if massive.first_token else 'another'} token; neurons "
            f"{', '.join(map(str, massive.neurons))}"
        )


def show_blocks(title: str, tokens: int, errors: Sequence[float]) -> None:
    """Print a line on the layers' normalised errors."""
    mean = sum(errors) / len(errors)
    say(
        f"{title}: {tokens:,} tokens  held-out block error {mean:.4f} of the output's power "
        f"(layers from {min(errors):.4f} to {max(errors):.4f})"
    )


def show_evaluation(title: str, tokens: int, result: Evaluation, router: RouterConfig) -> None:
    """Print a line on an evaluation; `health.py` says what helps if it misses its budget."""
    say(
        f"{title}: {tokens:,} tokens  held-out KL {result.forward_kl:.4f}  "
        f"agreement {result.top1_agreement:.1%}  perplexity {result.student_perplexity:.2f} "
        f"(teacher {result.teacher_perplexity:.2f})  k / target {shown_k(result.mean_k, router)}"
    )
