"""The choice of the packed rows for calibration, training and evaluation."""

import itertools
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from tiny_onn.config.routing_checks import has_budget
from tiny_onn.config.schema import DataConfig, RunConfig
from tiny_onn.data.packing import Origin, PackedRow, pack
from tiny_onn.data.shuffling import ShuffledStream
from tiny_onn.data.sources import read_documents, reworded_for_text
from tiny_onn.data.stream import TokenStream
from tiny_onn.data.tokens import DocumentTokens
from tiny_onn.errors import UserError


def eval_row_tokens(config: DataConfig) -> int:
    """Return the number of tokens in a row that is evaluated on."""
    return max(config.eval_row_tokens, config.row_tokens)


def held_out_rows(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, row_tokens: int, max_tokens: int
) -> list[PackedRow]:
    """Return the first `max_tokens // row_tokens` held-out rows, at least one, always the same.

    If the held-out text is shorter, there are fewer rows and the last one is padded.

    Raises:
        UserError: `TokenStream` refuses a source or a setting.
    """
    stream = TokenStream(config, tokenizer, split="held_out", seed=0, row_tokens=row_tokens)
    return list(itertools.islice(stream, max(1, max_tokens // row_tokens)))


def text_rows(
    path: Path, tokenizer: PreTrainedTokenizerBase, data: DataConfig, max_tokens: int
) -> list[PackedRow]:
    """Return the text of a file or folder as packed rows, up to `max_tokens` tokens of it.

    Raises:
        UserError: there is no such text, or it has no document of two tokens or more.
    """
    tokens = DocumentTokens(tokenizer)
    read, again = itertools.tee(read_documents(str(path), data.text_field))
    packed = pack(
        (tokens.ids([tokens.rendered(document)])[0] for document in read),
        row_tokens=data.row_tokens,
        pad_token_id=0,
        origins=(Origin(document.source, document.index, 0) for document in again),
    )
    try:
        rows = list(islice(packed, max(1, max_tokens // data.row_tokens)))
    except UserError as error:
        raise UserError(reworded_for_text(str(error))) from error
    if not rows:
        raise UserError(
            f"--text: got {path} without a document of two tokens or more, expected some text; "
            "nothing can be predicted in one token"
        )
    return rows


def evenly(rows: Sequence[PackedRow], number: int) -> list[PackedRow]:
    """Return so many of the rows, or all if they are fewer, at equal distances."""
    number = min(number, len(rows))
    return [rows[i * len(rows) // number] for i in range(number)]


def calibration_rows(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> list[PackedRow]:
    """Return the first training rows, which hold `experts.calibration_tokens` tokens or more.

    The list is empty if the conversion reads no text.
    """
    rows = islice(training_rows(config, tokenizer), num_calibration_rows(config))
    return [row.to(device) for row in rows] if needs_text(config) else []


def num_calibration_rows(config: RunConfig) -> int:
    """Return the number of packed rows that hold the calibration tokens."""
    return -(-config.experts.calibration_tokens // config.data.row_tokens)


def training_rows(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """Return the endless stream of training rows."""
    data, options = config.data, {"seed": config.train.seed, "row_tokens": config.data.row_tokens}
    if (num_rows := data.shuffle_tokens // data.row_tokens) > 1:
        return ShuffledStream(data, tokenizer, num_rows=num_rows, **options)
    return TokenStream(data, tokenizer, split="train", **options)


def needs_text(config: RunConfig) -> bool:
    """Return True if the conversion or the blockwise stage reads calibration text."""
    experts = config.experts
    return (
        experts.init in ("importance", "coactivation", "learned")
        or (experts.init == "cluster" and experts.num_shared > 0)
        or experts.keep_massive
        or config.experts.gate_init == "ridge"
        or config.router.selection == "static"
        or has_budget(config.router)
        or config.experts.compensation == "mean"
        or config.experts.refit
        or config.train.blockwise_tokens > 0
    )
