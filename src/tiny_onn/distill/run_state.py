"""The progress of a run: the counters and results that a checkpoint stores beside the tensors."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from tiny_onn.config.schema import RunConfig
from tiny_onn.console import say
from tiny_onn.data.stream import TokenStream
from tiny_onn.distill.anomalies import Guard
from tiny_onn.distill.assembly import Training
from tiny_onn.distill.blockwise import BlockErrors
from tiny_onn.distill.stages import Stage, run_tokens, stage_named
from tiny_onn.evaluation.evaluate import budget_report
from tiny_onn.parallel import ALONE, World
from tiny_onn.runs.checkpoint import checkpoint_name, load_checkpoint, valid_checkpoints
from tiny_onn.runs.records import Evaluation


@dataclass(kw_only=True, slots=True)
class RunState:
    """The progress of a run after its last finished step."""

    stage: Stage
    step: int = 0
    """Number of updates so far."""
    tokens: int = 0
    """Number of training tokens so far."""
    seconds: float = 0.0
    """Time in training steps so far."""
    metrics_offset: int = 0
    """Number of bytes of the metrics file at the last checkpoint."""
    due: list[Literal["switch", "eval"]] = field(default_factory=list)
    """The change of stage and the evaluation that follow the last step and are not done yet."""
    guard: Guard = field(default_factory=Guard)
    before: Evaluation | None = None
    """The evaluation before the first step; None if there was none."""
    blockwise: BlockErrors | None = None
    """The errors of the blockwise stage; None if the run has no such stage."""
    best: dict[str, Any] | None = None
    """Step, tokens and KL of the best evaluation; None before the first one."""
    first_kl: float | None = None
    """The KL before the global stage that its first steps are compared with; None: they are not."""

    @staticmethod
    def new(config: RunConfig) -> "RunState":
        """Return the state before the first step."""
        first = "blockwise" if config.train.blockwise_tokens else "global"
        return RunState(stage=stage_named(first, 0, config))

    @staticmethod
    def from_dict(saved: dict[str, Any], config: RunConfig) -> "RunState":
        """Return the state that `as_dict` gave, of a run with these settings."""
        state = RunState(
            stage=stage_named(**saved["stage"], config=config),
            step=saved["step"],
            tokens=saved["tokens"],
            seconds=saved["seconds"],
            metrics_offset=saved["metrics_offset"],
            # Checkpoints of earlier versions were only written where nothing was due.
            due=saved.get("due", []),
            before=Evaluation(**saved["before"]) if saved["before"] else None,
            blockwise=BlockErrors(**saved["blocks"]) if saved["blocks"] else None,
            best=saved["best"],
            first_kl=saved.get("first_kl"),
        )
        state.guard.load_state_dict(saved["guard"])
        return state

    def as_dict(self) -> dict[str, Any]:
        """Return the state as JSON values for a checkpoint."""
        return {
            "stage": {"name": self.stage.name, "begin": self.stage.begin},
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "metrics_offset": self.metrics_offset,
            "due": self.due,
            "guard": self.guard.state_dict(),
            "before": asdict(self.before) if self.before else None,
            "blocks": asdict(self.blockwise) if self.blockwise else None,
            "best": self.best,
            "first_kl": self.first_kl,
        }

    def summary(self, after: Evaluation, config: RunConfig, checkpoints: Path) -> dict[str, Any]:
        """Return the results of a run as JSON values, for its `summary.json`.

        Args:
            after: The last evaluation.
            config: The settings.
            checkpoints: The folder of checkpoints, in the run folder.
        """
        best = self.best
        if best is not None:
            path = checkpoints / checkpoint_name(best["step"])
            exists = path in valid_checkpoints(checkpoints)
            name = str(path.relative_to(checkpoints.parent)) if exists else None
            best = {**best, "checkpoint": name}
        return {
            "before": self.before.as_dict() if self.before else None,
            "after": after.as_dict(),
            "budget": budget_report(after.mean_k, config.router),
            "best": best,
            "blockwise": asdict(self.blockwise) if self.blockwise else None,
            "tokens": self.tokens,
            "steps": self.step,
            "skipped_steps": self.guard.skipped,
            "training_seconds": self.seconds,
            "interrupted": self.tokens < run_tokens(self.stage, config),
        }


def restore(
    training: Training,
    stream: TokenStream,
    checkpoints: Path,
    title: str,
    world: World = ALONE,
    *,
    chunk_is_chosen: bool,
) -> RunState:
    """Restore student, optimizer and text from the newest checkpoint, if there is one.

    Args:
        training: The program of a step; its chunk of the loss may change too.
        stream: The training text.
        checkpoints: The folder of checkpoints.
        title: The word with which the run's lines begin.
        world: The processes of the run.
        chunk_is_chosen: Whether `loss.chunk_tokens` was sized by the memory that is free now.

    Returns:
        The progress at the checkpoint, or of a new run.

    Raises:
        UserError: No checkpoint is intact, or the teacher's cache is too short for the rest.
    """
    optimizer = training.optimizer
    saved = load_checkpoint(
        checkpoints, training.student, optimizer, is_mine=optimizer.is_mine, world=world
    )
    if saved is None:
        say(f"{checkpoints.parent}: no checkpoint yet, starting from the first step")
        return RunState.new(training.config)
    if chunk_is_chosen:
        # All steps of a run use one number, however much memory is free at a resumption.
        loss = replace(training.config.loss, chunk_tokens=saved["loss_chunk_tokens"])
        training.config = replace(training.config, loss=loss)
    named = training.student.trainable()
    for name, unit in saved.get("units", {}).items():
        # Weights that were not stepped yet have none in their optimizer's state.
        optimizer.units[named[name]] = torch.tensor(unit, device=named[name].device)
    stream.load_state_dict(saved["stream"])
    state = RunState.from_dict(saved, training.config)
    if training.cache is not None:
        # Its rows of a step may be others than before.
        training.cache.check_run(training.config, state.tokens // training.config.data.row_tokens)
    say(f"{title}: going on after step {state.step:,}, {state.tokens:,} tokens")
    return state
