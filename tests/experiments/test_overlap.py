import json

import pytest

from experiments import overlap
from repository import run_module

WORDS = [f"word{n}" for n in range(60)]


def written(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" ".join(WORDS), 5),
        ("-- ".join(WORDS).upper(), 5),
        ("before " + " ".join(WORDS[:40]), 3),
        (" ".join(WORDS[:19]), 0),
        (" ".join(reversed(WORDS)), 0),
    ],
    ids=["the same", "other case and signs", "a part, elsewhere", "one word too few", "backwards"],
)
def test_runs_of_words_are_found_wherever_they_stand(text, found, tmp_path):
    of = written(tmp_path / "of.jsonl", " ".join(WORDS))
    within = written(tmp_path / "within.jsonl", "another document", text)
    assert overlap.overlap(of, within) == (found, 5)


def test_the_share_is_printed(tmp_path):
    of = written(tmp_path / "of.jsonl", " ".join(WORDS))
    said = run_module("experiments.overlap", "--of", of, "--within", of)
    assert said.strip() == "5 of 5 runs of 20 words: 100.00%"
