"""Sources, the split, bad input, and streams that resume to the row."""

import gc
import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tiny_onn.config.schema import DataConfig
from tiny_onn.data.documents import Document
from tiny_onn.data.packing import PackedRow
from tiny_onn.data.rows import held_out_rows
from tiny_onn.data.sources import read_documents
from tiny_onn.data.stream import Split, TokenStream, check_vocabulary, is_held_out, one_ahead
from tiny_onn.errors import UserError

EOS = 256


def byte_tokenizer(*, eos: bool = True) -> PreTrainedTokenizerBase:
    """One token per byte, id 256 for the end of a document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if eos:
        fast.add_special_tokens({"eos_token": "<end>"})
        assert fast.eos_token_id == EOS
    return fast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred short documents."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = [json.dumps({"text": f"document {i} " + "x" * (i % 23)}) for i in range(200)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def config_for(*sources: Path | str, held_out_fraction: float = 0.2) -> DataConfig:
    names = tuple(str(source) for source in sources)
    # The third side has tests of its own (test_settling.py).
    return DataConfig(sources=names, held_out_fraction=held_out_fraction, settling_fraction=0.0)


def stream(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: Split = "train",
    seed: int = 0,
    row_tokens: int = 64,
) -> TokenStream:
    return TokenStream(config, tokenizer, split=split, seed=seed, row_tokens=row_tokens)


def texts(source: Path | str, text_field: str = "text") -> list[str]:
    return [document.text for document in read_documents(str(source), text_field)]


def decoded(rows: list[PackedRow], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The documents in the rows: packing keeps their order, so padding taken out is enough."""
    tokens: list[int] = []
    for row in rows:
        for start, end in itertools.pairwise(row.cu_seqlens.tolist()):
            if row.loss_mask[0, start]:  # false for padding only
                tokens += row.input_ids[0, start:end].tolist()
    documents = "".join(str(tokenizer.decode(tokens))).split("<end>")
    return [document for document in documents if document]


def same(left: list[PackedRow], right: list[PackedRow]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.input_ids, b.input_ids) and torch.equal(a.cu_seqlens, b.cu_seqlens)
        for a, b in zip(left, right, strict=True)
    )


def test_a_folder_gives_the_text_of_all_its_formats_in_order(tmp_path: Path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfplain\r\ntext")
    (tmp_path / "b" / "c.JSONL").write_text('{"text": "one"}\n\n{"text": " "}\n{"text": null}\n')
    pq.write_table(pa.table({"text": ["two", None, "three"]}), tmp_path / "b/deep/d.parquet")
    (tmp_path / "ignored.md").write_text("other")
    (tmp_path / ".hidden.txt").write_text("other")
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert texts(tmp_path) == ["plain\ntext", "one", "two", "three"]


def test_the_text_field_is_the_one_named(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "no", "body": "yes"}')
    assert texts(path, "body") == ["yes"]


def test_a_large_text_file_is_split_and_nothing_is_lost(tmp_path: Path):
    text = "".join(f"paragraph {i} " + "word " * 400 + "\n\n" for i in range(100))
    path = tmp_path / "large.txt"
    path.write_text(text)
    pieces = texts(path)
    assert "".join(pieces) == text
    assert 3 <= len(pieces) <= 5
    assert all(len(piece) <= 64_000 and piece.startswith("paragraph") for piece in pieces)


def write(name: str, content: bytes) -> Callable[[Path], Path]:
    def create(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return create


def number_column(folder: Path) -> Path:
    pq.write_table(pa.table({"text": [1]}), folder / "n.parquet")
    return folder / "n.parquet"


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda folder: folder / "gone.txt", r"gone\.txt: no such file or folder; correct it"),
        (lambda folder: folder / ("n" * 300), r"nnn: cannot be read \(File name too long\)"),
        (lambda folder: folder, r"no text in it, expected a \.txt, \.jsonl, \.parquet"),
        (write("a.txt", b""), r"a\.txt: no text in it"),
        (write("a.txt", b" \n\n"), r"a\.txt: no text in it"),
        (write("a.txt", b"ok \xff"), r"a\.txt: not UTF-8 .*position 3.*convert it"),
        (write("a.csv", b"x"), r"a\.csv: got ending '\.csv', expected \.txt, \.jsonl, \.parquet"),
        (write("a.jsonl", b'{"text": "x"}\n{bad'), r"a\.jsonl line 2: not JSON"),
        (write("a.jsonl", b'{"text": "x\xff"}'), r"a\.jsonl line 1: not JSON in UTF-8"),
        (
            write("a.jsonl", b'{"text": "x"}\n["y"]'),
            r"line 2: got '\[.*\]', expected a JSON object",
        ),
        (write("a.jsonl", b"[" * 200_000), r"a\.jsonl line 1: not JSON"),
        (write("a.jsonl", b'{"body": "x", "n": 1}'), r"got 'text', expected one of: body, n;"),
        (write("a.jsonl", b'{"text": 3}'), r"line 1: 'text' holds int, expected text"),
        (write("a.jsonl", rb'{"text": "\ud800"}'), r"document 0: holds a lone surrogate"),
        (write("a.parquet", b"not parquet"), r"a\.parquet: not readable as parquet"),
        (number_column, r"n\.parquet: 'text' holds int64, expected text"),
    ],
)
def test_bad_sources_are_told_in_one_line(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    create: Callable[[Path], Path],
    message: str,
):
    with pytest.raises(UserError, match=message) as raised:
        stream(config_for(create(tmp_path)), tokenizer)
    assert "\n" not in str(raised.value)


