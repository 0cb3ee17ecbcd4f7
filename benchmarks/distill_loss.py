"""Time and memory of the distillation loss against the ways others compute it.

Forward KL from hidden states, mean over tokens, and its gradient at the student's hidden states,
with frozen heads. Peers: naive (all logits of both models, float32 log-softmax, `F.kl_div`,
autograd); Liger's `LigerFusedLinearJSDLoss` (beta 0); TRL's `ChunkedDivergenceFunction` (beta 0,
what its `DistillationTrainer` calls). A peer that is not installed is recorded as skipped.

    python -m benchmarks distill_loss [--tokens 2048] [--dtype bfloat16] [--device cuda] [--smoke]

Parity: every peer's loss and gradient equal ours in float32 at few tokens. Memory: peak beyond the
inputs, each peer in a process of its own. Ends in one JSON line.
"""

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import check, in_subprocess, measure, peak_bytes, relative_gap
from benchmarks.registry import Goal, Option, Result, benchmark
from tiny_onn.ops.distillation_loss import Head, distill
from tiny_onn.ops.loss_chunks import CPU_LOSS_CHUNK_TOKENS, GPU_LOSS_CHUNK_TOKENS

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# What the trainer takes where memory is not short.
CHUNK_TOKENS = {"cpu": CPU_LOSS_CHUNK_TOKENS, "cuda": GPU_LOSS_CHUNK_TOKENS[1]}
PARITY_TOKENS = 48


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Hidden states and heads; student and teacher have heads of their own."""

    student_TD: Tensor
    teacher_TD: Tensor
    student_VD: Tensor
    teacher_VD: Tensor

    def run(self, loss: Loss) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient at the student's hidden states."""
        student_TD = self.student_TD.detach().requires_grad_()
        value = loss(student_TD, self.teacher_TD, self.student_VD, self.teacher_VD)
        value.backward()
        assert student_TD.grad is not None
        return value.detach(), student_TD.grad


def make_inputs(tokens: int, vocab: int, hidden: int, dtype: str, device: str) -> Inputs:
    """Random inputs whose logits have a standard deviation of 2."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, scale: float) -> Tensor:
        values = torch.randn(rows, hidden, generator=generator, device=device) * scale
        return values.to(getattr(torch, dtype))

    scale = 2 / hidden**0.5
    return Inputs(
        student_TD=draw(tokens, 1.0),
        teacher_TD=draw(tokens, 1.0),
        student_VD=draw(vocab, scale),
        teacher_VD=draw(vocab, scale),
    )


def ours(need_metrics: bool, s_TD: Tensor, q_TD: Tensor, s_VD: Tensor, q_VD: Tensor) -> Tensor:
    """`tiny_onn.ops.distillation_loss.distill`."""
    labels_T = torch.zeros(len(s_TD), dtype=torch.long, device=s_TD.device)
    values = distill(
        s_TD,
        q_TD,
        Head(weight=s_VD),
        Head(weight=q_VD),
        labels_T,
        divergence="forward_kl",
        temperature=1.0,
        jsd_beta=0.5,
        chunk_tokens=CHUNK_TOKENS[s_TD.device.type],
        need_metrics=need_metrics,
        compiled=s_TD.is_cuda,
    )
    return values.loss.mean()


def naive(s_TD: Tensor, q_TD: Tensor, s_VD: Tensor, q_VD: Tensor) -> Tensor:
    """All logits at once."""
    log_s_TV = F.log_softmax(F.linear(s_TD, s_VD).float(), dim=-1)
    with torch.no_grad():
        log_q_TV = F.log_softmax(F.linear(q_TD, q_VD).float(), dim=-1)
    return F.kl_div(log_s_TV, log_q_TV, reduction="batchmean", log_target=True)


def load_liger() -> Loss:
    """Liger's chunked loss. It has no option for a frozen head and computes its gradient too."""
    module = importlib.import_module("liger_kernel.chunked_loss.jsd_loss")

    def liger(s_TD: Tensor, q_TD: Tensor, s_VD: Tensor, q_VD: Tensor) -> Tensor:
        loss = module.LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=s_TD.is_cuda
        )
        labels_T = torch.zeros(len(s_TD), dtype=torch.long, device=s_TD.device)
        return loss(s_TD, s_VD, q_TD, q_VD, labels_T)

    return liger


def load_trl() -> Loss:
    """TRL's chunked loss."""
    function = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def trl(s_TD: Tensor, q_TD: Tensor, s_VD: Tensor, q_VD: Tensor) -> Tensor:
        return function.apply(s_TD, s_VD, None, q_TD, q_VD, None, 0.0)[0].mean()

    return trl


