"""What a run shows where nobody draws a live line."""

from dataclasses import fields
from typing import Any

import pytest

from tiny_onn.config.schema import RouterConfig
from tiny_onn.distill import progress
from tiny_onn.runs.records import Evaluation

RECORD = {"kind": "step", "loss": 0.5, "forward_kl": 0.5, "mean_k": 16.0, "tokens_per_s": 300.0}


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 2), (1e9, 0)])
def test_a_file_gets_a_line_now_and_then(monkeypatch, capsys, seconds, lines):
    monkeypatch.setattr(progress, "LINE_SECONDS", seconds)
    with progress.RunProgress("distill", 4096) as shown:
        shown.update(1024, RECORD)
        shown.update(2048, RECORD)
    found = [line for line in capsys.readouterr().err.splitlines() if "of 4,096" in line]
    assert len(found) == lines
    if lines:
        assert found[0] == "distill: 1,024 of 4,096 tokens  KL 0.500  k 16.0  300 tok/s"


def test_an_evaluation_that_misses_its_budget_says_so(capsys):
    for mean_k, missed in ((17.0, True), (16.1, False)):
        numbers: dict[str, Any] = dict.fromkeys((field.name for field in fields(Evaluation)), 0.5)
        result = Evaluation(**{**numbers, "num_tokens": 9, "mean_k": mean_k})
        router = RouterConfig(selection="budget", target_k=16.0)
        progress.show_evaluation("distill", 1024, result, router)
        assert ("OFF TARGET" in capsys.readouterr().err) == missed
