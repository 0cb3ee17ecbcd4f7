"""Cases of the distillation loss, and its definition: all logits at once, in float64."""

from dataclasses import fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_onn.ops.distillation_loss import DistillValues, Divergence, Head, distill

DIVERGENCES: list[Divergence] = ["forward_kl", "reverse_kl", "jsd"]


BETA = 0.3


V = 91


class Case(NamedTuple):
    """The tensors that `distill` takes."""

    student_hidden: Tensor
    teacher_hidden: Tensor
    student_head: Head
    teacher_head: Head
    labels: Tensor


def naive_logits(hidden: Tensor, head: Head) -> Tensor:
    """The definition: the head's linear map in its own dtype, the rest in fp32 or float64."""
    raw = F.linear(hidden, head.weight, head.bias)
    logits = raw.to(torch.promote_types(raw.dtype, torch.float32)) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def naive_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def naive_distill(
    case: Case,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    beta: float = BETA,
    label_coef: float = 0.0,
) -> DistillValues:
    """The definition of every value, with all logits at once."""
    student_hidden, teacher_hidden, student_head, teacher_head, labels = case
    student_logits = naive_logits(student_hidden, student_head)
    with torch.no_grad():
        teacher_logits = naive_logits(teacher_hidden, teacher_head)
    log_s = F.log_softmax(student_logits / temperature, -1)
    log_q = F.log_softmax(teacher_logits / temperature, -1)
    log_m = torch.log(beta * log_q.exp() + (1 - beta) * log_s.exp())
    loss = {
        "forward_kl": naive_kl(log_q, log_s),
        "reverse_kl": naive_kl(log_s, log_q),
        "jsd": beta * naive_kl(log_q, log_m) + (1 - beta) * naive_kl(log_s, log_m),
    }[divergence]
    log_s = F.log_softmax(student_logits, -1)
    nll = F.nll_loss(log_s, labels, reduction="none", ignore_index=-100)
    mixed = (1 - label_coef) * loss * temperature**2 + label_coef * nll
    log_s = log_s.detach()
    log_q = F.log_softmax(teacher_logits, -1)
    return DistillValues(
        loss=torch.where(labels == -100, loss * temperature**2, mixed),
        forward_kl=naive_kl(log_q, log_s),
        teacher_entropy=-(log_q.exp() * log_q).sum(-1),
        student_entropy=-(log_s.exp() * log_s).sum(-1),
        student_nll=nll.detach(),
        teacher_nll=F.nll_loss(log_q, labels, reduction="none", ignore_index=-100),
        agrees=student_logits.argmax(-1) == teacher_logits.argmax(-1),
    )


def make_case(
    tokens: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    *,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Case:
    """Two models of different widths over V tokens, and labels of which a third is masked."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(V, (tokens,), generator=generator)
    labels[::3] = -100
    return Case(
        student_hidden=normal(tokens, 16),
        teacher_hidden=normal(tokens, 24) / 2,
        student_head=Head(
            weight=normal(V, 16), bias=normal(V) if bias else None, scale=scale, softcap=softcap
        ),
        teacher_head=Head(weight=normal(V, 24)),
        labels=labels,
    )


def run(
    case: Case,
    *,
    weights: Tensor | None = None,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    label_coef: float = 0.0,
    chunk_tokens: int | None = 7,
) -> tuple[DistillValues, Tensor]:
    """Values and gradient of the weighted sum of losses; by definition if chunk_tokens is None."""
    x = case.student_hidden.clone().requires_grad_()
    case = case._replace(student_hidden=x)
    if chunk_tokens is None:
        values = naive_distill(case, divergence, temperature, label_coef=label_coef)
    else:
        values = distill(
            *case,
            divergence=divergence,
            temperature=temperature,
            jsd_beta=BETA,
            label_coef=label_coef,
            chunk_tokens=chunk_tokens,
        )
    weights = torch.ones_like(values.loss) if weights is None else weights.to(values.loss.dtype)
    (grad,) = torch.autograd.grad(values.loss, x, weights)
    return values, grad


def assert_same(
    actual: Any, expected: DistillValues, rtol: float = 1e-10, atol: float = 1e-12
) -> None:
    for name in (field.name for field in fields(DistillValues)):
        pair = getattr(actual, name).detach(), getattr(expected, name).detach()
        torch.testing.assert_close(*pair, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")  # noqa: B023 - called at once
