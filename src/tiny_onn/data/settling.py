"""The text on which a budget's evaluation thresholds are settled.

The mean k at one threshold differs between documents far more than between tokens: on documentation
of twenty projects its standard deviation over documents is about 0.9 experts of 16. A threshold is
therefore settled on fragments of many documents. None of them is trained on, because a taught gate
is surer on the text that taught it.

Tokens with more text before them activate fewer experts. On rows of 4,096 tokens, trained students
of SmolLM2-135M with a target of 16 had a mean k of 17.3 in the first 16 tokens of a document, 16.25
from token 64, 15.85 from 256, 15.6 from 1,024 and 15.35 from 2,048 on, where a quarter of all
tokens are. Thresholds of fragments of 1,024 tokens were about 1 % too high. Long fragments of few
documents give thresholds that are wrong by chance. So fragments are as long as leaves
`LEAST_FRAGMENTS` of them, and where one goes on with a document, its first quarter is read and not
counted.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

import torch
from transformers import PreTrainedTokenizerBase

from tiny_onn.config.routing_checks import has_budget
from tiny_onn.config.schema import RunConfig
from tiny_onn.console import say
from tiny_onn.data.packing import PackedRow, joined
from tiny_onn.data.rows import eval_row_tokens, num_calibration_rows, training_rows
from tiny_onn.data.stream import TokenStream
from tiny_onn.errors import UserError

SHORTEST, LONGEST = 256, 4096
LEAST_FRAGMENTS = 32
# The share of a fragment that is not counted where it goes on with a document.
LEAD = 1 / 4
# The fragments are spread over so many times their number.
SPREAD = 16


def threshold_rows(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> list[PackedRow]:
    """Return rows of fragments on which a budget's thresholds are settled; none without a budget.

    They hold about `data.settling_tokens` tokens of the settling split or, if it holds no text, of
    the training text behind the calibration rows.
    """
    if not has_budget(config.router):
        return []
    if config.data.settling_fraction:
        try:
            rows = _settling_rows(config, tokenizer)
        except UserError as error:
            if not str(error).startswith("data.settling_fraction"):
                raise
            say(
                f"data.settling_fraction: {config.data.settling_fraction:g} leaves no document, so"
                " that budgets are settled on training text; raise it or add text"
            )
        else:
            return [row.to(device) for row in rows]
    stream = training_rows(config, tokenizer)
    read, wanted = num_calibration_rows(config), -(-_tokens(config) // config.data.row_tokens)
    rows = list(islice(stream, read, read + wanted))
    return [row.to(device) for row in rows]


def _tokens(config: RunConfig) -> int:
    """Return the number of tokens to settle on."""
    return config.data.settling_tokens or config.experts.calibration_tokens


def _settling_rows(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[PackedRow]:
    """Return fragments of the settling split, in rows of about the length of evaluation's."""
    row_tokens, tokens = eval_row_tokens(config.data), _tokens(config)
    length = fragment_tokens(tokens, row_tokens)
    stream = TokenStream(config.data, tokenizer, split="settling", seed=0, row_tokens=length)
    taken = spread(stream, -(-tokens // length))
    size = max(1, row_tokens // length)
    parts = [taken[start : start + size] for start in range(0, len(taken), size)]
    # A row of training text goes on with a document only where it begins.
    return [joined([part[0], *map(without_lead, part[1:])]) for part in parts]


def fragment_tokens(tokens: int, row_tokens: int) -> int:
    """Return the length of the fragments that so many tokens of text are cut into, for such rows.

    It is the largest power of two that leaves `LEAST_FRAGMENTS`, from `SHORTEST` to `LONGEST`, and
    no longer than a row.
    """
    most = max(SHORTEST, tokens // LEAST_FRAGMENTS)
    return min(2 ** (most.bit_length() - 1), LONGEST, row_tokens)


def without_lead(row: PackedRow) -> PackedRow:
    """Return the row without its lead: where it begins within a document, that part is not counted.

    The lead is a quarter of the row, or what the row has of the document if that is less.
    """
    if row.origins[0].token == 0:
        return row
    mask = row.router_mask.clone()
    mask[:, : min(int(LEAD * mask.shape[1]), int(row.cu_seqlens[1]))] = False
    return replace(row, router_mask=mask)


def spread(rows: Iterable[PackedRow], number: int) -> list[PackedRow]:
    """Return so many of the rows, or all if they are fewer, spread over their sources.

    Every n-th row is taken of `SPREAD` times as many, sorted by their source, so that each source
    has its share of the text (systematic sampling).
    """
    first = list(islice(rows, SPREAD * number))
    first.sort(key=lambda row: row.origins[0].source)
    every = max(1.0, len(first) / number)
    return [first[int(i * every)] for i in range(min(number, len(first)))]