def losses() -> tuple[dict[str, Loss], dict[str, str]]:
    """Every way that runs here, and why the others do not."""
    found: dict[str, Loss] = {
        "ours": partial(ours, False),
        "ours with metrics": partial(ours, True),
        "naive": naive,
    }
    skipped = {}
    for name, load in (("liger", load_liger), ("trl", load_trl)):
        try:
            found[name] = load()
        except ImportError as error:
            skipped[name] = f"cannot be imported: {error}"
    return found, skipped


def parity(found: dict[str, Loss], vocab: int, hidden: int, device: str) -> dict:
    """Largest gap of a peer's loss or gradient to ours, float32."""
    inputs = make_inputs(PARITY_TOKENS, vocab, hidden, "float32", device)
    value, grad = inputs.run(found["ours"])
    gaps = []
    for loss in found.values():
        peer_value, peer_grad = inputs.run(loss)
        gaps += [relative_gap(peer_value, value), relative_gap(peer_grad, grad)]
    return check("loss and gradient", max(gaps), 1e-4)


def compare(
    *,
    tokens: int,
    vocab: int,
    hidden: int,
    dtype: str,
    device: str,
    repeats: int,
    own_process: bool,
) -> dict:
    """Parity, times and memory of all ways at one size; on a CPU memory wants `own_process`."""
    found, skipped = losses()
    gate = parity(found, vocab, hidden, device)
    size = {"tokens": tokens, "vocab": vocab, "hidden": hidden, "dtype": dtype, "device": device}
    memory = {}
    probe = partial(in_subprocess, "distill_loss") if own_process else measure_memory
    for name in list(found):
        try:
            memory[name] = probe({**size, "loss": name})["bytes"]
        except torch.OutOfMemoryError:
            skipped[name] = f"out of memory at {tokens} tokens"
            del found[name]
    inputs = make_inputs(**size)
    functions = {name: partial(inputs.run, loss) for name, loss in found.items()}
    timings = measure(functions, repeats=repeats, warmup=1, device=device)
    rows = [
        {
            "loss": name,
            "dtype": dtype,
            "tokens": tokens,
            **timing.columns(),
            "peak_bytes": memory[name],
        }
        for name, timing in timings.items()
    ]
    ratios = {}
    for name in ("naive", "liger", "trl"):
        key = f"{dtype}, {tokens} tokens: ours / {name}"
        there = name in timings and "ours" in timings
        ratios[f"{key}, time"] = timings["ours"].p50_ms / timings[name].p50_ms if there else None
        ratios[f"{key}, memory"] = memory["ours"] / max(1, memory[name]) if there else None
    return {"rows": rows, "ratios": ratios, "parity": gate, "skipped": skipped}


def measure_memory(case: dict) -> dict[str, int]:
    """Peak of one way in this process, after a call on few tokens loaded what it needs."""
    size = {name: value for name, value in case.items() if name != "loss"}
    loss = losses()[0][case["loss"]]
    make_inputs(**{**size, "tokens": 8}).run(loss)
    inputs = make_inputs(**size)
    return {"bytes": peak_bytes(partial(inputs.run, loss), case["device"])}


@benchmark(
    "Time and memory of the distillation loss against the ways others compute it.",
    case=measure_memory,
    tokens=Option([2048], smoke=[96]),
    vocab=Option(151_936, smoke=2048),
    hidden=Option(1024, smoke=64),
    dtype=Option(["float32", "bfloat16"], smoke=["float32"]),
    repeats=Option(5, smoke=2),
)
def run(arguments: argparse.Namespace) -> Result:
    """Check, then measure, at every size and in every format."""
    rows, ratios, skipped, gate = [], {}, {}, {}
    for dtype in arguments.dtype:
        for tokens in arguments.tokens:
            result = compare(
                tokens=tokens,
                vocab=arguments.vocab,
                hidden=arguments.hidden,
                dtype=dtype,
                device=arguments.device,
                repeats=arguments.repeats,
                own_process=not arguments.smoke and torch.device(arguments.device).type == "cpu",
            )
            rows += result["rows"]
            ratios |= result["ratios"]
            skipped |= result["skipped"]
            gate = result["parity"]
    for name, reason in skipped.items():
        print(f"skipped: {name}: {reason}")
    return Result(
        rows=rows,
        ratios=ratios,
        goals={name: goal_of(name) for name in ratios},
        parity=gate,
        settings={
            "vocab": arguments.vocab,
            "hidden": arguments.hidden,
            "chunk_tokens": CHUNK_TOKENS[torch.device(arguments.device).type],
        },
        more={"skipped": skipped},
    )


def goal_of(ratio: str) -> Goal:
    """An eighth of the naive way's memory, and nowhere more time or memory than a peer."""
    return Goal(at_most=0.125 if ratio.endswith("naive, memory") else 1.0)
