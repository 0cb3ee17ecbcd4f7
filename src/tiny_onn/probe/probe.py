"""The verb `probe`: every kind of surprise compared with the leave-one-out truth.

The truth of an expert for a token is how much the token's own loss rises without the expert
(`leave_one_out.py`). The text is held-out text: the first `document_tokens` of each of the first
fragments are probed, and later fragments serve to fit the regressions that test whether a quantity
can be predicted from the token.

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
from tiny_onn.report.terminal import counted
from tiny_onn.runs.files import write_json

# Sampled fragments have at most this many tokens, however long the rows of a run are.
ROW_TOKENS = 1024
# The layers that are probed if none is named, as shares of the depth.
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
    """Probe a model, write `probe.json` and `probe.html` to a folder, and return the results.

    All layers advance together, document by document. After every tenth of the documents the
    results so far are written with `complete` false, so that an interrupted probe keeps them.

    Args:
        model: a run folder, a student's folder, `embedded`, a dense model's folder or a hub id. A
            dense model is converted for the probe, with all experts active.
        out: the folder for the results, which is created if it is missing.
        layers: the layers to probe; empty: an early, a middle and a late one.
        loss: the loss of a token, one of `PROBE_LOSSES`. `auto`: the KL to the teacher, but the
            next-token loss for a fresh conversion, whose KL is 0 and therefore at its minimum.
        text: a file or folder of text; None: held-out text.
        init: the partition of a dense model.
        num_experts: the number of experts per layer of a dense model.
        device: the device to run on.
        max_tokens: the maximum number of tokens to probe.
        document_tokens: the maximum number of tokens to read of each document.
        fit_tokens: the maximum number of tokens to fit regressions on; 0: none are fitted.
        checkpoint: the choice among a run's students, see `load_student`.
        teacher: the place of the student's teacher, see `load_student`.

    Raises:
        UserError: there is no such model, layer, loss or text.
    """
    check_probe(loss, init)
    started = time.perf_counter()
    say(f"Loading {model} ...")
    subject = load_subject(model, pick_device(device), init, num_experts, checkpoint, teacher)
    probed_layers = _checked_layers(layers, len(subject.student.banks()))
    rows = _rows(subject, text, max(1, max_tokens // document_tokens), fit_tokens)
    probed, fitted = sample_documents(rows, document_tokens, max_tokens, fit_tokens)
    use_kl = loss == "forward-kl" or (loss == "auto" and not subject.fresh)
    description = {
        "model": model,
        "teacher": subject.config.teacher.path,
        "conversion": f"{init}, all experts on" if subject.fresh else "student",
        "num_layers": len(subject.student.banks()),
        "num_experts": subject.student.config.num_experts,
        "document_tokens": document_tokens,
    }

    def keep(measured: dict[str, Any]) -> dict[str, Any]:
        result = {**description, **measured, "seconds": time.perf_counter() - started}
        write_json(out / "probe.json", result)
        return result

    try:
        # The folder is created before the work, so that a mistake in its name is reported at once.
        out.mkdir(parents=True, exist_ok=True)
        say(f"probe: {counted(len(probed), 'document')}; results go to {out}")
        result = keep(measure(subject, probed, fitted, probed_layers, use_kl=use_kl, keep=keep))
        (out / "probe.html").write_text(html_page(result), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--out: got {out}, expected a folder to write to ({error.strerror}); choose another"
        ) from error
    return result


def _rows(
    subject: Subject, text: Path | None, num_documents: int, fit_tokens: int
) -> list[PackedRow]:
    """Read text for this many documents and tokens to fit on, or less if there is less text."""
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
                f"--layers: got {layer}, expected 0 to {num_layers - 1}; leave it out for an early,"
                " a middle and a late layer"
            )
    return sorted(set(layers))
