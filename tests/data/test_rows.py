"""Rows that hold text or a chat, from jsonl and parquet alike, and what is refused."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tiny_onn.data.fields import Chat
from tiny_onn.data.readers import read_texts
from tiny_onn.errors import UserError

ASK, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}
SYSTEM = {"role": "system", "content": "be brief"}


def jsonl(folder: Path, rows: list[Any]) -> Path:
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(folder: Path, rows: list[Any]) -> Path:
    path = folder / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


formats = pytest.mark.parametrize("write", [jsonl, parquet])
Write = Callable[[Path, list[Any]], Path]


def chats(path: Path, text_field: str = "text") -> list[Any]:
    found = list(read_texts(path, text_field))
    assert all(isinstance(text, Chat) or not text for text in found)
    return [json.loads(text) if text else None for text in found]


@formats
@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [ASK, ANSWER]}, [ASK, ANSWER]),
        ({"messages": [SYSTEM, ASK, ANSWER], "id": "7"}, [SYSTEM, ASK, ANSWER]),
        ({"messages": [ASK, ANSWER], "prompt": "hi"}, [ASK, ANSWER]),
        ({"messages": [{**ASK, "name": None}, ANSWER]}, [ASK, ANSWER]),
        ({"conversations": [HUMAN, GPT]}, [ASK, ANSWER]),
        ({"conversations": [HUMAN, GPT], "system": "be brief"}, [SYSTEM, ASK, ANSWER]),
        ({"messages": [{**ASK, "content": [{"type": "text", "text": "hi"}]}]}, [ASK]),
        ({"prompt": "hi", "completion": "yo"}, [ASK, ANSWER]),
        ({"prompt": "hi", "response": "yo"}, [ASK, ANSWER]),
        ({"prompt": [ASK], "completion": [ANSWER]}, [ASK, ANSWER]),
        ({"question": "hi", "answer": "yo"}, [ASK, ANSWER]),
        ({"instruction": "hi", "input": "", "output": "yo"}, [ASK, ANSWER]),
        (
            {"instruction": "hi", "input": "there", "output": "yo", "system": "be brief"},
            [SYSTEM, {"role": "user", "content": "hi\n\nthere"}, ANSWER],
        ),
    ],
)
def test_a_chat_is_read_in_each_of_its_forms(
    tmp_path: Path, write: Write, row: dict[str, Any], messages: list[Any]
):
    assert chats(write(tmp_path, [row, row])) == [messages, messages]


@formats
def test_a_field_of_chats_may_be_named(tmp_path: Path, write: Write):
    path = write(tmp_path, [{"messages": [ASK, ANSWER], "text": "no"}])
    assert chats(path, "messages") == [[ASK, ANSWER]]
    assert list(read_texts(path, "text")) == ["no"]
    path = write(tmp_path, [{"turns": [ASK, ANSWER]}])
    assert chats(path, "turns") == [[ASK, ANSWER]]
    path = write(tmp_path, [{"messages": "rendered already"}])
    assert list(read_texts(path, "messages")) == ["rendered already"]


@formats
def test_chats_without_a_word_are_blank(tmp_path: Path, write: Write):
    rows = [{"messages": [ASK]}, {"messages": None}, {"messages": []}]
    assert chats(write(tmp_path, [*rows, {"messages": [{**ASK, "content": " "}]}])) == [
        [ASK],
        None,
        None,
        None,
    ]


BAD = [
    ({"messages": [ASK, {"role": "user"}]}, "message 2 of 'messages': got no content, expected"),
    ({"messages": [{"content": "hi"}]}, "message 1 of 'messages': got no role, expected"),
    ({"messages": [{**ASK, "content": None}]}, "got no content"),
    ({"messages": [{"x": "y"}]}, "got no content and no role"),
    ({"messages": [{**ASK, "tool_calls": "x"}]}, "got tool_calls too, expected"),
    ({"messages": [{**ASK, **HUMAN}]}, "got content, role too"),
    ({"messages": [{**ASK, "role": "narrator"}]}, "got role 'narrator', expected one of system"),
    ({"messages": [{**ASK, "role": 3}]}, "got role '3', expected one of"),
    ({"messages": ["hi"]}, "got str, expected an object"),
    ({"messages": "hi"}, "'messages' holds str, expected a list of messages .* data.text_field"),
    ({"messages": [{**ASK, "content": 3}]}, "got content of type int, expected text"),
    (
        {"messages": [{**ASK, "content": [{"type": "image_url", "image_url": "u"}]}]},
        "got content of type image_url, expected text; leave the row out",
    ),
    ({"conversations": [{"from": "human"}]}, "got no value"),
    ({"prompt": "hi", "completion": 3}, "'completion' holds int, expected text"),
    ({"prompt": "hi", "completion": None}, "'completion' holds null, expected text"),
    ({"prompt": [ASK], "completion": "yo"}, "'prompt' holds list, expected text"),
    ({"prompt": "hi"}, "one of: prompt; correct the setting, or the row if other rows have 'text'"),
]


@formats
@pytest.mark.parametrize(("row", "message"), BAD)
def test_an_ill_formed_chat_is_refused_with_its_place(
    tmp_path: Path, write: Write, row: dict[str, Any], message: str
):
    path = write(tmp_path, [row])
    place = "" if "text'" in message else ("line 1" if write is jsonl else "row 0")
    with pytest.raises(UserError, match=f"^data.*{path.name}.*{place}.*{message}") as raised:
        list(read_texts(path, "text"))
    assert "\n" not in str(raised.value)


def test_a_chat_of_a_few_bytes_cannot_fill_the_memory(tmp_path: Path):
    # One text of 8 KiB, said ten thousand times, takes a few bytes in a dictionary.
    message = {"role": "user", "content": "x" * 8192}
    pq.write_table(pa.table({"messages": [[message] * 10_000]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x.parquet row 0: got more than 8 MiB, expected one chat"):
        list(read_texts(tmp_path / "x.parquet", "text"))


BASE = pa.array(["a b c", None, "d"])


def as_text(kind: pa.DataType) -> pa.Array:
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, BASE.cast(kind.storage_type))
    if pa.types.is_dictionary(kind):
        return BASE.cast(kind.value_type).dictionary_encode().cast(kind)
    return BASE.cast(kind)


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
        *(pa.json_(kind) for kind in (pa.string(), pa.large_string(), pa.string_view())),
    ],
    ids=str,
)
def test_a_parquet_column_of_any_type_of_text_is_read(tmp_path: Path, kind: pa.DataType):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": as_text(kind), "n": [1, 2, 3]}), path)
    assert list(read_texts(path, "text")) == ["a b c", "", "d"]


@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())],
)
def test_a_parquet_column_of_bytes_is_refused(tmp_path: Path, kind: pa.DataType):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": as_text(kind)}), path)
    with pytest.raises(UserError, match=r"'text' holds .*binary.*, expected text; .* cast it to s"):
        list(itertools.islice(read_texts(path, "text"), 1))
