"""The tables of README and docs say what the records say."""

from docs.tools import performance


def test_tables_are_what_the_records_say():
    for page in performance.PAGES:
        text = page.read_text("utf-8")
        assert performance.filled(text) == text, f"{page.name}: run python -m docs.tools"
        assert "<!-- performance: " in text


def test_a_stale_table_is_noticed_and_the_text_around_it_kept():
    name, content = next(iter(performance.sections().items()))
    begin = performance.BEGIN.format(name=name)
    page = f"before\n{begin}\n| old |\n{performance.END}\nafter\n"
    assert performance.filled(page) == f"before\n{begin}\n{content}{performance.END}\nafter\n"
