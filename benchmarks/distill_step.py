"""Tokens per second of a whole training step against a plain trainer made of transformers' pieces.

The plain trainer does what one would write first: teacher and student run to their logits, the loss
is `F.kl_div` between float32 log-softmaxes of all of them, experts are plain torch operations under
autograd (dense and masked, the gate's weights coupled to the loss), no gradient checkpointing, and
one `torch.optim.AdamW` steps the same parameters. It is measured with gradient checkpointing too.

    python -m benchmarks distill_step [--model embedded] [--tokens 1024] [--smoke]

Parity: both give the same loss and the same gradients of the experts, in float32 on a tiny model.
Memory: peak of a step beyond the two models, each way in a process of its own; the first step's,
which makes the optimizer's state. Ends in one JSON line.
"""

import argparse
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import check, in_subprocess, measure, peak_bytes, relative_gap
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
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import decoder_layers
from tiny_onn.model.experts import ExpertBank

WAYS = {
    "ours": ("layer",),
    "ours, nothing recomputed": ("none",),
    "plain": ("none", "plain"),
    "plain, layers recomputed": ("layer", "plain"),
}


class PlainExperts(nn.Module):
    """An expert bank's parameters under autograd: three products and the mask between them."""

    def __init__(self, bank: ExpertBank) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = bank.experts.gate_up_proj, bank.experts.down_proj
        self.router, self.activation = bank.router, bank.activation

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The routed sum of the experts' outputs."""
        x_TD = hidden_states.flatten(0, -2)
        E, D, I = self.down_proj.shape
        gate_up_FD = self.gate_up_proj.view(-1, D).to(x_TD.dtype)
        gate_TEI, up_TEI = F.linear(x_TD, gate_up_FD).view(-1, E, 2, I).unbind(2)
        weights_TE = self.router(x_TD.detach()).weights.to(x_TD.dtype)
        hidden_TEI = self.activation(gate_TEI) * up_TEI * weights_TE[..., None]
        down_DF = self.down_proj.transpose(0, 1).reshape(D, E * I).to(x_TD.dtype)
        y_TD = F.linear(hidden_TEI.flatten(1), down_DF)
        return y_TD.view_as(hidden_states)


class PlainTrainer:
    """The same update without anything of ours but parameters and rows."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.model = step.student.backbone
        layers: Any = decoder_layers(self.model)
        for layer in layers:
            layer.mlp = PlainExperts(layer.mlp)
        parameters = [p for p in step.student.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=6e-4)

    def __call__(self) -> float:
        """One update; the loss."""
        row = next(self.step.rows)
        kwargs = {"use_cache": False, **packed_kwargs(row)}
        self.model.train()
        with torch.no_grad():
            teacher_logits = self.step.teacher(input_ids=row.input_ids, **kwargs).logits[0]
        logits = self.model(input_ids=row.input_ids, **kwargs).logits[0]
        mask_T = row.loss_mask[0]
        log_s_TV = F.log_softmax(logits[mask_T].float(), dim=-1)
        log_q_TV = F.log_softmax(teacher_logits[mask_T].float(), dim=-1)
        loss = F.kl_div(log_s_TV, log_q_TV, reduction="batchmean", log_target=True)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def parity() -> dict:
    """Largest relative gap of the loss and of an expert parameter's gradient."""
    config = settings("teacher.dtype=float32", "train.compile=false", "optim.clip_norm=1e9")
    dense = random_dense("tiny", config, "cpu")
    rows = random_rows(dense.config.vocab_size, 96, documents=(16, 40))
    step = make_step(dense, config, rows)
    perturb(step.student)
    recorder = GradientRecorder(step.student)
    step.optimizer = recorder
    thresholds = [bank.router.threshold.clone() for bank in step.student.banks()]
    loss, ours = step().loss, dict(recorder.gradients)
    for bank, value in zip(step.student.banks(), thresholds, strict=True):
        bank.router.threshold.copy_(value)
    plain = PlainTrainer(step)
    plain.optimizer = recorder
    gaps = [relative_gap(torch.tensor(plain()), loss)]
    experts = [name for name in ours if ".router." not in name]
    assert experts
    gaps += [relative_gap(recorder.gradients[name], ours[name]) for name in experts]
    return check("loss and expert gradients", max(gaps), 1e-4)


def make(way: str, model: str, tokens: int, device: str, compiled: bool) -> Step | PlainTrainer:
    """One way to take a step, with models of its own."""
    mode, *rest = WAYS[way]
    config = settings(f"train.compile={str(compiled).lower()}", f"train.checkpointing={mode}")
    dense = dense_model(model, config, device)
    vocab = dense.config.get_text_config().vocab_size
    rows = random_rows(vocab, tokens, documents=(max(2, tokens // 8), tokens // 2))
    step = make_step(dense, config, [row.to(device) for row in rows])
    return PlainTrainer(step) if rest else step


def measure_memory(case: dict) -> dict[str, int]:
    """Peak of a first step in this process."""
    step = make(**case)
    return {"bytes": peak_bytes(step, case["device"])}


@benchmark(
    "Tokens per second and memory of a whole training step against a plain trainer.",
    case=measure_memory,
    model=Option("embedded", "embedded, or a bundled shape", smoke="tiny"),
    tokens=Option(1024, smoke=64),
    repeats=Option(5, smoke=2),
    compile=Option(True, smoke=False),
)
def run(arguments: argparse.Namespace) -> Result:
    """Check, then measure memory and time."""
    ways = list(WAYS)
    gate = parity()
    case = {
        "model": arguments.model,
        "tokens": arguments.tokens,
        "device": arguments.device,
        "compiled": arguments.compile,
    }
    probe = measure_memory if arguments.smoke else partial(in_subprocess, "distill_step")
    memory = {way: probe({"way": way, **case})["bytes"] for way in ways}
    steps = {way: make(way, **case) for way in ways}
    timings = measure(steps, repeats=arguments.repeats, warmup=2, device=arguments.device)
    ratios: dict[str, float | None] = {}
    for way in ways[2:]:
        ratios[f"ours / {way}, tokens per second"] = timings[way].p50_ms / timings["ours"].p50_ms
        ratios[f"ours / {way}, memory"] = memory["ours"] / max(1, memory[way])
    return Result(
        rows=[
            {
                "step": way,
                **timing.columns(),
                "tokens_per_s": 1e3 * arguments.tokens / timing.p50_ms,
                "step_peak_bytes": memory[way],
            }
            for way, timing in timings.items()
        ],
        ratios=ratios,
        goals={"ours / plain, tokens per second": Goal(at_least=1.5)},
        parity=gate,
        settings={**case, "repeats": arguments.repeats},
    )
