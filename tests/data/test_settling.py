"""Budgets are settled on rows of documents that neither train nor evaluate."""

import json
import re

import pytest
import torch

from tiny import CONFIG, change, make_tokenizer
from tiny_onn.config.checks import validate
from tiny_onn.data.packing import joined
from tiny_onn.data.rows import calibration_rows, held_out_rows, training_rows
from tiny_onn.data.settling import threshold_rows
from tiny_onn.data.stream import TokenStream, side_of
from tiny_onn.errors import UserError

CPU = torch.device("cpu")
ROW = 512


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three sources of documents of different lengths, a number in each text."""
    folder = tmp_path_factory.mktemp("corpus")
    for source, (count, words) in {"a": (60, 40), "b": (60, 400), "c": (30, 200)}.items():
        texts = [f"{source}{n} " + "the lazy dog " * (words // 3) for n in range(count)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{source}.jsonl").write_text("\n".join(lines))
    return folder


def settings(corpus, fraction=0.3, tokens=4096, **data):
    return change(
        CONFIG,
        data={
            "sources": (str(corpus),),
            "row_tokens": ROW,
            "settling_fraction": fraction,
            "held_out_fraction": 0.2,
            **data,
        },
        experts={"calibration_tokens": tokens},
    )


def documents(rows):
    return {(origin.source, origin.document) for row in rows for origin in row.origins}


def test_every_document_is_on_one_side(corpus, tokenizer):
    config = settings(corpus)
    stream = training_rows(config, tokenizer)
    train = []
    while not stream.epoch:
        train.append(next(stream))
    held_out = held_out_rows(config.data, tokenizer, ROW, 10**6)
    settling = TokenStream(config.data, tokenizer, split="settling", seed=0, row_tokens=ROW)
    sides = [documents(train), documents(held_out), documents(settling)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 150
    assert all(sides)


def test_a_share_of_nothing_leaves_the_sides_as_they_were(corpus):
    old = settings(corpus, fraction=0.0).data
    for number in range(500):
        digest = number.to_bytes(2, "big") * 16
        expected = "held_out" if int.from_bytes(digest[:8], "big") < 0.2 * 2**64 else "train"
        assert side_of(digest, old) == expected


def test_thresholds_see_rows_like_those_of_training(corpus, tokenizer):
    config = settings(corpus)
    rows = threshold_rows(config, tokenizer, CPU)
    assert sum(row.labels.numel() for row in rows) == 4096
    stream = TokenStream(config.data, tokenizer, split="settling", seed=0, row_tokens=ROW)
    packed = {tuple(row.input_ids[0].tolist()) for row in stream}
    chosen = {tuple(row.input_ids[0].tolist()) for row in rows}
    assert len(chosen) == len(rows) < len(packed)
    assert chosen < packed


def test_every_source_has_its_share_of_the_rows(corpus, tokenizer):
    config = settings(corpus, tokens=2048)
    rows = threshold_rows(config, tokenizer, CPU)
    text = tokenizer.decode(torch.cat([row.input_ids[0] for row in rows]))
    # Only the first word of a document holds a digit, after the letter of its source.
    found = {source: len(re.findall(rf"{source}\d", text)) for source in "abc"}
    assert all(found.values())
    # A row of the long documents holds the start of few of them.
    assert found["a"] > found["b"]


def test_the_choice_is_the_same_every_time_and_for_every_seed(corpus, tokenizer):
    first = threshold_rows(settings(corpus), tokenizer, CPU)
    again = threshold_rows(change(settings(corpus), train={"seed": 7}), tokenizer, CPU)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(first, again, strict=True))


def test_without_documents_budgets_settle_on_training_text_and_say_so(corpus, tokenizer, capsys):
    config = settings(corpus, fraction=1e-9)
    rows = threshold_rows(config, tokenizer, CPU)
    assert "settled on training text" in capsys.readouterr().err
    stream = training_rows(config, tokenizer)
    number = len(calibration_rows(change(config, experts={"gate_init": "ridge"}), tokenizer, CPU))
    expected = [next(stream) for _ in range(2 * number)][number:]
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(rows, expected, strict=True))
    # A share of 0 asks for that, so that nothing is to be said.
    threshold_rows(settings(corpus, fraction=0.0), tokenizer, CPU)
    assert "settled" not in capsys.readouterr().err


def test_joined_rows_keep_their_documents_apart(corpus, tokenizer):
    stream = training_rows(settings(corpus), tokenizer)
    rows = [next(stream) for _ in range(3)]
    row = joined(rows)
    assert torch.equal(row.input_ids, torch.cat([r.input_ids for r in rows], dim=1))
    assert row.cu_seqlens.diff().tolist() == [n for r in rows for n in r.cu_seqlens.diff().tolist()]


def test_shares_that_leave_no_training_text_are_refused(corpus):
    with pytest.raises(UserError, match=r"data.settling_fraction: got 0.9 beside .* sum below 1"):
        validate(settings(corpus, fraction=0.9))
