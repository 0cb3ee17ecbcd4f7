"""Rows that are read ahead are the ones that follow, and count as read when their step is over."""

import pytest

from tiny import make_tokenizer, write_corpus
from tiny_onn.config.schema import DataConfig
from tiny_onn.data.stream import TokenStream
from tiny_onn.distill.feed import RowFeed
from tiny_onn.errors import UserError


@pytest.fixture(scope="module")
def make_stream(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("feed") / "corpus", num_files=4)
    config, tokenizer = DataConfig(sources=(str(corpus),)), make_tokenizer()
    return lambda: TokenStream(config, tokenizer, split="train", seed=0, row_tokens=32)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_feed_gives_the_streams_rows_and_the_state_after_each_finished_step(make_stream, ahead):
    plain, stream = make_stream(), make_stream()
    feed = RowFeed(stream, lambda: [next(stream) for _ in range(2)])
    for _ in range(20):
        before = plain.state_dict()
        expected = [next(plain).input_ids.tolist() for _ in range(2)]
        assert [row.input_ids.tolist() for row in feed.take()] == expected
        assert feed.state_dict() == before
        if ahead:
            feed.read_ahead()
            # A step that is given up now is done again from here.
            assert feed.state_dict() == before
        feed.finish()
        assert feed.state_dict() == plain.state_dict()


def test_rows_that_cannot_be_read_wait_until_the_step_before_is_finished(make_stream):
    stream, plain, failing = make_stream(), make_stream(), []

    def read():
        rows = [next(stream)]
        if failing:
            raise UserError("a text that cannot be read")
        return rows

    feed = RowFeed(stream, read)
    feed.take()
    next(plain)
    failing.append(True)
    feed.read_ahead()
    feed.finish()
    # The finished step counts; the row whose reading failed does not.
    assert feed.state_dict() == plain.state_dict()
    with pytest.raises(UserError, match="a text that cannot be read"):
        feed.take()
    assert feed.state_dict() == plain.state_dict()
