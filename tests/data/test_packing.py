"""Packing: order, boundaries, labels, masks and resumption."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny_onn.data.packing import PackedRow, Packer, pack
from tiny_onn.errors import UserError

PAD = 999
# Distinct token ids would hide nothing, repeated ones could: keep the alphabet small but never PAD.
DOCUMENTS = st.lists(st.lists(st.integers(0, 9), max_size=20), max_size=12)
ROW_TOKENS = st.integers(3, 13)


def fragments_of(row: PackedRow) -> list[list[int]]:
    """The row's text fragments, found from `cu_seqlens` and the padding id alone."""
    tokens = row.input_ids[0].tolist()
    parts = [tokens[start:end] for start, end in pairwise(row.cu_seqlens.tolist())]
    return [part for part in parts if part[0] != PAD]


def equal(left: PackedRow | None, right: PackedRow | None) -> bool:
    if left is None or right is None:
        return left is right
    plain = (left.max_seqlen, left.number) == (right.max_seqlen, right.number)
    return plain and all(
        torch.equal(getattr(left, name), getattr(right, name))
        for name in (
            "input_ids", "position_ids", "cu_seqlens", "labels", "loss_mask", "router_mask",
        )
    )  # fmt: skip


def test_a_row_reads_as_its_fields_say():
    first, second = pack([[1, 2, 3], [7], [4, 5, 6, 7, 8]], row_tokens=6, pad_token_id=PAD)
    assert first.input_ids.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert first.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert first.labels.tolist() == [[2, 3, -100, 5, 6, -100]]
    assert first.cu_seqlens.tolist() == [0, 3, 6]
    assert (first.num_documents, first.max_seqlen) == (2, 3)
    assert second.input_ids.tolist() == [[7, 8, PAD, PAD, PAD, PAD]]
    assert second.position_ids.tolist() == [[0, 1, 0, 1, 2, 3]]
    assert second.labels.tolist() == [[8, -100, -100, -100, -100, -100]]
    assert second.cu_seqlens.tolist() == [0, 2, 6]
    assert second.loss_mask.tolist() == [[True, False, False, False, False, False]]
    assert second.router_mask.tolist() == [[False, True, False, False, False, False]]
    assert (second.num_documents, second.max_seqlen) == (1, 4)
    assert first.input_ids.dtype == first.labels.dtype == torch.int64
    assert first.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize(
    ("documents", "rows"),
    [
        ([[1, 2, 3], [4, 5]], [[[1, 2, 3]], [[4, 5]]]),  # one slot left: padded
        ([[1, 2, 3, 4, 5]], [[[1, 2, 3]], [[4, 5]]]),  # the rest would be one token
        ([[1, 2], [3, 4, 5]], [[[1, 2]], [[3, 4, 5]]]),  # both at once: two slots padded
        ([[1, 2], [3, 4, 5, 6]], [[[1, 2], [3, 4]], [[5, 6]]]),
    ],
)
def test_no_fragment_of_one_token_is_made(documents: list[list[int]], rows: list[list[list[int]]]):
    packed = list(pack(documents, row_tokens=4, pad_token_id=PAD))
    assert [fragments_of(row) for row in packed] == rows


@given(DOCUMENTS, ROW_TOKENS)
def test_every_token_appears_once_and_in_order(documents: list[list[int]], row_tokens: int):
    rows = list(pack(documents, row_tokens=row_tokens, pad_token_id=PAD))
    packed = [token for row in rows for part in fragments_of(row) for token in part]
    assert packed == [token for doc in documents if len(doc) >= 2 for token in doc]
    # No fragment crosses from one document into the next.
    lengths = [len(part) for row in rows for part in fragments_of(row)]
    fragments = iter(lengths)
    for document in documents:
        left = len(document) if len(document) >= 2 else 0
        while left:
            left -= next(fragments)
            assert left >= 0
    assert next(fragments, None) is None
    assert all(length >= 2 for length in lengths)


@given(DOCUMENTS, ROW_TOKENS)
def test_labels_masks_and_positions_follow_the_fragments(
    documents: list[list[int]], row_tokens: int
):
    rows = list(pack(documents, row_tokens=row_tokens, pad_token_id=PAD))
    for index, row in enumerate(rows):
        bounds = row.cu_seqlens.tolist()
        assert (bounds[0], bounds[-1]) == (0, row_tokens)
        assert row.max_seqlen == max(end - start for start, end in pairwise(bounds))
        assert row.num_documents == len(fragments_of(row))
        tokens, labels = row.input_ids[0].tolist(), row.labels[0].tolist()
        for start, end in pairwise(bounds):
            padding = tokens[start] == PAD
            for t in range(start, end):
                assert row.position_ids[0, t] == t - start
                has_label = not padding and t + 1 < end
                assert labels[t] == (tokens[t + 1] if has_label else -100)
                assert bool(row.loss_mask[0, t]) == has_label
                assert bool(row.router_mask[0, t]) == (not padding and t > start)
        if index < len(rows) - 1:
            assert tokens.count(PAD) <= 2


@given(DOCUMENTS, ROW_TOKENS)
def test_counts_add_up(documents: list[list[int]], row_tokens: int):
    packer = Packer(row_tokens, PAD)
    rows = []
    for document in documents:
        packer.add(document)
    while (row := packer.pop()) is not None:
        rows.append(row)
    if (row := packer.finish()) is not None:
        rows.append(row)
    assert [row.number for row in rows] == list(range(len(rows)))
    assert packer.num_rows == len(rows)
    assert packer.num_documents + packer.num_skipped == len(documents)
    assert packer.num_tokens + packer.num_padding == len(rows) * row_tokens
    assert packer.num_padding == sum(int((row.input_ids == PAD).sum()) for row in rows)


@given(DOCUMENTS, ROW_TOKENS, st.integers(0, 60))
def test_a_resumed_packer_continues_exactly(documents: list[list[int]], row_tokens: int, stop: int):
    # Two pops per document: fewer than long ones need, so that documents queue up.
    script = [step for document in documents for step in (document, None, None)]

    def run(packer: Packer, steps: list[list[int] | None]) -> list[PackedRow | None]:
        return [packer.pop() if step is None else packer.add(step) for step in steps]

    whole = Packer(row_tokens, PAD)
    expected = run(whole, script)
    before = Packer(row_tokens, PAD)
    first = run(before, script[:stop])
    after = Packer(row_tokens, PAD)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    second = run(after, script[stop:])
    assert all(map(equal, first + second, expected))
    assert after.state_dict() == whole.state_dict()


def test_rows_move_between_devices():
    (row,) = pack([[1, 2, 3]], row_tokens=4, pad_token_id=PAD)
    moved = row.to("meta")
    assert moved.input_ids.device.type == moved.router_mask.device.type == "meta"
    assert moved.cu_seqlens.shape == row.cu_seqlens.shape
    assert equal(row.to("cpu"), row)


def test_too_short_a_row_is_refused():
    with pytest.raises(UserError, match=r"data\.row_tokens: got 2, expected at least 3"):
        Packer(2, PAD)
