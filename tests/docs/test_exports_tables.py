import json

from docs.tools import exports


def test_tables_are_what_the_record_says():
    for page in exports.PAGES:
        text = page.read_text(encoding="utf-8")
        assert exports.filled(text) == text, f"{page.name}: run python -m docs.tools"
    text = exports.PAGES[0].read_text(encoding="utf-8")
    assert exports.measured(json.loads(exports.RESULTS.read_text("utf-8"))) in text


def test_the_speeds_of_engines_are_the_record_s():
    record = json.loads(exports.RESULTS.read_text(encoding="utf-8"))
    assert f"| fixed | {exports.share(record, 'fixed k', 'read')}, " in exports.engines(record)
    record["ratios"]["fixed k / dense teacher, F16, read"] = 0.987
    assert "| fixed | 0.99, " in exports.engines(record)
