"""The text of Debian's documentation: pages become paragraphs, and each is kept once."""

import gzip
import json

import pytest

from benchmarks.common import ROOT
from experiments.documentation import PACKAGES, documents, hashes_of, listed_packages, page_text
from tiny_onn.errors import UserError


def prose(number):
    """A paragraph that is long enough to be a document."""
    return " ".join([f"This paragraph is long enough to be kept by itself, number {number}."] * 10)


def test_a_page_is_its_paragraphs_without_navigation_and_scripts():
    html = (
        "<html><head><title>no</title></head><body><nav>menu</nav><script>x()</script>"
        "<h1>Heading</h1><p>One   line.</p><p>Another <b>line</b>.</p><footer>no</footer></body>"
    )
    assert page_text(html) == "Heading\nOne line.\nAnother line."


def test_documents_are_english_text_with_each_paragraph_once(tmp_path):
    folder = tmp_path / "usr"
    (folder / "de").mkdir(parents=True)
    (folder / "a.txt").write_text(prose(1) + "\n\n" + prose(2))
    (folder / "b.txt.gz").write_bytes(gzip.compress((prose(2) + "\n\n" + prose(3)).encode()))
    (folder / "de" / "c.txt").write_text(prose(4))
    (folder / "copyright.txt").write_text(prose(5))
    (folder / "d.so").write_bytes(b"\0" * 1000)
    (folder / "e.txt").write_text("1234 5678 9012 3456 7890 1234 5678 9012\n" * 30)
    seen: set[bytes] = set()
    texts = list(documents(tmp_path, seen))
    assert texts == [
        f"{prose(1)}\n\n{prose(2)}",
        prose(3),
    ]
    assert list(documents(tmp_path, seen)) == []


def test_long_texts_are_cut_into_documents(tmp_path):
    sentence = "Number {} of many paragraphs that differ from each other. "
    paragraphs = [sentence.format(number) * 3 for number in range(600)]
    (tmp_path / "a.md").write_text("\n\n".join(paragraphs))
    texts = list(documents(tmp_path, set()))
    assert len(texts) > 1
    assert {len(text) for text in texts[:-1]} == {40_000}


def test_paragraphs_of_another_text_are_left_out(tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": f"{prose(1)}\n\n{prose(3)}", "source": "a"}) + "\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.txt").write_text(f"{prose(1)}\n\n{prose(2)}")
    assert list(documents(tmp_path / "package", hashes_of(other))) == [prose(2)]


@pytest.mark.parametrize("text", ["[1]", '{"a": 1}', "{", None])
def test_packages_are_an_object_of_names_and_versions(text, tmp_path):
    path = tmp_path / "packages.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"--packages: .*; correct it"):
        listed_packages(path)


def test_the_packages_of_more_text_are_others():
    more = listed_packages(ROOT / "experiments" / "more_packages.json")
    assert len(more) == 83
    assert not more.keys() & PACKAGES.keys()
