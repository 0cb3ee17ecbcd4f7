"""The table's lines on ways to decode say what the records say."""

from docs.tools import decoding, performance


def model(way, speed, treatment="compiled", batch=1, part="model"):
    found = {"tokens_per_s": speed} if speed else {"error": "RuntimeError: no"}
    return {"part": part, "treatment": treatment, "batch": batch, "way": way, **found}


def test_each_way_stands_beside_the_fastest_dense_one():
    times = {"tokens": 10.0, "tiles": 8.0, "dense": 20.0, "dense, compiled": 16.0}
    record = {"part": "layer", "tokens": 8, "k": 16, "us_per_layer": times}
    old = record | {"us_per_layer": {"tokens": 99.0, "dense": 1.0}}
    lines = list(decoding.rows([{"part": "environment"}, old, record]))
    assert [line[1:4] for line in lines] == [
        ("10 us", "16 us dense, compiled, the fastest", "0.62"),
        ("8 us", "16 us dense, compiled, the fastest", "0.50"),
    ]


def test_speeds_of_models_are_compared_with_the_dense_one_treated_alike():
    records = [
        model("dense", 200.0, "eager"),
        model("k = 16, tokens", 210.0, "eager"),
        model("dense", 500.0),
        model("k = 16, tokens", 600.0),
        model("k = 16, tiles", None),
        model("dense", 900.0, batch=8),
        model("k = 16, tokens", 990.0, batch=8),
    ]
    lines = list(decoding.rows(records))
    assert [line[1:] for line in lines] == [
        ("600", "500 dense", "1.20", ">= 1.20"),
        ("990", "900 dense", "1.10", ">= 1"),
    ]


def test_a_way_without_its_dense_peer_makes_no_line():
    assert not list(decoding.rows([model("k = 16, tokens", 600.0)]))


def test_the_table_says_on_which_card_its_own_record_was_made():
    cards = {record["gpu"] for record in decoding.read() if record["part"] == "environment"}
    sections = performance.sections()
    # The README shows a row of it under the same card.
    assert all(f"Measured on {card}, " in sections.pop("readme") for card in cards)
    assert [f"Measured on {card}, " in sections["decoding"] for card in cards] == [True]
    for what, *_ in decoding.rows(decoding.read()):
        assert [name for name, text in sections.items() if f"| {what} |" in text] == ["decoding"]
