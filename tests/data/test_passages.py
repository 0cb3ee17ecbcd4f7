"""Text to evaluate on: read anew each time, only as far as it is needed, in windows or packed."""

from collections import Counter

import pytest
import torch

from tiny import make_documents, make_tokenizer, write_corpus
from tiny_onn.config.schema import DataConfig
from tiny_onn.data.packing import Origin
from tiny_onn.data.passages import Passages, domain_of, held_out_passages, text_passages
from tiny_onn.data.rows import held_out_rows
from tiny_onn.errors import UserError

ROW = 16


def passages(lengths, **changes):
    """Passages of random documents, and a list that gets the number of each document read."""
    read = []
    documents = make_documents(lengths)

    def take():
        for number, ids in enumerate(documents):
            read.append(number)
            yield ids, Origin("x", number, 0)

    options = {"row_tokens": ROW, "stride": None, "max_tokens": 0} | changes
    return Passages(documents=take, name="x: got", sources=("x",), **options), documents, read


def test_without_a_stride_rows_are_those_that_the_run_evaluates_on(tmp_path):
    config = DataConfig(
        sources=(str(write_corpus(tmp_path / "corpus")),), row_tokens=64, held_out_fraction=0.5
    )
    tokenizer = make_tokenizer()
    expected = held_out_rows(config, tokenizer, 64, 300)
    text = held_out_passages(config, tokenizer, stride=None, max_tokens=300)
    for _ in range(2):
        rows = list(text)
        assert len(rows) == len(expected) == 4
        for row, other in zip(rows, expected, strict=True):
            assert torch.equal(row.input_ids, other.input_ids)
            assert row.origins == other.origins


def test_a_long_text_is_read_only_as_far_as_it_is_needed():
    text, _, read = passages([20] * 1000, max_tokens=3 * ROW)
    assert len(list(text)) == 3
    assert len(read) < 6
    assert len(list(passages([20] * 10)[0])) == -(-200 // ROW)


@pytest.mark.parametrize("stride", [1, 5, 8, 14])
def test_windows_predict_every_token_once_after_enough_context(stride):
    text, documents, _ = passages([50, 3, ROW, ROW + 1, 2, 33], stride=stride)
    predicted, counted = Counter(), Counter()
    for row in text:
        assert row.labels.shape == (1, ROW)
        for origin, begin, end in zip(
            row.origins, row.cu_seqlens.tolist(), row.cu_seqlens[1:].tolist(), strict=False
        ):
            document = documents[origin.document]
            for place in range(begin, end):
                position = origin.token + place - begin
                assert row.input_ids[0, place] == document[position]
                counted[origin.document, position] += int(row.router_mask[0, place])
                if row.loss_mask[0, place]:
                    assert row.labels[0, place] == document[position + 1]
                    assert place - begin >= min(position, ROW - stride - 1)
                    predicted[origin.document, position + 1] += 1
    wanted = {(n, t) for n, ids in enumerate(documents) for t in range(1, len(ids))}
    assert predicted == Counter(dict.fromkeys(wanted, 1))
    # First tokens are left out of routing, as everywhere, and so are last ones here.
    middle = {(n, t) for n, ids in enumerate(documents) for t in range(1, len(ids) - 1)}
    assert +counted == Counter(dict.fromkeys(middle, 1))


@pytest.mark.parametrize("stride", [0, ROW, -3])
def test_a_stride_that_leaves_gaps_or_no_context_is_refused(tmp_path, stride):
    with pytest.raises(UserError, match=f"--stride: got {stride}, expected 1 to 15"):
        text_passages(
            tmp_path, DataConfig(row_tokens=ROW), make_tokenizer(), stride=stride, max_tokens=0
        )


def test_text_without_anything_to_predict_is_refused():
    with pytest.raises(UserError, match="x: got without a document of two tokens"):
        list(passages([1, 1])[0])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("embedded:code:ast.py", "embedded:code"),
        ("texts/wiki/a/b.txt", "texts/wiki/a"),
        ("one.jsonl", "one.jsonl"),
        ("hf:x/y", "hf:x/y"),
        ("", ""),
    ],
)
def test_domains_are_sources_parts_and_folders(source, expected):
    assert domain_of(source, ("texts/", "./one.jsonl", "hf:x/y", "embedded")) == expected
