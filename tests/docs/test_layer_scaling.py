"""The page of performance draws how the layer's cost grows, or says which command measures it."""

from docs.tools import figures, layer_scaling

RECORD = {
    "rows": [
        {"sweep": sweep, "tokens": 64, "experts": 32, "k": 16, sweep: 2**power, "rule": rule,
         "MLP": 2.0 + (rule == "card"), "dense": 2.0**power, "sparse": 1.0}
        for sweep, rules in (("tokens", 1), ("experts", 1), ("k", 2))
        for rule in ("default", "card")[:rules]
        for power in (3, 4, 5)
    ],
    "fits": [
        {"sweep": "tokens", "rule": "default", "way": "dense", "exponent": 0.987, "low": 2048,
         "high": 131_072, "points": 7, "off": 0.05},
        {"sweep": "k", "rule": "card", "way": "sparse", "exponent": 0.5, "low": 4, "high": 32,
         "points": 5, "off": 0.05},
    ],
}  # fmt: skip


def test_without_a_record_there_is_no_picture_and_the_page_names_the_command(tmp_path):
    record = layer_scaling.read(tmp_path / "none.json")
    assert record is None
    assert list(layer_scaling.charts(record)) == []
    assert layer_scaling.COMMAND in layer_scaling.section(record, "")


def test_every_sweep_has_a_picture_with_a_line_for_each_way_and_rule():
    found = dict(layer_scaling.charts(RECORD))
    assert list(found) == ["layer-tokens", "layer-experts", "layer-k"]
    lines = ["dense MLP", "dense-masked path", "sparse path"]
    more = ["dense-masked path, card's rule", "sparse path, card's rule"]
    for name, spec in found.items():
        drawn = list(dict.fromkeys(row["line"] for row in spec["data"]["values"]))
        expected = lines + (more if name == "layer-k" else [])
        assert sorted(drawn) == sorted(expected)
        assert spec["encoding"]["color"]["scale"]["domain"] == expected
        assert len(figures.marks(figures.drawn(spec, "light"))) > 9
    # The dense MLP is the one that was timed beside the first rule.
    dense = [r["ms"] for r in found["layer-k"]["data"]["values"] if r["line"] == "dense MLP"]
    assert dense == [2.0, 2.0, 2.0]


def test_the_section_has_the_exponents_with_their_ranges_and_all_pictures():
    text = layer_scaling.section(RECORD, "a GPU")
    assert "Measured on a GPU." in text
    assert "| dense-masked path | tokens | 0.99 | 2,048 | 131,072 |" in text
    assert "| sparse path, card's rule | active experts of 32 | 0.50 | 4 | 32 |" in text
    for name in dict(layer_scaling.charts(RECORD)):
        assert f"figures/{name}-dark.svg" in text
        assert f"figures/{name}-light.svg" in text
