"""docs/probe.md says what the recorded results say."""

import json

from docs.tools import probe_docs


def test_the_tables_are_those_of_the_results():
    records = json.loads(probe_docs.RESULTS.read_text(encoding="utf-8"))
    text = probe_docs.PAGE.read_text(encoding="utf-8")
    assert set(records) <= set(probe_docs.SUBJECTS)
    assert probe_docs.with_tables(text, records) == text


def test_a_changed_number_shows():
    records = json.loads(probe_docs.RESULTS.read_text(encoding="utf-8"))
    records["dense"]["layers"]["15"]["remove"]["rules"]["gain"]["spearman"][0] += 0.1
    text = probe_docs.PAGE.read_text(encoding="utf-8")
    assert probe_docs.with_tables(text, records) != text