def test_a_parquet_column_that_is_missing_is_named(tmp_path: Path):
    pq.write_table(pa.table({"a": ["x"], "b": ["y"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="got 'text', expected one of: a, b;"):
        texts(tmp_path / "x.parquet")


def test_no_source_at_all_is_refused(tokenizer: PreTrainedTokenizerBase):
    with pytest.raises(UserError, match=r"data\.sources: got none"):
        stream(config_for(), tokenizer)


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8")), unique=True), st.floats(0.01, 0.99))
def test_the_split_depends_on_the_text_alone(contents: list[str], fraction: float):
    for index, text in enumerate(contents):
        side = is_held_out(Document(text, "a", index).digest(), fraction)
        assert side == is_held_out(Document(text, "b", 0).digest(), fraction)
        # A larger share only adds documents.
        assert not side or is_held_out(Document(text, "a", 0).digest(), fraction + 0.01)


def test_the_split_has_the_share_asked_for():
    digests = [Document(str(i), "", i).digest() for i in range(10_000)]
    # Standard deviation of the count: 30.
    assert abs(sum(is_held_out(digest, 0.1) for digest in digests) - 1000) < 120


def test_train_and_held_out_are_disjoint_and_complete(
    corpus: Path, tokenizer: PreTrainedTokenizerBase
):
    config = config_for(corpus, corpus)  # every document twice
    held_out = decoded(held_out_rows(config, tokenizer, 64, 10**6), tokenizer)
    train = stream(config, tokenizer)
    rows = list(itertools.takewhile(lambda _: train.epoch == 0, train))
    trained = decoded(rows, tokenizer)
    assert 20 < len(set(held_out)) < 60
    assert set(held_out).isdisjoint(trained)
    assert Counter(held_out).most_common()[-1][1] == 2
    # The last row of the epoch, which began the next one, is not in `rows`.
    assert len(set(texts(corpus)) - set(held_out) - set(trained)) <= 5


def test_held_out_rows_are_few_full_and_always_the_same(
    corpus: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    config = config_for(corpus)
    rows = held_out_rows(config, tokenizer, 64, 200)
    assert len(rows) == 3
    assert all(row.input_ids.shape == (1, 64) for row in rows)
    assert same(rows, held_out_rows(config, tokenizer, 64, 10**6)[:3])
    assert len(held_out_rows(config, tokenizer, 64, 10)) == 1
    # The order of the file does not matter: documents are sorted by their hash.
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join(reversed(corpus.read_text().splitlines())))
    assert same(rows, held_out_rows(config_for(turned), tokenizer, 64, 200))


def test_an_empty_side_of_the_split_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    texts = [f"number {number}" for number in range(20)]
    sides: list[Split] = ["train", "held_out"]
    for held_out in (False, True):
        path = tmp_path / f"{held_out}"
        path.mkdir()
        for text in texts:
            if is_held_out(Document(text, "", 0).digest(), 0.5) == held_out:
                (path / f"{text}.txt").write_text(text)
        empty = sides[not held_out]
        with pytest.raises(
            UserError, match=rf"0\.5 of \d+ documents leaves no text for the {empty} split"
        ):
            stream(config_for(path, held_out_fraction=0.5), tokenizer, split=empty)


def test_one_document_cannot_be_split(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    path = tmp_path / "one.txt"
    path.write_text("only one")
    with pytest.raises(UserError, match="got one document in all"):
        for split in ("train", "held_out"):
            stream(config_for(path, held_out_fraction=0.5), tokenizer, split=split)


def test_text_of_single_tokens_does_not_hang(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n' * 3)
    endless = stream(config_for(path, held_out_fraction=0.0), byte_tokenizer(eos=False))
    with pytest.raises(UserError, match="expected a document of two tokens or more"):
        next(endless)


def test_every_epoch_visits_every_document_in_a_new_order(
    corpus: Path, tokenizer: PreTrainedTokenizerBase
):
    config = config_for(corpus, held_out_fraction=0.0)
    train = stream(config, tokenizer)
    rows = list(itertools.takewhile(lambda _: train.epoch < 3, train))
    documents = decoded(rows, tokenizer)
    first, second = documents[:200], documents[200:400]
    assert Counter(first) == Counter(second) == Counter(texts(corpus))
    assert first != second
    other = decoded(list(itertools.islice(stream(config, tokenizer, seed=1), 40)), tokenizer)
    assert other[:20] != first[:20]
    again = stream(config, tokenizer)
    assert same(list(itertools.islice(again, len(rows))), rows)


@settings(deadline=None, max_examples=25)
@given(stop=st.integers(0, 150), row_tokens=st.sampled_from([3, 17, 64, 500]), seed=st.integers(0))
def test_a_resumed_stream_equals_an_uninterrupted_one(
    corpus: Path, tokenizer: PreTrainedTokenizerBase, stop: int, row_tokens: int, seed: int
):
    config = config_for(corpus)
    whole = stream(config, tokenizer, seed=seed, row_tokens=row_tokens)
    for _ in range(stop):
        next(whole)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = stream(config, tokenizer, seed=seed, row_tokens=row_tokens)
    resumed.load_state_dict(state)
    expected = list(itertools.islice(whole, 20))
    assert same(list(itertools.islice(resumed, 20)), expected)
    assert resumed.state_dict() == whole.state_dict()


def test_a_held_out_stream_resumes_and_ends(corpus: Path, tokenizer: PreTrainedTokenizerBase):
    config = config_for(corpus)
    whole = list(stream(config, tokenizer, split="held_out"))
    for stop in (0, 3, len(whole)):
        first = stream(config, tokenizer, split="held_out")
        before = list(itertools.islice(first, stop))
        second = stream(config, tokenizer, split="held_out")
        second.load_state_dict(first.state_dict())
        assert same(before + list(second), whole)


def test_resuming_on_other_data_is_refused(
    corpus: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    state = stream(config_for(corpus), tokenizer).state_dict()
    changed = tmp_path / "changed.jsonl"
    changed.write_text(corpus.read_text() + '\n{"text": "one more that is trained on"}')
    with pytest.raises(UserError, match=r"resume: the data's text \(sha256\) changed"):
        stream(config_for(changed), tokenizer).load_state_dict(state)
    with pytest.raises(UserError, match="the data's seed changed: got 1, expected 0"):
        stream(config_for(corpus), tokenizer, seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="the data's row_tokens changed"):
        stream(config_for(corpus), tokenizer, row_tokens=65).load_state_dict(state)


def test_documents_end_with_the_end_token_if_there_is_one(corpus: Path):
    config = config_for(corpus)
    with_eos = held_out_rows(config, byte_tokenizer(), 64, 256)
    without = held_out_rows(config, byte_tokenizer(eos=False), 64, 256)
    assert any(EOS in row.input_ids for row in with_eos)
    assert not any(EOS in row.input_ids for row in without)
    row = with_eos[0]
    assert row.input_ids[0, int(row.cu_seqlens[1]) - 1] == EOS


def test_the_global_generator_is_left_alone(corpus: Path, tokenizer: PreTrainedTokenizerBase):
    before = torch.random.get_rng_state()
    next(stream(config_for(corpus), tokenizer))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture
def hub(corpus: Path, tmp_path: Path) -> str:
    """A folder of rows: `datasets` streams it by the same code as a dataset on the hub."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "rows.jsonl").write_bytes(corpus.read_bytes())
    return f"hf:{tmp_path / 'hub'}"


def test_a_hub_dataset_is_streamed_shuffled_split_and_resumed(
    hub: str, corpus: Path, tokenizer: PreTrainedTokenizerBase
):
    config = config_for(hub)
    whole = stream(config, tokenizer)
    rows = list(itertools.islice(whole, 20))
    middle = whole.state_dict()
    rest = list(itertools.islice(whole, 80))
    assert whole.epoch >= 1
    documents = decoded(rows + rest, tokenizer)
    held_out = decoded(held_out_rows(config, tokenizer, 64, 10**6), tokenizer)
    assert set(documents[:-1]) | set(held_out) == set(texts(corpus))
    assert set(documents[:-1]).isdisjoint(held_out)
    assert held_out == [text for text in texts(corpus) if text in set(held_out)]
    assert documents[:20] != [text for text in texts(corpus) if text not in set(held_out)][:20]
    num_trained = 200 - len(held_out)
    assert documents[:20] != documents[num_trained : num_trained + 20]
    resumed = stream(config, tokenizer)
    resumed.load_state_dict(middle)
    assert same(list(itertools.islice(resumed, 80)), rest)


def test_local_text_and_a_hub_dataset_take_turns(
    hub: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
):
    local = tmp_path / "local.jsonl"
    local.write_text("\n".join(json.dumps({"text": f"local {i}"}) for i in range(3)))
    config = config_for(local, hub, held_out_fraction=0.0)
    train = stream(config, tokenizer)
    rows = list(itertools.takewhile(lambda _: train.epoch == 0, train))
    kinds = [text.split()[0] for text in decoded(rows, tokenizer)]
    assert kinds[:8] == ["local", "document"] * 3 + ["document"] * 2


@pytest.mark.parametrize(
    ("source", "fields", "message"),
    [
        ("hf:", {}, "expected hf:name or hf:name:config"),
        ("hf:a:b:c", {}, "expected hf:name or hf:name:config"),
        ("hf:a@:b", {}, "expected hf:name or hf:name:config, the name as it is or name@revision"),
        ("{hub}:nope", {}, "BuilderConfig 'nope' not found.*; check the name"),
        ("{hub}", {"split": "nope"}, "Bad split: nope.*; check the name"),
        ("{hub}", {"text_field": "body"}, "got 'body', expected one of: text"),
        ("{hub}/gone", {}, "Couldn't find any data file.*; check the name"),
    ],
)
def test_bad_hub_sources_are_told_in_one_line(
    hub: str, tokenizer: PreTrainedTokenizerBase, source: str, fields: dict[str, str], message: str
):
    config = DataConfig(sources=(source.replace("{hub}", hub),), **fields)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=message) as raised:
        next(stream(config, tokenizer))
    assert "\n" not in str(raised.value)


def test_a_hub_dataset_without_network_names_the_remedy(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
):
    # The hub client's own offline switch: it refuses before any request is made.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no network, or no answer .*; connect, or name"):
        next(stream(config_for("hf:nobody/nothing"), tokenizer))


def test_a_vocabulary_larger_than_the_models_is_refused(tokenizer: PreTrainedTokenizerBase):
    check_vocabulary(tokenizer, 257)
    with pytest.raises(UserError, match=r"token id 256, expected less than .* 256"):
        check_vocabulary(tokenizer, 256)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_stream_notices_when_a_document_of_either_side_is_gone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, split: Split
):
    for index in range(20):
        (tmp_path / f"{index}.txt").write_text(f"text number {index}")
    config = config_for(tmp_path)
    state = stream(config, tokenizer).state_dict()
    stream(config, tokenizer).load_state_dict(state)
    files = sorted(tmp_path.iterdir())
    sides = [is_held_out(Document(f.read_text(), "", 0).digest(), 0.2) for f in files]
    files[sides.index(split == "held_out")].unlink()
    with pytest.raises(UserError, match=r"the data's text \(sha256\) changed"):
        stream(config, tokenizer).load_state_dict(state)


def test_texts_are_read_one_ahead_and_an_error_comes_in_its_turn():
    taken, threads = [], set()

    def items():
        for number in range(3):
            taken.append(number)
            threads.add(threading.current_thread())
            yield number
        raise UserError("broken")

    ahead = one_ahead(items())
    assert next(ahead) == 0
    assert next(ahead) == 1
    assert next(ahead) == 2
    with pytest.raises(UserError, match="broken"):
        next(ahead)
    assert taken == [0, 1, 2]
    assert threading.current_thread() not in threads


def test_a_reader_that_is_given_up_waits_for_nothing_and_leaves_no_thread():
    before, go_on, made = set(threading.enumerate()), threading.Event(), []

    def items():
        yield 0
        made.append(go_on.wait(60))

    ahead = one_ahead(items())
    assert next(ahead) == 0
    (worker,) = set(threading.enumerate()) - before
    ahead.close()
    assert not made
    go_on.set()
    worker.join(60)
    assert not worker.is_alive()
    assert made == [True]


@pytest.fixture
def no_collection():
    """Without the garbage collector only what nothing refers to goes away."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
def test_a_stream_that_is_dropped_ends_its_thread(tmp_path, tokenizer):
    texts = "".join(json.dumps({"text": f"{n} the dog runs"}) + "\n" for n in range(40))
    (tmp_path / "texts.jsonl").write_text(texts)
    before = set(threading.enumerate())
    rows = stream(config_for(tmp_path / "texts.jsonl"), tokenizer)
    next(rows)
    (worker,) = set(threading.enumerate()) - before
    del rows
    worker.join(60)
    assert not worker.is_alive()


@pytest.mark.usefixtures("no_collection")
def test_a_stream_that_is_dropped_reads_no_further(monkeypatch, tokenizer):
    """Its thread does not go on until it has a batch of its side of the split."""
    first_batch, go_on, numbers = 140, threading.Event(), []

    def endless(source, *_):
        for number in itertools.count():
            numbers.append(number)
            if number > first_batch:
                go_on.wait(60)
            yield Document(f"{number} the dog runs " * 100, source, number)

    monkeypatch.setattr("tiny_onn.data.stream.hub_documents", endless)
    before = set(threading.enumerate())
    rows = stream(config_for("hf:endless", held_out_fraction=0.0), tokenizer)
    next(rows)
    (worker,) = set(threading.enumerate()) - before
    del rows
    go_on.set()
    worker.join(60)
    assert not worker.is_alive()
    assert numbers[-1] <= first_batch + 1
