"""A plan in pictures: bars that add up to the plan's numbers, in the terminal and as a page."""

import io
import json
import re
from typing import Any

import pytest
from rich.console import Console

from tiny_onn.cli import main as cli
from tiny_onn.config.read import load_config
from tiny_onn.planning.pictures import disk_of_run, memory_stacks, time_stacks, write_plan_page
from tiny_onn.planning.plan import plan
from tiny_onn.planning.sources import GIB
from tiny_onn.report.stacks import MAX_PARTS, REST, Stacks


@pytest.fixture(scope="module")
def planned():
    config = load_config(None, "model-card", ["teacher.dtype=bfloat16"])
    return plan(config, config.teacher.path, "RTX 3060")


def shown(renderable, **options: Any) -> list[str]:
    """Return the lines that a terminal of 80 columns shows."""
    out = io.StringIO()
    Console(file=out, width=80, **options).print(renderable)
    return out.getvalue().splitlines()


def test_bars_of_memory_end_at_the_peak_and_those_of_time_at_the_step(planned):
    memory = memory_stacks(planned)
    totals = {name: sum(parts.values()) for name, parts in memory.bars.items()}
    assert max(totals.values()) == pytest.approx(planned.peak_bytes / GIB)
    assert max(totals, key=totals.__getitem__) == planned.peak.name
    assert len(totals) < 6
    time = time_stacks(planned)
    whole, packed = (sum(parts.values()) for parts in time.bars.values())
    assert whole * planned.steps == pytest.approx(planned.seconds(planned.whole_rows))
    assert packed * planned.steps == pytest.approx(planned.seconds(planned.packed))


def test_small_parts_are_drawn_together_and_nothing_is_lost():
    bars = {"a": {f"part {n}": float(n) for n in range(1, 10)}, "b": {"part 9": 2.0}}
    stacks = Stacks(title="t", unit="GiB", bars=bars)
    assert len(stacks.parts()) == MAX_PARTS
    assert stacks.merged("a")[REST] == 1 + 2 + 3 + 4
    for name, bar in bars.items():
        assert sum(stacks.merged(name).values()) == sum(bar.values())


def test_a_terminal_shows_bars_to_scale_with_and_without_colours():
    stacks = Stacks(
        title="t",
        unit="GiB",
        bars={"long": {"x": 30.0, "y": 10.0}, "s": {"y": 20.0}},
        limit=("card", 50.0),
    )
    lines = shown(stacks, color_system=None)
    bars = [re.sub(r"[^#=]", "", line) for line in lines[1:3]]
    assert [bar.count("#") for bar in bars] == [36, 0]
    assert [bar.count("=") for bar in bars] == [12, 24]
    assert lines[3].endswith("card: 50.00 GiB ^")
    assert lines[4].split() == ["#", "x", "=", "y"]
    coloured = shown(stacks, color_system="truecolor", force_terminal=True)
    assert "\u2588" * 36 in coloured[1]
    assert max(map(len, lines)) <= 80


def test_the_page_holds_both_pictures_and_needs_no_network(planned, tmp_path):
    write_plan_page(planned, tmp_path / "new" / "plan.html")
    page = (tmp_path / "new" / "plan.html").read_text()
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert set(data["charts"]) == {"memory", "time"}
    rows = data["charts"]["memory"]["data"]["values"]
    total = sum(row["value"] for row in rows if row["bar"] == planned.peak.name)
    assert total == pytest.approx(planned.peak_bytes / GIB, rel=1e-3)
    assert not re.search(r'(src|href)="http', page)
    assert "It fits" in page
    assert f"The disk: {disk_of_run(planned)}." in page


def test_the_verb_writes_the_page_and_refuses_a_bad_place(tmp_path, capsys):
    arguments = ["plan", "--preset", "model-card", "--device", "RTX 3060", "--html"]
    page = tmp_path / "plan.html"
    assert cli.main([*arguments, str(page), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["memory"]
    assert f"{page}: the page of the plan\n" in printed.err
    assert page.stat().st_size < 3e6
    assert cli.main([*arguments, str(tmp_path)]) == 2
    assert "--html: got" in capsys.readouterr().err
