"""Mistakes in a study's text are told in one line, before any work on a model."""

import json
import lzma
import subprocess
import sys

import pytest

from experiments.split_text import split
from repository import ROOT
from tiny_onn.errors import UserError

ROW = {"text": "some words", "source": "s0"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "a"}, "got txt, expected 'text' and perhaps 'source'"),
        ({}, "got nothing, expected 'text' and perhaps 'source'"),
        ([1], r"got '\[1\]', expected an object with 'text'"),
        ({"text": None}, "got 'text' of type NoneType, expected a string"),
        ({"text": "a", "source": 3}, "got 'source' of type int, expected a string"),
        ({"text": "a\ud800"}, "'text' holds a lone surrogate, expected valid Unicode"),
    ],
)
def test_a_row_that_is_no_document_is_named(tmp_path, row, message):
    path = write(tmp_path / "x.jsonl", [ROW, row])
    with pytest.raises(UserError, match=f"--text: {path} line 2: {message}; mend or remove"):
        split(path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_line_that_is_no_json_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"x.jsonl line 2: .*; mend or remove the line"):
        split(tmp_path / "x.jsonl", tmp_path / "out")


def test_a_text_that_cannot_be_read_is_told_with_what_is_expected(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.jsonl").write_bytes(b"\xff\n")
    (tmp_path / "y.xz").write_bytes(b"plain")
    (tmp_path / "z.xz").write_bytes(lzma.compress(b'{"text": "a"}\n' * 9)[:-20])
    for name, got in {
        "gone": "FileNotFoundError: .*No such file",
        "folder": "a folder without a .jsonl file",
        "x.jsonl": "UnicodeDecodeError: .*",
        "y.xz": "LZMAError: .*",
        "z.xz": "EOFError: .*",
    }.items():
        path = tmp_path / name
        with pytest.raises(UserError, match=f"^--text: {path}: got {got}.*expected JSON lines"):
            split(path, tmp_path / "out")


def test_a_text_too_short_for_all_parts_is_told(tmp_path):
    path = write(tmp_path / "x.jsonl", [ROW, {"text": " "}])
    with pytest.raises(UserError, match=f"--text: {path}: got no text to report on, expected a"):
        split(path, tmp_path / "out")
    with pytest.raises(UserError, match=f"--text: {path}: got no text to learn from"):
        split(path, tmp_path / "out", ["s0"])


def test_an_unseen_source_that_does_not_exist_is_told_with_some_that_do(tmp_path):
    path = write(tmp_path / "x.jsonl", [{**ROW, "source": f"s{n:02}"} for n in range(30)])
    message = f"^--unseen: got t1, t2, expected sources in {path}, which are s00, .*, s19 and 10 o"
    with pytest.raises(UserError, match=message):
        split(path, tmp_path / "out", ["t2", "s01", "t1"], unseen_option="--unseen")
    path = write(tmp_path / "y.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=f"^--unseen-sources: got t, .* {path}, which are none;"):
        split(path, tmp_path / "out", ["t"])


@pytest.mark.parametrize("study", ["arms", "budgets"])
def test_a_study_ends_with_one_line_about_a_mistake(tmp_path, study):
    options = ["--smoke", "--text", str(tmp_path / "gone"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", f"experiments.{study}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert f"\nerror: --text: {tmp_path / 'gone'}: got FileNotFoundError" in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr
