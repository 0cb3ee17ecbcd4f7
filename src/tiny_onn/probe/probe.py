"""The verb `probe`: what surprise says about experts, against leave-one-out truth.

The truth of an expert for a token is the rise of the token's own loss without it
(`leave_one_out.py`). The text is held-out: the first `document_tokens` of each of the first
fragments are probed, later fragments fit the regressions that ask whether a quantity can be
predicted from the token.

Cost: `num_experts + 1` forward passes of the probed tokens through the layers from each probed one
up, and about five passes of the fitting tokens.

Legend: T tokens, D hidden, E experts.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny_onn.config.checks import check_probe
from tiny_onn.console import say
from tiny_onn.data.packing import PackedRow
from tiny_onn.data.rows import held_out_rows, text_rows
from tiny_onn.device import pick_device
from tiny_onn.errors import UserError
from tiny_onn.probe.measure import measure, sample_documents
from tiny_onn.probe.subject import Subject, load_subject
from tiny_onn.report.probe import html_page
from tiny_onn.runs.files import write_json

# Fragments that are sampled are at most this long, whatever a run's rows are.
ROW_TOKENS = 1024
# Where a layer is probed if none is named: shares of the depth.
DEPTHS = (0.13, 0.5, 0.87)


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


def _rows(
    subject: Subject, text: Path | None, num_documents: int, fit_tokens: int
) -> list[PackedRow]:
    """Text for as many documents and tokens to fit on, if there is as much."""
    data = replace(subject.config.data, row_tokens=min(subject.config.data.row_tokens, ROW_TOKENS))
    enough = num_documents * data.row_tokens + 2 * fit_tokens
    if text is None:
        return held_out_rows(data, subject.tokenizer, data.row_tokens, enough)
    return text_rows(text, subject.tokenizer, data, enough)


def _checked_layers(layers: Sequence[int], num_layers: int) -> list[int]:
    if not layers:
        return sorted({min(num_layers - 1, round(num_layers * share)) for share in DEPTHS})
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise UserError(
                f"--layers: got {layer}, expected 0 to {num_layers - 1}; leave it out for three"
            )
    return sorted(set(layers))
