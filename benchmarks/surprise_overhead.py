"""What surprise costs: a distillation step with SMK against the same step with the gate frozen.

The peer is the textbook way: hooks keep each expert bank's input and the gradient at its output,
and after the backward pass a second forward and backward of every bank, by autograd, gives the
gradients that surprise is made of, and a backward pass of the gate's loss its gradient.

    python -m benchmarks surprise_overhead [--model embedded] [--tokens 1024] [--smoke]

Parity: both ways give the gates the same gradients, in float32 on a tiny model, for the default
rule and the model card's. Ends in one JSON line.
"""

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import check, measure, relative_gap
from benchmarks.registry import Goal, Option, Result, benchmark
from benchmarks.steps import (
    GradientRecorder,
    Step,
    dense_model,
    make_step,
    perturb,
    random_dense,
    random_rows,
    settings,
)
from tiny_onn.config.schema import RunConfig
from tiny_onn.model.experts import ExpertBank
from tiny_onn.ops.layout import joined_down
from tiny_onn.ops.surprise import SmkRule, smk_loss, smk_targets

CARD = ("smk.surprise=parameters", "smk.direction=min", "smk.candidates=active")


class Textbook:
    """A distillation step whose gates learn SMK by hooks and a second backward pass."""

    def __init__(self, step: Step, rule: SmkRule) -> None:
        self.step, self.rule = step, rule
        self.inputs: dict[ExpertBank, Tensor] = {}
        self.grads: dict[ExpertBank, Tensor] = {}
        self.masks: dict[ExpertBank, Tensor | None] = {}

    def __call__(self) -> None:
        """One update: the gates' gradients are made just before the optimizer steps."""
        handle = self.step.optimizer.register_step_pre_hook(lambda *_: self._teach())
        with self._hooks(), warnings.catch_warnings():
            # Layer 0's input needs no gradient; its output's, which is what we want, is right.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            self.step("none")
        handle.remove()
        for bank in self.step.student.banks():
            bank.router.zero_grad(set_to_none=True)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        def keep_input(bank: ExpertBank, inputs: tuple[Tensor, ...]) -> None:
            self.inputs[bank] = inputs[0].detach().flatten(0, -2)
            self.masks[bank] = bank.row.token_mask

        def keep_grad(bank: Any, _: object, grads: Any) -> None:
            self.grads[bank] = grads[0].detach().flatten(0, -2)

        handles = []
        for bank in self.step.student.banks():
            handles += [
                bank.register_forward_pre_hook(keep_input),
                bank.register_full_backward_hook(keep_grad),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _teach(self) -> None:
        for bank in self.step.student.banks():
            bank.router.requires_grad_(True)
            routing = bank.router(self.inputs[bank])
            mask_T = self.masks[bank]
            assert mask_T is not None
            # The step's loss is a mean over its tokens with a label: one less than the row's for
            # every document, as many as the router counts.
            num_tokens = int(mask_T.sum())
            surprise_TE = textbook_surprise(bank, self.inputs[bank], self.grads[bank], self.rule)
            surprise_TE = surprise_TE * num_tokens
            if self.rule.candidates == "active":
                surprise_TE = surprise_TE * routing.weights.detach()
            targets_TE = smk_targets(surprise_TE, routing.active, mask_T, self.rule)
            (smk_loss(routing.router_logits, targets_TE).sum() / num_tokens).backward()


def textbook_surprise(bank: ExpertBank, x_TD: Tensor, grad_y_TD: Tensor, rule: SmkRule) -> Tensor:
    """`gain` or `parameters` of every token and expert, by autograd through the experts."""
    E, D, I = bank.experts.down_proj.shape
    with torch.enable_grad():
        weight_FD = bank.experts.gate_up_proj.detach().to(x_TD.dtype).view(-1, D)
        down_DF = joined_down(bank.experts.down_proj.detach(), x_TD.dtype)
        pre_TE2I = F.linear(x_TD, weight_FD).view(-1, E, 2, I).requires_grad_()
        hidden_TEI = bank.activation(pre_TE2I[:, :, 0]) * pre_TE2I[:, :, 1]
        y_TD = F.linear(hidden_TEI.flatten(1), down_DF)
        grad_pre, grad_hidden = torch.autograd.grad(y_TD, (pre_TE2I, hidden_TEI), grad_y_TD)
    if rule.surprise == "gain":
        return -(hidden_TEI.detach().float() * grad_hidden.float()).sum(-1)
    assert rule.surprise == "parameters"
    x_sq_T1 = x_TD.float().square().sum(-1, keepdim=True)
    grad_y_sq_T1 = grad_y_TD.float().square().sum(-1, keepdim=True)
    pre_sq_TE = grad_pre.float().square().sum((2, -1))
    hidden_sq_TE = hidden_TEI.detach().float().square().sum(-1)
    return (x_sq_T1 * pre_sq_TE + hidden_sq_TE * grad_y_sq_T1).sqrt()


def rule_of(config: RunConfig) -> SmkRule:
    """The settings' rule, as a step makes it."""
    smk = config.smk
    return SmkRule(
        surprise=smk.surprise,
        direction=smk.direction,
        candidates=smk.candidates,
        lesson_share=smk.lesson_share,
        targets=smk.targets,
        num_targets=round(config.router.target_k),
    )


def parity() -> dict:
    """Largest relative gap of a gate's gradient between the two ways."""
    gaps = []
    for overrides in ((), CARD):
        config = settings(
            "teacher.dtype=float32", "train.compile=false", "optim.clip_norm=1e9", *overrides
        )
        dense = random_dense("tiny", config, "cpu")
        rows = random_rows(dense.config.vocab_size, 96, documents=(16, 40))
        step = make_step(dense, config, rows)
        perturb(step.student)
        recorder = GradientRecorder(step.student)
        step.optimizer = recorder
        threshold = [bank.router.threshold.clone() for bank in step.student.banks()]
        step("smk")
        ours = recorder.gradients
        for bank, value in zip(step.student.banks(), threshold, strict=True):
            bank.router.threshold.copy_(value)
        Textbook(step, rule_of(config))()
        gates = [name for name in ours if ".router." in name]
        assert gates
        gaps += [relative_gap(recorder.gradients[name], ours[name]) for name in gates]
    return check("gate gradients", max(gaps), 1e-4)


@benchmark(
    "Time of a distillation step with SMK against the same step with the gate frozen.",
    model=Option("embedded", "embedded, or a bundled shape", smoke="tiny"),
    tokens=Option(1024, smoke=64),
    repeats=Option(7, smoke=2),
    compile=Option(True, smoke=False),
)
def run(arguments: argparse.Namespace) -> Result:
    """Check, then time."""
    gate = parity()
    compiled = f"train.compile={str(arguments.compile).lower()}"
    config = settings(compiled)
    dense = dense_model(arguments.model, config, arguments.device)
    vocab = dense.config.get_text_config().vocab_size
    rows = random_rows(vocab, arguments.tokens, documents=(64, max(65, arguments.tokens // 2)))
    step = make_step(dense, config, rows)
    card = replace(step, config=settings(compiled, *CARD))
    functions = {
        "gate frozen": partial(step, "none"),
        "smk (default rule)": partial(step, "smk"),
        "smk (model card's rule)": partial(card, "smk"),
        "textbook (default rule)": Textbook(step, rule_of(config)),
    }
    timings = measure(functions, repeats=arguments.repeats, warmup=2, device=arguments.device)
    base = timings["gate frozen"].p50_ms
    return Result(
        rows=[
            {"step": name, **timing.columns(), "of frozen": timing.p50_ms / base}
            for name, timing in timings.items()
        ],
        ratios={
            "smk / frozen": timings["smk (default rule)"].p50_ms / base,
            "smk (model card) / frozen": timings["smk (model card's rule)"].p50_ms / base,
            "textbook / frozen": timings["textbook (default rule)"].p50_ms / base,
            "smk / textbook": timings["smk (default rule)"].p50_ms
            / timings["textbook (default rule)"].p50_ms,
        },
        goals={"smk / frozen": Goal(at_most=1.05)},
        parity=gate,
        settings={
            "model": arguments.model,
            "tokens": arguments.tokens,
            "compiled": arguments.compile,
            "repeats": arguments.repeats,
        },
    )
