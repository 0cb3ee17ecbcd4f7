"""One update of online distillation, top to bottom: teacher, student, loss, one backward pass."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from transformers import PreTrainedModel

from tiny_onn.activations import loss_chunk_tokens
from tiny_onn.attention import packed_kwargs
from tiny_onn.config import RunConfig
from tiny_onn.coupled_losses import load_balancing_loss, z_loss
from tiny_onn.experts import ExpertBank
from tiny_onn.losses import DistillValues, distill
from tiny_onn.modeling import TinyOnnForCausalLM, head_of, last_hidden_states
from tiny_onn.ops.teaching import SmkStep, SurpriseTally
from tiny_onn.optim import clip_gradients
from tiny_onn.packing import PackedRow
from tiny_onn.routing_stats import RoutingStats
from tiny_onn.shared import routed
from tiny_onn.states import layer_outputs, unexplained
from tiny_onn.steering import Steering, gate_losses
from tiny_onn.surprise import SmkRule


@dataclass(kw_only=True, slots=True)
class StepResult:
    """What one step measured: device tensors, read when a record is written."""

    loss: Tensor
    """In the blockwise stage the mean of `error_L`."""
    forward_kl: Tensor | None = None
    """None in the blockwise stage, as are `agreement` and `student_entropy`."""
    agreement: Tensor | None = None
    student_entropy: Tensor | None = None
    states_error: Tensor | None = None
    """Mean over layers of `states.unexplained`; None where hidden states are not matched."""
    error_L: Tensor | None = None  # noqa: N815 - shape suffix
    """Each layer's normalised error, in the blockwise stage."""
    expert_grad_norm: Tensor | float
    gate_grad_norm: Tensor | float
    stats: RoutingStats
    token_losses: list[Tensor]
    """Per row, every token's loss; 0 where there is no label."""
    finite: bool = True
    """Whether loss and gradients were; otherwise nothing was updated."""
    tallies: list[SurpriseTally] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class Clock:
    """Wall time of a step's phases, which are also named ranges of a profiler's trace.

    On a GPU there is a time only with `wait`: for the GPU, at the end of each phase.
    """

    def __init__(self, device: torch.device, *, wait: bool = False) -> None:
        self._cuda, self._wait = device.type == "cuda", wait
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the phase."""
        start = time.perf_counter()
        with record_function(name):
            yield
            if self._cuda and self._wait:
                torch.cuda.synchronize()
        if self._wait or not self._cuda:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def distill_step(
    student: TinyOnnForCausalLM,
    teacher: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[PackedRow],
    config: RunConfig,
    *,
    step: int = 0,
    clock: Clock | None = None,
    commit: Callable[[], None] = lambda: None,
) -> StepResult:
    """One update from rows whose gradients are summed: the loss is a mean over all their tokens.

    If loss or gradient is not finite, nothing is updated. A GPU is waited for once, to know. An
    exception before the update leaves everything as it was before the step.

    One backward pass a row teaches both systems: experts by the distillation loss, gates by SMK
    (`objective = smk`), by their experts' norms (`regression`), by the same loss (`task`), or not
    at all.

    `step` counts the steps before; what is explored and when experts are re-seeded depends on it.
    `clock` adds up the phases' times; None: one that does not wait for a GPU. `commit` is
    called before the update, from where on the step can no longer be given up.
    """
    banks = student.banks()
    device = banks[0].experts.gate_up_proj.device
    loss_tokens = max(1, sum(int(row.loss_mask.sum()) for row in rows))
    router_tokens = max(1, sum(int(row.router_mask.sum()) for row in rows))
    tallies = teach_gates(banks, config, loss_tokens, router_tokens)
    stats = RoutingStats.zeros(banks)
    sums, token_losses, gaps = torch.zeros(4, device=device), [], []
    steering = Steering(banks, config, router_tokens, step, stats)
    clock = clock or Clock(device)
    loss_options, matched = _loss_options(student, config), config.loss.states_coef > 0
    heads = (head_of(student), head_of(teacher))
    student.train()
    with undone_if_broken(steering, optimizer):
        for row in (row.to(device) for row in rows):
            kwargs = packed_kwargs(row)
            steering.begin_row(row.router_mask[0])
            watched = layer_outputs(teacher, matched)
            with clock.phase("teacher forward"), torch.no_grad(), watched as theirs:
                teacher_hidden_TD = last_hidden_states(teacher, row.input_ids, **kwargs)[0]
            with clock.phase("student forward"), layer_outputs(student, matched) as own:
                student_hidden_TD = last_hidden_states(student, row.input_ids, **kwargs)[0]
            stats.add(banks, row)
            steering.see(row.router_mask[0])
            mask_T = row.loss_mask[0]
            with clock.phase("loss"):
                hidden = (student_hidden_TD, teacher_hidden_TD)
                values = distill(*hidden, *heads, row.labels[0], **loss_options)
                loss_T = values.loss * mask_T
                token_losses.append(loss_T.detach())
                sums += _sums(values, mask_T)
            with clock.phase("backward"):
                gap = unexplained(own, theirs, row.router_mask[0]).mean() if matched else 0.0
                gaps.append(torch.as_tensor(gap).detach())
                others = router_losses(banks, row, config) + config.loss.states_coef * gap
                backward(loss_T.sum() / loss_tokens + others / len(rows), banks)
        commit()
    loss, forward_kl, agreement, student_entropy = sums / loss_tokens
    with clock.phase("optimizer"):
        expert_norm, gate_norm, finite = update(student, optimizer, loss, steering, config)
    return StepResult(
        loss=loss,
        forward_kl=forward_kl,
        agreement=agreement,
        student_entropy=student_entropy,
        states_error=torch.stack(gaps).mean() if matched else None,
        expert_grad_norm=expert_norm,
        gate_grad_norm=gate_norm,
        stats=stats,
        token_losses=token_losses,
        finite=finite,
        tallies=tallies,
        seconds=clock.seconds,
    )


def backward(total: Tensor, banks: Sequence[ExpertBank]) -> None:
    """Run a row's backward pass without recording what it recomputes, then drop the routings."""
    for bank in banks:
        bank.recording = False
    try:
        total.backward()
    finally:
        for bank in banks:
            bank.recording, bank.routing = True, None


