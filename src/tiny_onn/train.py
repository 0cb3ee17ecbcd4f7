"""The run: online distillation of a student from its teacher, step by step.

`run_distill` prepares, loops and saves; `distill_step` is one update, top to bottom.
"""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from tiny_onn.attention import packed_kwargs
from tiny_onn.checkpoint import load_checkpoint, save_checkpoint
from tiny_onn.config import RunConfig
from tiny_onn.data import held_out_rows
from tiny_onn.errors import UserError
from tiny_onn.evaluate import Evaluation, evaluate
from tiny_onn.losses import distill
from tiny_onn.modeling import (
    TinyOnnForCausalLM,
    checkpoint_layers,
    head_of,
    last_hidden_states,
)
from tiny_onn.ops.dense_masked import SmkStep, SurpriseTally
from tiny_onn.optim import build_optimizer, clip_gradients, lr_factor, set_learning_rates
from tiny_onn.packing import PackedRow
from tiny_onn.prepare import Prepared, prepare, training_rows
from tiny_onn.progress import RunProgress, show_evaluation
from tiny_onn.router import exact_threshold, load_balancing_loss, z_loss
from tiny_onn.routing_stats import RoutingStats
from tiny_onn.run_folder import (
    METRICS_NAME,
    MetricsWriter,
    create_run_folder,
    resume_run_folder,
    write_json,
)
from tiny_onn.surprise import SmkRule
from tiny_onn.teacher import quiet_transformers


