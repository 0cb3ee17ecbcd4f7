"""The verb `probe`: what surprise says about experts, against leave-one-out truth.

The truth of an expert for a token is the rise of the token's own loss without it (`truth.py`). The
text is held-out: the first `document_tokens` of each of the first fragments are probed, later
fragments fit the regressions that ask whether a quantity can be predicted from the token.

Cost: `num_experts + 1` forward passes of the probed tokens through the layers from each probed one
up, and about five passes of the fitting tokens.

Legend: T tokens, D hidden, E experts.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_onn.config.checks import check_probe, validate
from tiny_onn.config.read import with_router
from tiny_onn.config.schema import RunConfig, Surprise
from tiny_onn.console import say
from tiny_onn.conversion.pipeline import make_student
from tiny_onn.data.packing import PackedRow
from tiny_onn.data.rows import calibration_rows, held_out_rows, text_rows
from tiny_onn.device import pick_device
from tiny_onn.errors import UserError
from tiny_onn.model.attention import DOCUMENT_ATTENTION
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.own_keys import own_keys
from tiny_onn.probe_record import Seen, numbers
from tiny_onn.report.probe import html_page
from tiny_onn.runs.files import write_json
from tiny_onn.runs.recorded_teacher import refuse_for_dense
from tiny_onn.runs.students import is_student, load_student, load_teacher_of
from tiny_onn.teacher.load import load_dense
from tiny_onn.teacher.model_paths import find_model
from tiny_onn.truth import Document

# Fragments that are sampled are at most this long, whatever a run's rows are.
ROW_TOKENS = 1024
# What was measured so far is written as many times.
PARTS = 10
# Where a layer is probed if none is named: shares of the depth.
DEPTHS = (0.13, 0.5, 0.87)
# The gain of the token's own loss, without what later tokens read of it.
OWN_GAIN = "own gain"


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model to probe, in float32."""

    student: TinyOnnForCausalLM
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: RunConfig
    fresh: bool
    """Whether it was converted for this, with all experts on: it equals its teacher."""


def run_probe(
    model: str,
    *,
    out: Path,
    layers: Sequence[int] = (),
    loss: str = "auto",
    text: Path | None = None,
    init: str = "slices",
    num_experts: int = 32,
    device: str = "auto",
    max_tokens: int = 1024,
    document_tokens: int = 64,
    fit_tokens: int = 8192,
    checkpoint: str = "newest",
    teacher: str | None = None,
) -> dict[str, Any]:
    """Probe a model, write `probe.json` and `probe.html` to a folder, and return the numbers.

    All layers advance together, document by document, and every tenth of the way what was measured
    is written, with `complete` false: an interrupted probe keeps it.

    Args:
        model: a run folder, a student's folder, `embedded`, a dense folder or a hub id. A dense
            model is converted on the fly, with all experts on.
        out: a folder for the results; made if missing.
        layers: which; none: an early, a middle and a late one.
        loss: the token's own loss, one of `PROBE_LOSSES`. `auto`: the KL to the teacher, but for a
            fresh conversion, whose KL is zero and at its minimum, the next token's.
        text: a file or folder; None: held-out text.
        init: the partition of a dense model.
        num_experts: experts of a dense model.
        device: where to run.
        max_tokens: probed, at most.
        document_tokens: read of each document, at most.
        fit_tokens: for the regressions, at most; 0: none are made.
        checkpoint: which of a run's students, see `load_student`.
        teacher: where the student's teacher is, see `load_student`.

    Raises:
        UserError: no such model, layer, loss or text.
    """
    check_probe(loss, init)
    started = time.perf_counter()
    where = pick_device(device)
    say(f"Loading {model} ...")
    subject = load_subject(model, where, init, num_experts, checkpoint, teacher)
    probed_layers = _checked_layers(layers, len(subject.student.banks()))
    rows = _rows(subject, text, max(1, max_tokens // document_tokens), fit_tokens)
    probed, fitted = sample_documents(rows, document_tokens, max_tokens, fit_tokens)
    use_kl = loss == "forward-kl" or (loss == "auto" and not subject.fresh)
    about = {
        "model": model,
        "teacher": subject.config.teacher.path,
        "conversion": f"{init}, all experts on" if subject.fresh else "student",
        "num_layers": len(subject.student.banks()),
        "num_experts": subject.student.config.num_experts,
        "document_tokens": document_tokens,
    }

    def keep(measured: dict[str, Any]) -> dict[str, Any]:
        found = {**about, **measured, "seconds": time.perf_counter() - started}
        write_json(out / "probe.json", found)
        return found

    try:
        # Before the work, so that a folder that cannot be had is told at once.
        out.mkdir(parents=True, exist_ok=True)
        say(f"probe: {len(probed)} documents; results go to {out}")
        found = keep(measure(subject, probed, fitted, probed_layers, use_kl=use_kl, keep=keep))
        (out / "probe.html").write_text(html_page(found), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--out: got {out}, expected a folder to write to ({error.strerror}); choose another"
        ) from error
    return found


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


def load_subject(  # noqa: PLR0917
    name: str,
    device: torch.device,
    init: str,
    num_experts: int,
    checkpoint: str,
    teacher: str | None,
) -> Subject:
    """The model that a user names, in float32 and frozen, with its teacher.

    Raises:
        UserError: there is none, or it cannot be converted as asked.
    """
    if is_student(name):
        loaded = load_student(name, device, checkpoint, teacher)
        if loaded.student.config.routing_rule().selection == "oracle":
            raise UserError(
                f"MODEL: got {name}, a student with router.selection = 'oracle', expected one with"
                " a gate: surprise reaches experts through it; probe its teacher instead"
            )
        # Differences of losses drown in bfloat16's rounding.
        wide = replace(loaded.config.teacher, dtype="float32")
        loaded = replace(loaded, config=replace(loaded.config, teacher=wide))
        loaded.student.float()
        dense = load_teacher_of(loaded, device)
        return Subject(
            student=loaded.student,
            teacher=dense,
            tokenizer=loaded.tokenizer,
            config=loaded.config,
            fresh=False,
        )
    if checkpoint != "newest":
        raise UserError(
            f"--checkpoint: got {name}, a dense model, expected a run; leave --checkpoint out"
        )
    refuse_for_dense(name, teacher)
    if name != "embedded":
        find_model(name, "MODEL")
    config = RunConfig()
    config = replace(
        config,
        teacher=replace(config.teacher, path=name, dtype="float32"),
        experts=replace(
            config.experts,
            init=init,
            num_experts=num_experts,
            gate_init="zeros",
            weighting="unit",
        ),
        train=replace(config.train, device=str(device), compile=False),
    )
    config = with_router(config, selection="top_k", objective="none", target_k=float(num_experts))
    validate(config)
    dense, tokenizer = load_dense(config.teacher, device)
    student = make_student(config, MlpInputs(dense, calibration_rows(config, tokenizer, device)))
    student.requires_grad_(False)
    return Subject(student=student, teacher=dense, tokenizer=tokenizer, config=config, fresh=True)


def _rows(
    subject: Subject, text: Path | None, num_documents: int, fit_tokens: int
) -> list[PackedRow]:
    """Text for as many documents and tokens to fit on, if there is as much."""
    data = replace(subject.config.data, row_tokens=min(subject.config.data.row_tokens, ROW_TOKENS))
    enough = num_documents * data.row_tokens + 2 * fit_tokens
    if text is None:
        return held_out_rows(data, subject.tokenizer, data.row_tokens, enough)
    return text_rows(text, subject.tokenizer, data, enough)


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


def _checked_layers(layers: Sequence[int], num_layers: int) -> list[int]:
    if not layers:
        return sorted({min(num_layers - 1, round(num_layers * share)) for share in DEPTHS})
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise UserError(
                f"--layers: got {layer}, expected 0 to {num_layers - 1}; leave it out for three"
            )
    return sorted(set(layers))


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
