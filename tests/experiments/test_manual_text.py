"""The embedded corpus and a manual as the text of a study."""

import pytest

from experiments import manual_text
from experiments.split_text import documents_of
from tiny_onn.data.embedded_text import embedded_documents
from tiny_onn.errors import UserError


def test_both_sources_are_written_as_distill_reads_them(tmp_path):
    manual = tmp_path / "docs"
    (manual / "topics").mkdir(parents=True)
    pages = {"intro.txt": "Begin here.\n", "topics/models.txt": "A model is a table.\n"}
    for name, text in pages.items():
        (manual / name).write_text(text, "utf-8")
    manual_text.main(["--manual", str(manual), "--out", str(tmp_path / "out")])
    found = [*documents_of(tmp_path / "out")]
    embedded = [document.text for document in embedded_documents()]
    assert [d["text"] for d in found if d["source"] == "embedded"] == embedded
    assert [d["text"] for d in found if d["source"] == "manual"] == [*pages.values()]


def test_a_manual_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="expected the folder of a manual"):
        manual_text.main(["--manual", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
