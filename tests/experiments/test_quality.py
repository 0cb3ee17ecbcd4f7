"""The pages of results say what the records say; the runs behind it are runs that can be made."""

import json

import pytest

from experiments import quality
from repository import run_module
from tiny_onn.config.read import load_config


def smoke(out, *options):
    """What a short run prints."""
    return run_module("experiments.quality", "--smoke", "--out", out, *options)


def test_the_pages_say_what_the_records_say():
    texts = [page.read_text("utf-8") for page in quality.PAGES]
    for text in texts:
        assert quality.filled(text) == text, "run python -m docs.tools"
    for name in quality.sections():
        assert sum(quality.BEGIN.format(name=name) in text for text in texts) == 1


def test_every_record_is_of_a_known_run_and_made_once():
    known = {arm.key(seed) for arm in quality.ARMS for seed in range(arm.seeds)}
    records = quality.read_records(quality.RECORDS)
    keys = [(record["group"], record["arm"], record["seed"]) for record in records]
    assert len(keys) == len(set(keys))
    assert set(keys) <= known


def test_every_run_has_valid_settings():
    for arm in quality.ARMS:
        load_config(None, "demo", [*quality.BASE, *arm.settings])


def test_a_table_shows_the_spread_over_seeds():
    assert quality.spread([0.25], 2) == "0.25"
    assert quality.spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"


@pytest.mark.slow
def test_a_run_leaves_its_line_and_is_not_made_again(tmp_path):
    options = ("--groups", "partitions", "--threads", "1")
    assert "partitions: slices, seed 0: KL" in smoke(tmp_path, *options)
    lines = (tmp_path / "quality.jsonl").read_text().splitlines()
    (record,) = map(json.loads, lines)
    assert (record["group"], record["arm"], record["seed"]) == ("partitions", "slices", 0)
    assert record["tokens"] > 0
    for stage in ("before", "after_blockwise", "after"):
        assert 0 <= record[stage]["forward_kl"] < 20
    assert record["block_error"]["after"] >= 0
    assert smoke(tmp_path, *options) == ""
    assert (tmp_path / "quality.jsonl").read_text().splitlines() == lines
