"""Measurements for the report that need the student itself: its view of single tokens.

The view holds a held-out passage token by token, with the active experts of every layer, and how
often two experts of a layer serve the same token. `view.json` in the run folder keeps the view, so
that a page which is made again has the same bytes.

Legend: T tokens, E experts, L layers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_onn.config.schema import LossConfig
from tiny_onn.console import status
from tiny_onn.data.packing import PackedRow, build_row
from tiny_onn.evaluation.compare import document_lengths
from tiny_onn.evaluation.evaluate import load_for_eval
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import head_of, last_hidden_states
from tiny_onn.model.experts import recorded_routings
from tiny_onn.model.student import TinyOnnForCausalLM, eval_mode
from tiny_onn.ops.distillation_loss import distill
from tiny_onn.ops.loss_chunks import loss_chunk_tokens
from tiny_onn.runs.files import write_json
from tiny_onn.runs.students import choose

VIEW_NAME = "view.json"
# The layout of the file; a view with another layout is measured again.
FORMAT = 1
# The number of held-out tokens that are read, and of tokens among them that are shown one by one.
VIEW_TOKENS, PASSAGE_TOKENS = 512, 192
# The maximum number of cells in all co-activation tables together.
TABLE_CELLS = 40_000


def kept_view(run: Path) -> dict[str, Any] | None:
    """Return the view that the run folder keeps of its newest student, or None without one."""
    try:
        view = json.loads((run / VIEW_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(view, dict) and view.get("format") == FORMAT
    return view if same and view.get("step") == choose(run, "newest").step else None


def view_of_run(run: Path, device: str, teacher: str | None = None) -> dict[str, Any]:
    """Return the view of a run's newest student, from its folder or else measured and kept there.

    Args:
        run: the run folder.
        device: the device to measure on.
        teacher: the dense model, if it is no longer in its recorded place.

    Raises:
        UserError: the student, its teacher or its text cannot be had.
    """
    kept = kept_view(run)
    if kept is not None:
        return kept
    bench = load_for_eval(
        str(run), text=None, device=device, max_tokens=VIEW_TOKENS, teacher=teacher
    )
    loaded = bench.loaded
    with status("Measuring single tokens"):
        view = measure_view(
            loaded.student,
            bench.dense,
            loaded.tokenizer,
            list(bench.passages),
            loaded.config.loss,
        )
    return keep_view(run, view)


def keep_view(run: Path, view: dict[str, Any]) -> dict[str, Any]:
    """Write a view of a run's newest student to its folder, and return what was written.

    Args:
        run: the run folder.
        view: the view, as `measure_view` returns it.

    Raises:
        UserError: the folder cannot be written.
    """
    written = {"format": FORMAT, "step": choose(run, "newest").step, **view}
    write_json(run / VIEW_NAME, written)
    return written


@torch.no_grad()
def measure_view(
    student: TinyOnnForCausalLM,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PackedRow],
    loss: LossConfig,
) -> dict[str, Any]:
    """Measure single tokens by one forward pass of both models over the beginning of the rows.

    Args:
        student: the student, at the budget to measure.
        teacher: the dense model.
        tokenizer: the tokenizer of both models.
        rows: held-out text; whole documents of the first row, about `VIEW_TOKENS`, are read.
        loss: the settings of the loss, for the number of tokens whose logits exist at once.

    Returns:
        `num_experts`, `num_tokens`, `passage` (lists over tokens: `text`; `kl`, `student_nll` and
        `teacher_nll` in nats; `k`, the mean over layers; and `active`, the active experts of each
        layer as a hexadecimal number whose bit e is expert e) and `coactivation` (for each layer
        the correlation of every two experts over tokens, in percent).
    """
    row = _beginning(rows[0]).to(student.device)
    with eval_mode(student), recorded_routings(student.banks()) as routings:
        hidden_TD = last_hidden_states(student, row.input_ids, **packed_kwargs(row))[0]
    values = distill(
        hidden_TD,
        last_hidden_states(teacher, row.input_ids, **packed_kwargs(row))[0].to(hidden_TD.device),
        head_of(student),
        head_of(teacher),
        row.labels[0],
        divergence="forward_kl",
        temperature=1.0,
        jsd_beta=loss.jsd_beta,
        chunk_tokens=loss_chunk_tokens(loss, head_of(student).weight),
    )
    active_LTE = torch.stack([routing.active for routing in routings]).cpu()
    begin, end = _passage(row)
    part = slice(begin, end)
    ids = row.input_ids[0, part].tolist()
    per_token = {
        "kl": values.forward_kl,
        "student_nll": values.student_nll,
        "teacher_nll": values.teacher_nll,
    }
    passage: dict[str, Any] = {"text": [tokenizer.decode([token]) for token in ids]}
    passage |= {name: _short(value_T[part]) for name, value_T in per_token.items()}
    passage["k"] = _short(active_LTE[:, part].sum(-1).float().mean(0))
    passage["active"] = [
        [_bits(active_E.tolist()) for active_E in token_LE]
        for token_LE in active_LTE[:, part].unbind(1)
    ]
    counted_LTE = active_LTE[:, row.router_mask[0].cpu()]
    return {
        "num_experts": active_LTE.shape[-1],
        "num_tokens": counted_LTE.shape[1],
        "passage": passage,
        "coactivation": _coactivation(counted_LTE),
    }


def correlation(
    active_TE: Bool[Tensor, "tokens experts"],
) -> Float[Tensor, "experts experts"]:
    """Return the correlation over tokens of the activity of every two experts.

    It is 0 for an expert that is active for every token or for none.
    """
    x_TE = active_TE.double()
    centred_TE = x_TE - x_TE.mean(0)
    norm_E = centred_TE.norm(dim=0)
    scaled_TE = centred_TE / norm_E.where(norm_E > 0, 1.0)
    return scaled_TE.T @ scaled_TE


def _coactivation(active_LTE: Bool[Tensor, "layers tokens experts"]) -> list[dict[str, Any]]:
    num_layers, _, num_experts = active_LTE.shape
    most = max(1, min(num_layers, TABLE_CELLS // num_experts**2))
    step = (num_layers - 1) / max(1, most - 1)
    layers = [round(i * step) for i in range(most)] if most > 1 else [num_layers // 2]
    return [
        {
            "layer": layer,
            "phi_percent": (100 * correlation(active_LTE[layer])).round().int().tolist(),
        }
        for layer in layers
    ]


def _beginning(row: PackedRow) -> PackedRow:
    """Return the row's first documents up to `VIEW_TOKENS`, the last one perhaps cut short."""
    fragments, start, left = [], 0, VIEW_TOKENS
    for length in document_lengths(row)[: row.num_documents]:
        taken = min(length, left)
        if taken < 2:
            break
        fragments.append(row.input_ids[0, start : start + taken].tolist())
        start, left = start + length, left - taken
    return build_row(fragments, row_tokens=sum(map(len, fragments)), pad_token_id=0)


def _passage(row: PackedRow) -> tuple[int, int]:
    """Return the bounds of the passage to show.

    It is the first document of at least 2/3 of `PASSAGE_TOKENS`, or else the longest document.
    """
    lengths = document_lengths(row)
    long = [n for n, length in enumerate(lengths) if 3 * length >= 2 * PASSAGE_TOKENS]
    number = long[0] if long else lengths.index(max(lengths))
    begin = sum(lengths[:number])
    return begin, begin + min(lengths[number], PASSAGE_TOKENS)


def _short(values_T: Float[Tensor, " tokens"]) -> list[float]:
    return [float(f"{value:.4g}") for value in values_T.tolist()]


def _bits(active: Sequence[bool]) -> str:
    return f"{sum(1 << expert for expert, on in enumerate(active) if on):x}"
