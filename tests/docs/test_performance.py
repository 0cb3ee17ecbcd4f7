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


def test_the_learned_partition_stands_beside_another_commits_where_that_ran():
    def rows(seconds, share):
        phases = [{"phase": "learned partition", "seconds": seconds}]
        return [*phases, {"phase": "held share of the energy", "share": share}]

    record = {"rows": rows(12.0, 0.9), "settings": {"threads": 2}}
    alone = list(performance.conversion_rows(record))
    assert [(row.ours, row.peer, row.ratio) for row in alone] == [
        ("12.0 s", "", ""), ("0.9000", "", ""),
    ]  # fmt: skip
    beside = list(performance.conversion_rows(record | {"base": {"rows": rows(15.0, 0.89)}}))
    assert [(row.peer, row.ratio) for row in beside] == [
        ("15.0 s before", "0.80"), ("0.8900 before", "1.0112"),
    ]  # fmt: skip
