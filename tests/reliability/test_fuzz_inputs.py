"""The short form of the fuzzer, and the readers' own promises, one by one."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repository import run_module
from tiny_onn.config.read import load_config
from tiny_onn.data import readers
from tiny_onn.data.documents import split_text
from tiny_onn.data.readers import LINE_BYTES
from tiny_onn.data.sources import read_documents
from tiny_onn.errors import LoadErrors, UserError, reason_line


@pytest.mark.timeout(300)
def test_generated_input_ends_in_success_or_one_line(tmp_path):
    run_module("reliability.fuzz_inputs", "--cases", 300, "--out", tmp_path / "fuzz.json")
    record = json.loads((tmp_path / "fuzz.json").read_text())
    assert record["cases"] >= 300
    # Neither everything nor nothing gets through, so the cases reach the code behind the parsers.
    assert all(row["refused"] for row in record["rows"])
    assert sum(row["accepted"] for row in record["rows"]) >= 30


def texts(path: Path) -> list[str]:
    return [document.text for document in read_documents(str(path), "text")]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        texts(path)
    return str(caught.value)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKED = {".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("packing", PACKED)
def test_packed_text_reads_as_plain(tmp_path, packing):
    lines = b'{"text": "one"}\n{"text": "two"}'
    (tmp_path / f"a.jsonl{packing}").write_bytes(PACKED[packing](lines))
    (tmp_path / f"b.TXT{packing}").write_bytes(PACKED[packing](b"\xef\xbb\xbfthree\r\nfour"))
    assert texts(tmp_path) == ["one", "two", "three\nfour"]


@pytest.mark.parametrize(("packing", "kind"), [(".gz", "gzip"), (".zst", "zstd")])
def test_damaged_archives_are_told_from_bad_text(tmp_path, packing, kind):
    path = tmp_path / f"a.txt{packing}"
    whole = PACKED[packing](b"some text that is long enough " * 50)
    path.write_bytes(whole[:-5])
    assert f"not readable as {kind}" in refusal(path)
    path.write_bytes(b"plain text")
    assert f"not readable as {kind}" in refusal(path)


@pytest.mark.parametrize("packing", PACKED)
def test_archives_that_unpack_to_far_more_than_their_size_are_refused(tmp_path, packing):
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(PACKED[packing](b"x" * (readers.BOMB_BYTES + 1)))
    assert "holds more than 64 MiB of text, expected at most 100 times" in refusal(path)


def test_a_parquet_dictionary_does_not_unpack_without_end(tmp_path):
    column = pa.array(["x" * 2**20] * 100).dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", compression="zstd")
    assert "holds more than 64 MiB of text" in refusal(tmp_path / "a.parquet")


def test_a_line_of_jsonl_has_an_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "' + b"x" * LINE_BYTES + b'"}')
    assert "a.jsonl line 2: got more than 8 MiB" in refusal(path)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["word ", "\n", "\n\n", "x" * 30_000, "\r\n", "\u00e9"]), max_size=40),
)
def test_text_read_in_blocks_is_cut_as_text_read_at_once(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("blocks") / "a.txt"
    path.write_bytes("".join(["start", *parts]).encode())
    whole = path.read_text(encoding="utf-8")
    assert texts(path) == [piece for piece in split_text(whole) if piece.strip()]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    documents = read_documents(str(path), "text")
    assert next(documents).text == "a"
    with path.open("a") as file:
        file.write('{"text": "c"}\n')
    with pytest.raises(UserError, match="changed while it was read"):
        list(documents)


@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
def test_what_could_block_for_ever_is_not_opened(tmp_path, kind):
    (tmp_path / "a.txt").write_text("text")
    odd = tmp_path / "b.txt"
    os.mkfifo(odd) if kind == "pipe" else odd.symlink_to("/dev/zero")
    assert "b.txt: got a pipe or a device, expected a regular file" in refusal(tmp_path)


def test_settings_are_read_to_a_bounded_length(tmp_path):
    with pytest.raises(UserError, match=r"/dev/zero: got more than 64 KiB"):
        load_config(Path("/dev/zero"), None, ())
    deep = tmp_path / "deep.toml"
    deep.write_text("a." * 20_000 + "a = 1")
    with pytest.raises(UserError, match="a line with 20000 dots, at most 2048 are read"):
        load_config(deep, None, ())
    with pytest.raises(UserError, match="at most 2048 are read"):
        load_config(None, None, ["data.sources={" + "a." * 20_000 + "a = 1}"])


def test_what_a_terminal_would_obey_is_shown_escaped():
    assert reason_line(UserError("a\x1b[31m\nb\udcff")) == "a\\x1b[31m b\\udcff"


@pytest.mark.parametrize("error", [Exception("x"), OSError("x"), KeyError("x")])
def test_what_libraries_raise_becomes_a_line(error):
    with pytest.raises(UserError, match=r"told: .*x"), LoadErrors(lambda reason: f"told: {reason}"):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("mine"), StopIteration()])
def test_what_is_no_library_error_passes(error):
    with pytest.raises(type(error)) as caught, LoadErrors(lambda reason: f"told: {reason}"):
        raise error
    assert caught.value is error
