"""The study of baselines: its settings are valid, its text is apart, its numbers are at equal k."""

import json
import math

import pytest

from experiments import arms, low_rank, split_text
from experiments.arms_table import at_k, table
from repository import run_module
from tiny_onn.config.read import load_config
from tiny_onn.data.stream import is_held_out


def test_every_arm_has_valid_settings():
    for name, settings in arms.ARMS.items():
        load_config(None, "demo", [*arms.BASE, *settings])
        assert name == name.strip()


def test_the_kl_at_k_lies_on_straight_lines_of_its_logarithm():
    points = [(15.0, 0.4), (17.0, 0.1), (19.0, 0.05)]
    assert at_k(points, 16) == pytest.approx(0.2)
    assert at_k(points[::-1], 18) == pytest.approx(math.sqrt(0.1 * 0.05))
    assert at_k(points, 13) == pytest.approx(1.6)
    assert at_k(points, 21) == pytest.approx(0.025)
    assert at_k(points[:1], 16) == 0.4
    assert at_k([(16.0, 0.3), (16.0, 0.3)], 16) == 0.3


def test_what_is_reported_is_read_by_no_run(tmp_path):
    text = tmp_path / "text.jsonl"
    documents = [{"text": f"document {n}", "source": f"s{n % 5}"} for n in range(500)]
    text.write_text("".join(json.dumps(d) + "\n" for d in documents))
    parts = split_text.split(text, tmp_path / "out", ["s3"])
    assert split_text.split(text, tmp_path / "out", ["s3"]) == parts
    assert parts.unseen is not None
    learn, report, unseen = (
        {d["text"] for path in paths for d in split_text.documents_of(path)}
        for paths in (parts.learn.glob("*.jsonl"), [parts.report], [parts.unseen])
    )
    assert learn | report | unseen == {d["text"] for d in documents}
    assert len(learn) + len(report) + len(unseen) == 500
    assert unseen == {d["text"] for d in documents if d["source"] == "s3"}
    assert 5 < len(report) < 40
    # The share that a run keeps from training is cut from the other end of the hash.
    last = ((1 << 64) - 1).to_bytes(8, "big")
    assert split_text.is_reported(last)
    assert not is_held_out(last, 0.05)


def record(rate, chosen, reported):
    report = {
        "forward_kl": reported,
        "mean_k": 16.1,
        "kl_at_k": reported,
        "perplexity_at_k": 9.0,
        "teacher_perplexity": 8.0,
    }
    return {
        "arm": "smk",
        "tokens": 9,
        "rate": rate,
        "gate_rate": 1.0,
        "choose": {"before": {"forward_kl": 1.0}, "after": {"forward_kl": chosen}},
        "report": report,
        "unseen": None,
    }


def test_an_arm_that_ends_farther_than_it_began_has_no_numbers():
    (*_, line) = table([record(1.0, 1.5, 1.4)], [*arms.ARMS])
    assert "| diverged |" in line
    assert "1.4" not in line


def test_a_rate_is_chosen_on_other_text_than_it_is_reported_on():
    lines = [*table([record(1.0, 0.2, 0.5), record(2.0, 0.1, 0.6)], [*arms.ARMS])]
    assert len(lines) == 3
    assert "| 2, 1 of 2 | 1 | 0.6000 |" in lines[-1]


def test_thin_matrices_cost_no_more_than_the_share():
    rank = low_rank.rank_of(576, 1536, 0.5)
    assert rank * (576 + 1536) <= 0.5 * 576 * 1536 < (rank + 1) * (576 + 1536)


@pytest.mark.slow
def test_runs_leave_their_lines_and_are_not_made_again(tmp_path):
    options = ["--smoke", "--tokens", "128", "--out", tmp_path, "--arms", "smk", "low-rank"]
    first = run_module("experiments.arms", *options)
    lines = (tmp_path / "arms.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for record in map(json.loads, lines):
        assert record["tokens"] == 128
        assert record["report"]["kl_at_k"] >= 0
    again = run_module("experiments.arms", *options)
    assert (tmp_path / "arms.jsonl").read_text().splitlines() == lines
    assert first.splitlines()[-4:] == again.splitlines()[-4:]
