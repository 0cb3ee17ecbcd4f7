"""Budgets are settled on many fragments of documents that neither train nor evaluate."""

import json
import re
from dataclasses import replace

import pytest
import torch

from tiny import CONFIG, change, make_tokenizer
from tiny_onn.config.checks import validate
from tiny_onn.data.packing import Origin, build_row, joined
from tiny_onn.data.passages import held_out_passages
from tiny_onn.data.rows import calibration_rows, eval_row_tokens, held_out_rows, training_rows
from tiny_onn.data.settling import SHORTEST, fragment_tokens, threshold_rows, without_lead
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


def test_thresholds_see_short_fragments_of_many_documents(corpus, tokenizer):
    rows = threshold_rows(settings(corpus), tokenizer, CPU)
    assert sum(row.labels.numel() for row in rows) == 4096
    for row in rows:
        lengths = row.cu_seqlens.diff()
        assert int(lengths.max()) <= SHORTEST
        assert row.labels.numel() <= ROW
        # Every fragment but the first of a row begins at its own position 0.
        assert row.position_ids[0, row.cu_seqlens[:-1].long()].eq(0).all()
    assert sum(len(row.cu_seqlens) - 1 for row in rows) > 4096 // SHORTEST


def test_text_is_measured_and_settled_on_in_longer_rows_than_it_is_learned_from(corpus, tokenizer):
    config = settings(corpus, tokens=2**15)
    longer = change(config, data={"eval_row_tokens": 2 * ROW})
    (short, *_), (long, *_) = (threshold_rows(c, tokenizer, CPU) for c in (config, longer))
    assert (short.labels.numel(), long.labels.numel()) == (ROW, 2 * ROW)
    passages = held_out_passages(longer.data, tokenizer, stride=None, max_tokens=0)
    assert next(iter(passages)).labels.numel() == 2 * ROW
    assert next(training_rows(longer, tokenizer)).labels.numel() == ROW
    # Rows are never measured in parts.
    assert eval_row_tokens(replace(config.data, eval_row_tokens=1)) == ROW


@pytest.mark.parametrize("fraction", [0.2, 0.0])
def test_the_text_to_settle_on_may_be_more_than_calibration_reads(corpus, tokenizer, fraction):
    config = settings(corpus, fraction=fraction, tokens=2048, settling_tokens=5120)
    rows = threshold_rows(config, tokenizer, CPU)
    assert sum(row.labels.numel() for row in rows) == 5120
    read = calibration_rows(change(config, experts={"gate_init": "ridge"}), tokenizer, CPU)
    assert not any(torch.equal(row.input_ids, other.input_ids) for row in rows for other in read)


@pytest.mark.parametrize(
    ("tokens", "row_tokens", "expected"),
    [
        (6144, 1024, 256),
        (16_383, 4096, 256),
        (16_384, 4096, 512),
        (131_072, 4096, 4096),
        (131_072, 1024, 1024),
        (10**7, 32_768, 4096),
        (131_072, 700, 700),
        (10, 64, 64),
    ],
)
def test_more_text_is_cut_into_longer_fragments(tokens, row_tokens, expected):
    assert fragment_tokens(tokens, row_tokens) == expected


def test_every_source_has_its_share_of_the_fragments(corpus, tokenizer):
    config = settings(corpus, tokens=2048)
    rows = threshold_rows(config, tokenizer, CPU)
    text = tokenizer.decode(torch.cat([row.input_ids[0] for row in rows]))
    # Only the first word of a document holds a digit, after the letter of its source.
    found = {source: len(re.findall(rf"{source}\d", text)) for source in "abc"}
    assert all(found.values())
    # A fragment of the long documents holds the start of few of them.
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
    assert row.origins == tuple(origin for r in rows for origin in r.origins)
    padded = build_row([[1, 2, 3]], row_tokens=8, pad_token_id=0, origins=[Origin("a", 0, 0)])
    assert joined([rows[0], padded]).origins == (*rows[0].origins, Origin("a", 0, 0))
    # Nothing says where the padding in the middle came from.
    assert joined([padded, rows[0]]).origins == ()


def test_shares_that_leave_no_training_text_are_refused(corpus):
    with pytest.raises(UserError, match=r"data.settling_fraction: got 0.9 beside .* sum below 1"):
        validate(settings(corpus, fraction=0.9))


def test_the_first_tokens_of_a_fragment_that_goes_on_with_a_document_are_not_counted():
    def row(lengths, token):
        parts = [[1 + number] * length for number, length in enumerate(lengths)]
        origins = [Origin("a", number, token * (number == 0)) for number in range(len(parts))]
        return build_row(parts, row_tokens=256, pad_token_id=0, origins=origins)

    tail = row([40, 216], token=768)
    counted = without_lead(tail).router_mask[0]
    assert not counted[:40].any(), "a tail that is shorter is left out whole"
    assert torch.equal(counted[40:], tail.router_mask[0, 40:])
    counted = without_lead(row([256], token=256)).router_mask[0]
    assert not counted[:64].any()
    assert counted[64:].all()
    begins = row([256], token=0)
    assert without_lead(begins) is begins


def test_first_tokens_are_about_as_frequent_as_in_rows(corpus, tokenizer):
    config = settings(corpus, tokens=8192)
    stream = TokenStream(config.data, tokenizer, split="settling", seed=0, row_tokens=ROW)
    rows, fragments = list(stream), threshold_rows(config, tokenizer, CPU)

    def share(rows, mask):
        first = torch.cat([row.position_ids[0] < 64 for row in rows])
        return float(first[torch.cat([mask(row) for row in rows])].float().mean())

    expected = share(rows, lambda row: row.router_mask[0])
    all_tokens = share(fragments, lambda row: row.loss_mask[0])
    counted = share(fragments, lambda row: row.router_mask[0])
    assert all_tokens - expected > 0.05
    assert abs(counted - expected) < (all_tokens - expected) / 2
