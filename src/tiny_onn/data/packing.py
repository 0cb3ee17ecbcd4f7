"""The packing of tokenised documents into rows of a fixed length that keep document boundaries.

A row is filled greedily with documents in the order they come:

1. A document of one token is skipped and counted, because there is nothing to predict in it.
2. A document that fits is appended whole. A document that does not fit is split, and its rest
   begins the next row as a fragment of its own whose positions restart at 0.
3. A fragment of one token is never made. Where a split would leave one behind, the row gives up its
   last slot (the rest is then two tokens long); where only one slot is left, it is padded.
4. Padding is a fragment of its own at the end of the row, so that no text attends to it.

At most two slots of a row are padding, and only where rule 3 needs them; the last row, closed by
`finish`, may have more. A split costs one prediction, the first token of the rest. Without padding,
the rows are the documents one after another. Memory holds the current row and the documents that
are not placed yet.

Shapes: "tokens" is T, a row's length; a row is a batch of one.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tiny_onn.errors import UserError

IGNORED_LABEL = -100
_MIN_FRAGMENT_TOKENS = 2


class Origin(NamedTuple):
    """The place that a fragment's tokens come from."""

    source: str
    """The file, hub dataset or part of the embedded text; empty if it is unknown."""
    document: int
    """The document's number in the source, from 0."""
    token: int
    """The fragment's first token, counted in the document."""


