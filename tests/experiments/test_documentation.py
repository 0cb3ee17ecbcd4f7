"""The text of Debian's documentation: pages become paragraphs, and each is kept once."""

import gzip

from experiments.documentation import documents, page_text


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
