"""Comparison of a student with its teacher on the same rows: quality and compute."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from tiny_onn.config.schema import LossConfig
from tiny_onn.data.packing import PackedRow
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import head_of, last_hidden_states
from tiny_onn.model.experts import recorded_routings
from tiny_onn.model.student import TinyOnnForCausalLM, eval_mode
from tiny_onn.ops.distillation_loss import distill
from tiny_onn.ops.loss_chunks import loss_chunk_tokens
from tiny_onn.parallel import ALONE, World
from tiny_onn.planning.costs import forward_flops
from tiny_onn.routing.document_k import DocumentK
from tiny_onn.routing.statistics import OracleStats, RoutingStats
from tiny_onn.runs.records import Evaluation
from tiny_onn.teacher.held_out import HeldOut, TaughtText


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The comparison of a model with a reference: means over the tokens that have a label."""

    num_tokens: int
    forward_kl: float
    """KL(reference || model) in nats per token."""
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    nll: float
    reference_nll: float
    entropy: float
    """Entropy of the model's next-token distribution in nats."""
    reference_entropy: float


@torch.no_grad()
def compare(
    model: PreTrainedModel,
    held_out: TaughtText,
    loss: LossConfig,
    after_row: Callable[[PackedRow], None] = lambda _: None,
    *,
    world: World = ALONE,
) -> Comparison:
    """Compare a model's next-token distributions with the teacher's on held-out rows.

    Args:
        model: the model to compare.
        held_out: the rows, and the teacher that the model should equal.
        loss: the settings of the loss, for the number of tokens whose logits exist at once.
        after_row: a function called after each row, with the row on the device.
        world: the processes, of which each compares its share of the rows.
    """
    device, reference = held_out.teacher.device, held_out.teacher
    sums = torch.zeros(6, device=device, dtype=torch.float64)
    num_tokens = torch.zeros((), device=device, dtype=torch.int64)
    chunk_tokens = loss_chunk_tokens(loss, head_of(model).weight)
    for row, reference_hidden_TD in held_out.visit("evaluating, rows", world):
        values = distill(
            last_hidden_states(model, row.input_ids, **packed_kwargs(row))[0],
            reference_hidden_TD,
            head_of(model),
            head_of(reference),
            row.labels[0],
            divergence="forward_kl",
            temperature=1.0,
            jsd_beta=loss.jsd_beta,
            chunk_tokens=chunk_tokens,
        )
        mask_T = row.loss_mask[0]
        num_tokens += mask_T.sum()
        measured = (
            values.forward_kl,
            values.agrees,
            values.student_nll,
            values.teacher_nll,
            values.student_entropy,
            values.teacher_entropy,
        )
        for index, value_T in enumerate(measured):
            sums[index] += value_T[mask_T].double().sum()
        after_row(row)
    world.all_reduce_sum([sums, num_tokens])
    means = (sums / num_tokens.clamp_min(1)).tolist()
    kl, agreement, nll, reference_nll, entropy, reference_entropy = means
    return Comparison(
        num_tokens=int(num_tokens),
        forward_kl=kl,
        top1_agreement=agreement,
        perplexity=_exp(nll),
        reference_perplexity=_exp(reference_nll),
        nll=nll,
        reference_nll=reference_nll,
        entropy=entropy,
        reference_entropy=reference_entropy,
    )


def evaluate(student: TinyOnnForCausalLM, held_out: HeldOut, loss: LossConfig) -> Evaluation:
    """Compare the student with its teacher on packed rows, at the budget that the student has."""
    return evaluate_layers(student, held_out, loss)[0]


@torch.no_grad()
def evaluate_layers(
    student: TinyOnnForCausalLM, held_out: HeldOut, loss: LossConfig, world: World = ALONE
) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluate like `evaluate`, and also return the routing statistics of each layer.

    Each of the processes evaluates its share of the rows. The first row passes through the student
    once more, to compare its routing with the oracle's.
    """
    banks, rows = student.banks(), held_out.rows
    stats, oracle, document_k = RoutingStats.zeros(banks), OracleStats.zeros(banks), DocumentK()
    with eval_mode(student):
        with recorded_routings(banks) as routings:

            def count(row: PackedRow) -> None:
                stats.add(routings, row)
                document_k.add(routings, row)
                routings.clear()

            quality = compare(student, held_out, loss, count, world=world)
        world.all_reduce_sum(stats.tensors())
        document_k.add_up(rows, world, student.device)
        row = rows[0].to(student.device)
        with oracle.watch(banks, row.router_mask[0]):
            last_hidden_states(student, row.input_ids, **packed_kwargs(row))
    score_pairs = sum(n * (n + 1) // 2 for row in rows for n in document_lengths(row))
    mean_context = score_pairs / sum(row.labels.numel() for row in rows)
    summary = stats.summary() | oracle.summary()
    result = Evaluation(
        num_tokens=quality.num_tokens,
        forward_kl=quality.forward_kl,
        top1_agreement=quality.top1_agreement,
        student_perplexity=quality.perplexity,
        teacher_perplexity=quality.reference_perplexity,
        student_nll=quality.nll,
        teacher_nll=quality.reference_nll,
        teacher_entropy=quality.reference_entropy,
        tau=quality.entropy,
        uniform_nll=math.log(len(head_of(student).weight)),
        unigram_nll=unigram_nll(torch.cat([row.labels[row.loss_mask] for row in rows])),
        k_error=document_k.standard_error(),
        **summary,
        **forward_flops(student, summary["mean_k"], mean_context),
    )
    return result, stats.layers() | oracle.layers() | stats.counts()


def unigram_nll(labels: Int[Tensor, " labels"]) -> float:
    """Return the loss, in nats, that the frequencies of tokens alone reach on these labels.

    This is the entropy of the labels' own frequencies, which no model without context can beat on
    these labels, plus `(distinct - 1) / (2 labels)`, which corrects for counting the frequencies on
    the same labels. Source: Miller, "Note on the bias of information estimates", 1955.
    """
    _, counts = labels.unique(return_counts=True)
    return frequency_nll(counts)


def frequency_nll(counts: Int[Tensor, " distinct"]) -> float:
    """Return `unigram_nll` from how often each token that occurs is a label."""
    total = int(counts.sum())
    share = counts.double() / max(1, total)
    bias = (len(counts) - 1) / max(1, 2 * total)
    return float(torch.special.entr(share).sum()) + bias


def document_lengths(row: PackedRow) -> list[int]:
    """Return the number of tokens of each document fragment of a row."""
    return row.cu_seqlens.diff().tolist()


def _exp(nll: float) -> float:
    return torch.tensor(nll, dtype=torch.float64).exp().item()