NO_ORIGIN = Origin("", 0, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """A row of fragments, with the boundaries and masks that keep the fragments apart."""

    input_ids: Int[Tensor, "1 tokens"]
    """Token ids, int64."""
    position_ids: Int[Tensor, "1 tokens"]
    """Position of each token in its fragment, from 0."""
    cu_seqlens: Int[Tensor, " documents_plus_one"]
    """Fragment boundaries, int32, which are 0 and the end of each fragment; padding is the last."""
    max_seqlen: int
    """Length of the longest fragment, padding included."""
    labels: Int[Tensor, "1 tokens"]
    """The next token of the same fragment, -100 at its last token and on padding."""
    loss_mask: Bool[Tensor, "1 tokens"]
    """True where there is a label."""
    router_mask: Bool[Tensor, "1 tokens"]
    """False on the first token of each fragment (the attention sink) and on padding."""
    origins: tuple[Origin, ...] = ()
    """The origin of each fragment in order, padding left out."""
    number: int = -1
    """The row's place among all rows of its stream, from 0; -1 if it is unknown."""
    teacher_states: Shaped[Tensor, "tokens hidden"] | None = None
    """The teacher's last hidden states as a cache stores them; None: the teacher computes them."""
    teacher_scales: Float[Tensor, "tokens blocks"] | None = None
    """The scales of each token's stored states, if they are 8-bit integers."""

    @property
    def num_documents(self) -> int:
        """The number of fragments in the row, padding left out."""
        return int(self.loss_mask[0, self.cu_seqlens[:-1].long()].sum())

    def to(self, device: torch.device | str) -> "PackedRow":
        """Return the same row with every tensor on `device`."""
        return PackedRow(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            max_seqlen=self.max_seqlen,
            labels=self.labels.to(device),
            loss_mask=self.loss_mask.to(device),
            router_mask=self.router_mask.to(device),
            origins=self.origins,
            number=self.number,
            teacher_states=_on(self.teacher_states, device),
            teacher_scales=_on(self.teacher_scales, device),
        )


def uncounted(row: PackedRow) -> PackedRow:
    """Return a row of the same text in which no token counts."""
    masks = {name: torch.zeros_like(row.loss_mask) for name in ("loss_mask", "router_mask")}
    return replace(row, **masks)


def _on(tensor: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def build_row(
    fragments: Sequence[Sequence[int]],
    *,
    row_tokens: int,
    pad_token_id: int,
    origins: Sequence[Origin] = (),
) -> PackedRow:
    """Return the row of `fragments` (each of 2 tokens or more) in order, padded to `row_tokens`."""
    lengths = [len(fragment) for fragment in fragments]
    num_padding = row_tokens - sum(lengths)
    assert min(lengths) >= _MIN_FRAGMENT_TOKENS
    assert num_padding >= 0
    token_ids = [token for fragment in fragments for token in fragment]
    labels = [label for fragment in fragments for label in (*list(fragment)[1:], IGNORED_LABEL)] + [
        IGNORED_LABEL
    ] * num_padding
    if num_padding:
        lengths.append(num_padding)
    boundaries = torch.tensor([0, *lengths]).cumsum(0)
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    router_mask = position_ids > 0
    router_mask[row_tokens - num_padding :] = False
    # Numpy reads a list several times as fast as torch.
    labels_1T = torch.from_numpy(np.array([labels]))
    return PackedRow(
        input_ids=torch.from_numpy(np.array([token_ids + [pad_token_id] * num_padding])),
        position_ids=position_ids[None],
        cu_seqlens=boundaries.int(),
        max_seqlen=max(lengths),
        labels=labels_1T,
        loss_mask=labels_1T != IGNORED_LABEL,
        router_mask=router_mask[None],
        origins=tuple(origins),
    )


def joined(rows: Sequence[PackedRow]) -> PackedRow:
    """Return one row that holds the fragments of several rows in order.

    Their origins are kept if only the last row has padding: padding between fragments has none.
    """
    bounds, offset = [torch.zeros(1, dtype=torch.int32, device=rows[0].cu_seqlens.device)], 0
    for row in rows:
        bounds.append(row.cu_seqlens[1:] + offset)
        offset += row.labels.numel()
    known = all(len(row.origins) == len(row.cu_seqlens) - 1 for row in rows[:-1])
    return PackedRow(
        input_ids=torch.cat([row.input_ids for row in rows], dim=1),
        position_ids=torch.cat([row.position_ids for row in rows], dim=1),
        cu_seqlens=torch.cat(bounds),
        max_seqlen=max(row.max_seqlen for row in rows),
        labels=torch.cat([row.labels for row in rows], dim=1),
        loss_mask=torch.cat([row.loss_mask for row in rows], dim=1),
        router_mask=torch.cat([row.router_mask for row in rows], dim=1),
        origins=tuple(origin for row in rows for origin in row.origins) if known else (),
    )


class Packer:
    """A packer of documents that come one at a time, resumable between any two rows.

    The caller adds a document by `add`, takes rows by `pop` until it returns None, and goes on with
    the next document; `finish` closes the last row.

    Args:
        row_tokens: the length of every row, at least 3 (a split leaves two tokens on both sides).
        pad_token_id: the token id that is written into unused slots.

    Raises:
        UserError: `row_tokens` is less than 3.
    """

    def __init__(self, row_tokens: int, pad_token_id: int) -> None:
        if row_tokens < 3:
            raise UserError(f"data.row_tokens: got {row_tokens}, expected at least 3; raise it")
        self.row_tokens = row_tokens
        self.pad_token_id = pad_token_id
        self.num_documents = 0
        self.num_skipped = 0
        self.num_tokens = 0
        self.num_padding = 0
        self._row: list[tuple[list[int], Origin]] = []
        self._pending: deque[tuple[list[int], Origin]] = deque()
        # This counts the tokens of the first pending document that are already placed.
        self._offset = 0

    def add(self, document: Sequence[int], origin: Origin = NO_ORIGIN) -> None:
        """Queue the token ids of one document; skip and count a document of fewer than 2 tokens.

        The rows that hold the document's fragments name its `origin`.
        """
        if len(document) < _MIN_FRAGMENT_TOKENS:
            self.num_skipped += 1
            return
        self.num_documents += 1
        self.num_tokens += len(document)
        self._pending.append((list(document), origin))

    def pop(self) -> PackedRow | None:
        """Return the next full row, or None if the documents added so far do not fill one."""
        while self._pending:
            document, origin = self._pending[0]
            room = self._room()
            rest = len(document) - self._offset
            take = min(room, rest)
            if rest - take == 1:
                take -= 1
            if take < _MIN_FRAGMENT_TOKENS:
                return self._close()
            fragment = document[self._offset : self._offset + take]
            self._row.append((fragment, origin._replace(token=origin.token + self._offset)))
            self._offset += take
            if self._offset == len(document):
                self._pending.popleft()
                self._offset = 0
            if self._room() < _MIN_FRAGMENT_TOKENS:
                return self._close()
        return None

    def finish(self) -> PackedRow | None:
        """Return the last, padded row, or None if nothing is left; call it when `pop` gave None."""
        assert not self._pending
        return self._close() if self._row else None

    def state_dict(self) -> dict[str, Any]:
        """Return everything on which the next rows depend, as JSON values."""
        pending = [(list(document), origin) for document, origin in self._pending]
        if pending:
            document, origin = pending[0]
            rest = origin._replace(token=origin.token + self._offset)
            pending[0] = (document[self._offset :], rest)
        return {
            "row": [[list(fragment), list(origin)] for fragment, origin in self._row],
            "pending": [[document, list(origin)] for document, origin in pending],
            "num_documents": self.num_documents,
            "num_skipped": self.num_skipped,
            "num_tokens": self.num_tokens,
            "num_padding": self.num_padding,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was called."""
        self._row = [(list(ids), Origin(*origin)) for ids, origin in state["row"]]
        self._pending = deque((list(ids), Origin(*origin)) for ids, origin in state["pending"])
        self._offset = 0
        self.num_documents = state["num_documents"]
        self.num_skipped = state["num_skipped"]
        self.num_tokens = state["num_tokens"]
        self.num_padding = state["num_padding"]

    @property
    def num_rows(self) -> int:
        """The number of rows that are closed."""
        waiting = sum(len(document) for document, _ in self._pending) - self._offset
        open_tokens = self.row_tokens - self._room()
        return (self.num_tokens + self.num_padding - waiting - open_tokens) // self.row_tokens

    def _room(self) -> int:
        return self.row_tokens - sum(len(fragment) for fragment, _ in self._row)

    def _close(self) -> PackedRow:
        number = self.num_rows
        self.num_padding += self._room()
        row = build_row(
            [fragment for fragment, _ in self._row],
            row_tokens=self.row_tokens,
            pad_token_id=self.pad_token_id,
            origins=[origin for _, origin in self._row],
        )
        self._row = []
        return replace(row, number=number)


def pack(
    documents: Iterable[Sequence[int]],
    *,
    row_tokens: int,
    pad_token_id: int,
    origins: Iterable[Origin] | None = None,
) -> Iterator[PackedRow]:
    """Yield all rows of `documents`, the last one padded; `origins` are theirs, if known.

    Raises:
        UserError: `row_tokens` is less than 3.
    """
    packer = Packer(row_tokens, pad_token_id)
    known = itertools.repeat(NO_ORIGIN) if origins is None else origins
    for document, origin in zip(documents, known, strict=False):
        packer.add(document, origin)
        while (row := packer.pop()) is not None:
            yield row
    if (row := packer.finish()) is not None:
        yield row