@contextmanager
def undone_if_broken(steering: Steering, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the context run a step's passes; an exception discards gradients and statistics."""
    whole = False
    try:
        yield
        whole = True
    finally:
        if not whole:
            steering.end(update=False)
            optimizer.zero_grad(set_to_none=True)


def _sums(values: DistillValues, mask_T: Tensor) -> Tensor:
    """Sums over the tokens that count of loss, KL, agreement and the student's entropy."""
    loss_T = values.loss.detach()
    measured = (loss_T, values.forward_kl, values.agrees, values.student_entropy)
    return torch.stack([(value_T * mask_T).sum() for value_T in measured])


def _all_finite(*values: Tensor | float) -> bool:
    """Whether all are finite numbers; reads a GPU once."""
    device = next(value.device for value in values if isinstance(value, Tensor))
    numbers = torch.stack([torch.as_tensor(value, device=device).float() for value in values])
    return all(math.isfinite(number) for number in numbers.tolist())


def update(
    student: TinyOnnForCausalLM,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    steering: Steering,
    config: RunConfig,
) -> tuple[Tensor | float, Tensor | float, bool]:
    """Clip, step and steer if loss and gradients are finite; the norms, and whether they were."""
    expert_norm, gate_norm = clip_gradients(student, config.optim.clip_norm)
    finite = _all_finite(loss, expert_norm, gate_norm)
    if finite:
        optimizer.step()
    steering.end(update=finite)
    optimizer.zero_grad(set_to_none=True)
    return expert_norm, gate_norm, finite


def _loss_options(student: TinyOnnForCausalLM, config: RunConfig) -> dict[str, Any]:
    """The settings of the loss, and how it is computed here."""
    return {
        "divergence": config.loss.divergence,
        "temperature": config.loss.temperature,
        "jsd_beta": config.loss.jsd_beta,
        "chunk_tokens": loss_chunk_tokens(config.loss, head_of(student).weight),
        # On a CPU the tiles by hand stay in its cache.
        "compiled": config.train.compile and student.device.type == "cuda",
    }


def teach_gates(
    banks: Sequence[ExpertBank], config: RunConfig, loss_tokens: int, router_tokens: int
) -> list[SurpriseTally]:
    """Hand every bank what its gate learns in this step's backward passes, if anything."""
    objective, smk = config.router.objective, config.smk
    if objective not in ("smk", "regression"):
        return []
    rule = SmkRule(
        surprise=smk.surprise,
        direction=smk.direction,
        candidates=smk.candidates,
        targets=smk.targets,
        num_targets=round(config.router.target_k) - config.experts.num_shared,
    )
    if objective == "regression":
        # D2DMoE, arXiv 2310.04361, section 3.3: the gate predicts the norms of all experts' outputs
        # by squared error. In logs, so that loud layers do not decide.
        rule = SmkRule(surprise="magnitude", direction="max", candidates="all", targets="log")
    num_experts, device = banks[0].experts.num_experts, banks[0].experts.down_proj.device
    tallies = SurpriseTally.of_layers(len(banks), num_experts, device)
    for bank, tally in zip(banks, tallies, strict=True):
        bank.smk = SmkStep(
            rule=rule,
            grad_scale=(smk.coef if objective == "smk" else 1.0) / router_tokens,
            loss_scale=float(loss_tokens),
            tally=tally,
            num_shared=config.experts.num_shared,
        )
    return tallies


def router_losses(banks: Sequence[ExpertBank], row: PackedRow, config: RunConfig) -> Tensor | float:
    """These layers' gates' own losses that go with a coupled selection; 0 for the others."""
    router = config.router
    if router.objective == "task" and router.selection == "top_any":
        return gate_losses(banks, router)
    if router.objective != "task" or router.selection != "top_k":
        return 0.0
    num_shared = config.experts.num_shared
    logits = [
        routed(bank.routing.router_logits, num_shared) for bank in banks if bank.routing is not None
    ]
    top_k = round(router.target_k) - num_shared
    balance = load_balancing_loss(logits, top_k, row.router_mask[0])
    penalty = z_loss(logits, row.router_mask[0])
    return router.load_balancing_coef * balance + router.z_loss_coef * penalty
