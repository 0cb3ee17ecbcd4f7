"""Shuffled rows are those of the text, each once, in an order that a resumed stream repeats."""

import json

import pytest

from tiny import make_tokenizer, write_corpus
from tiny_onn.config.read import load_config
from tiny_onn.data.rows import training_rows
from tiny_onn.data.shuffling import ShuffledStream
from tiny_onn.errors import UserError

ROW, BLOCK = 32, 5


@pytest.fixture(scope="module")
def make_stream(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("shuffling") / "corpus", num_files=4)
    tokenizer = make_tokenizer()

    def stream(shuffle_tokens=BLOCK * ROW, seed=0):
        sets = (f"data.row_tokens={ROW}", f"data.shuffle_tokens={shuffle_tokens}")
        source = f"data.sources={json.dumps([str(corpus)])}"
        return training_rows(
            load_config(None, "demo", [*sets, source, f"train.seed={seed}"]), tokenizer
        )

    return stream


def ids(stream, number):
    return [next(stream).input_ids.tolist() for _ in range(number)]


def test_each_block_holds_the_rows_of_the_text_in_another_order(make_stream):
    in_order, shuffled = ids(make_stream(0), 8 * BLOCK), ids(make_stream(), 8 * BLOCK)
    differ = 0
    for start in range(0, 8 * BLOCK, BLOCK):
        block = slice(start, start + BLOCK)
        assert sorted(shuffled[block]) == sorted(in_order[block])
        differ += shuffled[block] != in_order[block]
    assert differ >= 6
    assert ids(make_stream(), 20) == shuffled[:20]


def test_blocks_are_shuffled_differently_and_by_the_seed(make_stream):
    def orders(seed):
        in_order, shuffled = (ids(make_stream(n, seed), 4 * BLOCK) for n in (0, BLOCK * ROW))
        return [in_order.index(row) % BLOCK for row in shuffled]

    first, second = orders(0), orders(1)
    assert first != second
    assert len({tuple(first[i : i + BLOCK]) for i in range(0, 4 * BLOCK, BLOCK)}) > 1


def test_rows_are_numbered_as_they_come(make_stream):
    stream = make_stream()
    assert [next(stream).number for _ in range(3 * BLOCK)] == [*range(3 * BLOCK)]
    resumed = make_stream()
    resumed.load_state_dict(stream.state_dict())
    assert next(resumed).number == 3 * BLOCK


@pytest.mark.parametrize("taken", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 2])
def test_a_resumed_stream_goes_on_with_the_same_rows(make_stream, taken):
    stream = make_stream()
    ids(stream, taken)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = make_stream()
    ids(resumed, 3)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert ids(resumed, 3 * BLOCK) == ids(stream, 3 * BLOCK)
    assert resumed.state_dict() == stream.state_dict()


def test_a_block_of_another_size_cannot_go_on(make_stream):
    state = make_stream().state_dict()
    with pytest.raises(UserError, match="shuffled rows changed: got 7, expected 5"):
        make_stream(7 * ROW).load_state_dict(state)


def test_blocks_of_one_row_are_not_shuffled(make_stream):
    assert not isinstance(make_stream(2 * ROW - 1), ShuffledStream)
    assert isinstance(make_stream(2 * ROW), ShuffledStream)
