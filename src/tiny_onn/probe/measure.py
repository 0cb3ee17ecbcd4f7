"""Measurements of surprise and of leave-one-out losses on sampled documents."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel

from tiny_onn.config.schema import Surprise
from tiny_onn.console import console
from tiny_onn.data.packing import PackedRow
from tiny_onn.errors import UserError
from tiny_onn.model.attention import DOCUMENT_ATTENTION
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.probe.counterfactual_attention import own_keys
from tiny_onn.probe.leave_one_out import ProbedDocument
from tiny_onn.probe.subject import Subject
from tiny_onn.probe.summary import Observations, summarise

# The number of parts after which the results so far are written.
PARTS = 10
# The name of the gain for the token's own loss, without the losses of later tokens that attend to
# the token.
OWN_GAIN = "own gain"


def measure(
    subject: Subject,
    probed: Sequence[Tensor],
    fitted: Sequence[Tensor],
    layers: Sequence[int],
    *,
    use_kl: bool,
    keep: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """Measure documents and return the summary, by layer, with first tokens apart.

    Args:
        subject: the model.
        probed: the documents to probe.
        fitted: the documents to fit regressions on; empty: no regressions are fitted.
        layers: the layers to probe.
        use_kl: true if the loss of a token is its KL to the teacher, false if it is its next-token
            loss.
        keep: a function called with the summary of the documents so far, without regressions,
            about `PARTS - 1` times on the way.
    """
    teacher = subject.teacher if use_kl else None
    part = math.ceil(len(probed) / PARTS)
    losses: list[Tensor] = []
    observations = {layer: Observations(value=[], active=[], x=[], scores={}) for layer in layers}
    with _bar(len(probed) * (len(layers) + 1) + len(fitted)) as advance:
        for losses_T in measure_documents(subject.student, teacher, probed, observations, advance):
            losses.append(losses_T)
            if len(losses) % part == 0 and len(losses) < len(probed):
                keep(summarise(probed, losses, observations, {}, use_kl=use_kl))
        fit = measure_fit_documents(subject.student, teacher, fitted, layers, advance)
    return summarise(probed, losses, observations, fit, use_kl=use_kl)


def sample_documents(
    rows: Iterable[PackedRow], document_tokens: int, max_tokens: int, fit_tokens: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return token ids (1, T) of documents to probe, and of others to fit regressions on.

    The documents to probe are the beginnings of the first fragments of text; the others are whole
    later fragments, in pieces of the same length.

    Raises:
        UserError: there is no document of three tokens.
    """
    probed: list[Tensor] = []
    fitted: list[Tensor] = []
    num_probed, num_fitted = 0, 0
    for row in rows:
        for start, stop in pairwise(row.cu_seqlens.tolist()):
            if not row.loss_mask[0, start]:
                continue
            pieces = row.input_ids[:, start:stop].split(document_tokens, dim=1)
            pieces = [piece for piece in pieces if piece.shape[1] >= 3]
            if num_probed < max_tokens:
                probed += pieces[:1]
                num_probed += sum(piece.shape[1] for piece in pieces[:1])
                continue
            for piece in pieces:
                if num_fitted < fit_tokens:
                    fitted.append(piece)
                    num_fitted += piece.shape[1]
    if not probed:
        raise UserError(
            "--text: got no document of three tokens or more, expected some text; name another file"
        )
    return probed, fitted


def measure_documents(
    student: TinyOnnForCausalLM,
    teacher: PreTrainedModel | None,
    documents: Sequence[Tensor],
    observations: dict[int, Observations],
    advance: Callable[[float], None],
) -> Iterator[Tensor]:
    """Yield the losses (T,) of each document, after its measurements went into `observations`.

    Args:
        student: the model.
        teacher: the model for the KL; None: the loss of a token is its next-token loss.
        documents: the documents as token ids (1, T).
        observations: by layer; truth, every kind of surprise, and inputs are added to it.
        advance: a function called with the number of documents done since its last call, which may
            be a fraction.
    """
    num_experts = student.config.num_experts
    for document in _documents(student, teacher, documents):
        surprise = document.surprise(list(observations))
        own = document.surprise(list(observations), ["gain"], own=True)
        advance(1)
        for layer, layer_observations in observations.items():
            scores = surprise[layer] | {OWN_GAIN: own[layer]["gain"]}
            _record(layer_observations, document, layer, scores)
            value_TE = document.truth(layer, lambda num: advance(num / num_experts))
            layer_observations.value.append(value_TE.cpu())
        yield document.losses_T.cpu()


def measure_fit_documents(
    student: TinyOnnForCausalLM,
    teacher: PreTrainedModel | None,
    documents: Sequence[Tensor],
    layers: Sequence[int],
    advance: Callable[[float], None],
) -> dict[int, Observations]:
    """Return the gain, magnitude and inputs of documents to fit regressions on, by layer."""
    observations = {layer: Observations(value=[], active=[], x=[], scores={}) for layer in layers}
    kinds: tuple[Surprise, ...] = ("gain", "magnitude")
    for document in _documents(student, teacher, documents):
        surprise = document.surprise(layers, kinds)
        for layer in layers:
            _record(observations[layer], document, layer, surprise[layer])
        advance(1)
    return observations if documents else {}


def _documents(
    student: TinyOnnForCausalLM, teacher: PreTrainedModel | None, documents: Sequence[Tensor]
) -> Iterator[ProbedDocument]:
    student.set_attn_implementation(DOCUMENT_ATTENTION)
    if documents:
        # This pass refuses kinds of attention that `own_keys` does not know, by name.
        with torch.no_grad():
            student(input_ids=documents[0].to(student.device), use_cache=False)
    for ids in documents:
        on_device = ids.to(student.device)
        with torch.no_grad():
            logits = (
                None
                if teacher is None
                else teacher(input_ids=on_device, use_cache=False).logits[0].float()
            )
        with own_keys(student):
            yield ProbedDocument(student, on_device, logits)


def _record(
    observations: Observations, document: ProbedDocument, layer: int, scores: dict[str, Tensor]
) -> None:
    x_TD, active_TE = document.mlp_input(layer)
    observations.x.append(x_TD.cpu())
    observations.active.append(active_TE.cpu())
    for kind, score_TE in scores.items():
        observations.scores.setdefault(kind, []).append(score_TE.float().cpu())


@contextmanager
def _bar(total: int) -> Iterator[Callable[[float], None]]:
    """Show a progress bar on standard error, and yield the function that advances it."""
    with Progress(
        TextColumn("probe"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console(),
    ) as progress:
        task = progress.add_task("probe", total=total)
        yield lambda amount: progress.update(task, advance=amount)
