"""Surprise and leave-one-out losses, measured on sampled documents."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel

from tiny_onn.config.schema import Surprise
from tiny_onn.data.packing import PackedRow
from tiny_onn.errors import UserError
from tiny_onn.model.attention import DOCUMENT_ATTENTION
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.probe.counterfactual_attention import own_keys
from tiny_onn.probe.leave_one_out import Document
from tiny_onn.probe.subject import Subject
from tiny_onn.probe.summary import Seen, numbers

# What was measured so far is written as many times.
PARTS = 10


# The gain of the token's own loss, without what later tokens read of it.
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
    """The numbers of some documents' tokens, the first of each apart, by layer.

    Args:
        subject: the model.
        probed: documents to probe.
        fitted: documents to fit regressions on; none: none are made.
        layers: which.
        use_kl: whether a token's own loss is the KL to the teacher, or that of the next token.
        keep: called with the numbers of the documents so far, without regressions, `PARTS - 1`
            times or so on the way.
    """
    teacher = subject.teacher if use_kl else None
    part = math.ceil(len(probed) / PARTS)
    losses: list[Tensor] = []
    seen = {layer: Seen(value=[], active=[], x=[], scores={}) for layer in layers}
    with _bar(len(probed) * (len(layers) + 1) + len(fitted)) as advance:
        for losses_T in look(subject.student, teacher, probed, seen, advance):
            losses.append(losses_T)
            if len(losses) % part == 0 and len(losses) < len(probed):
                keep(numbers(probed, losses, seen, {}, use_kl=use_kl))
        fit = look_again(subject.student, teacher, fitted, layers, advance)
    return numbers(probed, losses, seen, fit, use_kl=use_kl)


def sample_documents(
    rows: Iterable[PackedRow], document_tokens: int, max_tokens: int, fit_tokens: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Token ids (1, T) of documents to probe, and of others to fit regressions on.

    The first are the beginnings of the first fragments of text; the second are whole later
    fragments, in pieces of the same length.

    Raises:
        UserError: there is not one document of three tokens.
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
            "--text: got no document of three tokens or more, expected some text; name another"
        )
    return probed, fitted


def look(
    student: TinyOnnForCausalLM,
    teacher: PreTrainedModel | None,
    documents: Sequence[Tensor],
    seen: dict[int, Seen],
    advance: Callable[[float], None],
) -> Iterator[Tensor]:
    """Each document's own losses (T,), once what its tokens show of every layer is in `seen`.

    Args:
        student: the model.
        teacher: whose KL counts; None: the next token's loss does.
        documents: token ids (1, T).
        seen: by layer; truth, every surprise, and inputs are added to it.
        advance: called with the documents done, in parts.
    """
    num_experts = student.config.num_experts
    for document in _documents(student, teacher, documents):
        surprise = document.surprise(list(seen))
        own = document.surprise(list(seen), ["gain"], own=True)
        advance(1)
        for layer, shown in seen.items():
            found = surprise[layer] | {OWN_GAIN: own[layer]["gain"]}
            _note(shown, document, layer, found)
            value_TE = document.truth(layer, lambda num: advance(num / num_experts))
            shown.value.append(value_TE.cpu())
        yield document.losses_T.cpu()


def look_again(
    student: TinyOnnForCausalLM,
    teacher: PreTrainedModel | None,
    documents: Sequence[Tensor],
    layers: Sequence[int],
    advance: Callable[[float], None],
) -> dict[int, Seen]:
    """Gain, magnitude and inputs of documents to fit on, without their truth, by layer."""
    seen = {layer: Seen(value=[], active=[], x=[], scores={}) for layer in layers}
    kinds: tuple[Surprise, ...] = ("gain", "magnitude")
    for document in _documents(student, teacher, documents):
        surprise = document.surprise(layers, kinds)
        for layer in layers:
            _note(seen[layer], document, layer, surprise[layer])
        advance(1)
    return seen if documents else {}


def _documents(
    student: TinyOnnForCausalLM, teacher: PreTrainedModel | None, documents: Sequence[Tensor]
) -> Iterator[Document]:
    student.set_attn_implementation(DOCUMENT_ATTENTION)
    if documents:
        # Attention that is not plain is refused here, by name.
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
            yield Document(student, on_device, logits)


def _note(seen: Seen, document: Document, layer: int, scores: dict[str, Tensor]) -> None:
    x_TD, active_TE = document.mlp_input(layer)
    seen.x.append(x_TD.cpu())
    seen.active.append(active_TE.cpu())
    for kind, score_TE in scores.items():
        seen.scores.setdefault(kind, []).append(score_TE.float().cpu())


@contextmanager
def _bar(total: int) -> Iterator[Callable[[float], None]]:
    """A progress bar on standard error, and what moves it."""
    with Progress(
        TextColumn("probe"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task("probe", total=total)
        yield lambda amount: progress.update(task, advance=amount)