@dataclass(kw_only=True, slots=True)
class StepResult:
    """What one step measured: device tensors, read when a record is written."""

    loss: Tensor
    forward_kl: Tensor
    agreement: Tensor
    expert_grad_norm: Tensor | float
    gate_grad_norm: Tensor | float
    stats: RoutingStats
    tallies: list[SurpriseTally] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class Clock:
    """Wall time of a step's phases; on a GPU only when asked to, since reading it waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the phase."""
        start = time.perf_counter()
        yield
        if not self._cuda:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def distill_step(
    student: TinyOnnForCausalLM,
    teacher: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[PackedRow],
    config: RunConfig,
) -> StepResult:
    """One update from rows whose gradients are summed: the loss is a mean over all their tokens.

    One backward pass a row teaches both systems: experts by the distillation loss, gates by SMK
    (`objective = smk`), by the same loss (`task`), or not at all.
    """
    banks = student.banks()
    device = banks[0].gate_up_proj.device
    loss_tokens = max(1, sum(int(row.loss_mask.sum()) for row in rows))
    router_tokens = max(1, sum(int(row.router_mask.sum()) for row in rows))
    tallies = _teach_gates(student, config, loss_tokens, router_tokens)
    stats = RoutingStats.zeros(banks)
    sums = torch.zeros(3, device=device)
    thresholds = torch.zeros(len(banks), device=device)
    clock = Clock(device)
    student.train()
    for row in (row.to(device) for row in rows):
        kwargs = packed_kwargs(row)
        for bank in banks:
            bank.token_mask = row.router_mask[0]
        with clock.phase("teacher forward"), torch.no_grad():
            teacher_hidden_TD = last_hidden_states(teacher, row.input_ids, **kwargs)[0]
        with clock.phase("student forward"):
            student_hidden_TD = last_hidden_states(student, row.input_ids, **kwargs)[0]
        stats.add(banks, row.router_mask[0])
        if config.router.selection == "budget":
            share = row.router_mask.sum() / router_tokens
            for layer, bank in enumerate(banks):
                assert bank.routing is not None
                thresholds[layer] += share * exact_threshold(
                    bank.routing.scores, row.router_mask[0], config.router.target_k
                )
        mask_T = row.loss_mask[0]
        with clock.phase("loss"):
            values = distill(
                student_hidden_TD,
                teacher_hidden_TD,
                head_of(student),
                head_of(teacher),
                row.labels[0],
                divergence=config.loss.divergence,
                temperature=config.loss.temperature,
                jsd_beta=config.loss.jsd_beta,
                chunk_tokens=config.loss.chunk_tokens,
            )
            loss = (values.loss * mask_T).sum() / loss_tokens
            sums += torch.stack([v[mask_T].sum() for v in (values.loss, values.forward_kl, values.agrees)]).detach()  # fmt: skip
        with clock.phase("backward"):
            (loss + _router_losses(student, row, config) / len(rows)).backward()
    with clock.phase("optimizer"):
        expert_norm, gate_norm = clip_gradients(student, config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if config.router.selection == "budget":
        for bank, threshold in zip(banks, thresholds, strict=True):
            bank.router.steer(threshold, config.router.budget_rate)
    loss, forward_kl, agreement = sums / loss_tokens
    return StepResult(
        loss=loss,
        forward_kl=forward_kl,
        agreement=agreement,
        expert_grad_norm=expert_norm,
        gate_grad_norm=gate_norm,
        stats=stats,
        tallies=tallies,
        seconds=clock.seconds,
    )


def _teach_gates(
    student: TinyOnnForCausalLM, config: RunConfig, loss_tokens: int, router_tokens: int
) -> list[SurpriseTally]:
    """Hand every bank this step's SMK rule and scales, if SMK is the objective."""
    if config.router.objective != "smk":
        return []
    smk = config.smk
    rule = SmkRule(
        surprise=smk.surprise,
        direction=smk.direction,
        candidates=smk.candidates,
        targets=smk.targets,
        num_targets=round(config.router.target_k),
    )
    tallies = []
    for bank in student.banks():
        tally = SurpriseTally.zeros(bank.down_proj.shape[0], bank.down_proj.device)
        bank.smk = SmkStep(
            rule=rule,
            grad_scale=smk.coef / router_tokens,
            loss_scale=float(loss_tokens),
            tally=tally,
        )
        tallies.append(tally)
    return tallies


def _router_losses(
    student: TinyOnnForCausalLM, row: PackedRow, config: RunConfig
) -> Tensor | float:
    """Load-balancing and z losses of a coupled top-k gate; 0 otherwise."""
    router = config.router
    if router.objective != "task" or router.selection != "top_k":
        return 0.0
    logits = [bank.routing.router_logits for bank in student.banks() if bank.routing is not None]
    balance = load_balancing_loss(logits, round(router.target_k), row.router_mask[0])
    penalty = z_loss(logits, row.router_mask[0])
    return router.load_balancing_coef * balance + router.z_loss_coef * penalty


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
    (resume_run_folder if resume else create_run_folder)(out, config, argv=argv)
    prepared = prepared or prepare(config)
    run = _Run(config, out, prepared, resume, title)
    return run.loop()


class _Run:
    """The loop's state: counters, stream, optimizer, metrics."""

    def __init__(
        self, config: RunConfig, out: Path, prepared: Prepared, resume: bool, title: str
    ) -> None:
        self.config, self.out, self.prepared, self.title = config, out, prepared, title
        self.student, self.teacher = prepared.student, prepared.teacher
        if config.train.gradient_checkpointing:
            checkpoint_layers(self.student)
        self.optimizer = build_optimizer(self.student, config.optim)
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
            if self.step:
                after = self._evaluate("end")
            self._save()
        save_student(self.out / "student", self.prepared)
        summary = {"before": before.as_dict(), "after": after.as_dict(), "tokens": self.tokens,
                   "steps": self.step, "training_seconds": self.seconds, "interrupted": bool(stop)}  # fmt: skip
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
        self.tokens += step_tokens
        return result

    def _record(self, result: StepResult, seconds: float) -> dict[str, Any]:
        loss = result.loss.item()
        if not math.isfinite(loss):
            raise UserError(
                f"step {self.step}: the loss is {loss}, expected a finite number; lower "
                "optim.expert_lr or optim.gate_lr and use --resume from the last checkpoint"
            )
        step_tokens = self.config.train.rows_per_step * self.config.data.row_tokens
        record: dict[str, Any] = {
            "kind": "step",
            "step": self.step,
            "tokens": self.tokens,
            "loss": loss,
            "forward_kl": result.forward_kl.item(),
            "top1_agreement": result.agreement.item(),
            "expert_grad_norm": float(result.expert_grad_norm),
            "gate_grad_norm": float(result.gate_grad_norm),
            "lr": [group["lr"] for group in self.optimizer.param_groups],
            "tokens_per_s": step_tokens / seconds,
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

    def _next(self, every: int) -> float:
        return (self.tokens // every + 1) * every if every else math.inf

    def _save(self) -> None:
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "metrics_offset": self.metrics.offset,
            "stream": self.stream.state_dict(),
            "before": asdict(self.before) if self.before else None,
        }
        save_checkpoint(self.out / "checkpoints", self.step, self.student, self.optimizer, state)

    def _restore(self) -> None:
        state = load_checkpoint(self.out / "checkpoints", self.student, self.optimizer)
        if state is None:
            Console(stderr=True).print(
                f"{self.out}: no checkpoint yet, starting from the first step"
            )
            return
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.metrics_offset = state["metrics_offset"]
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
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write the student ({error.strerror or error}), expected free disk and "
            "permission; the last checkpoint is whole, free some space and use --resume"
        ) from error


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """A list that becomes non-empty on the first Ctrl-C or SIGTERM; a second one interrupts at once."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        Console(stderr=True).print("Stopping after this step; once more to stop at once.")

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
