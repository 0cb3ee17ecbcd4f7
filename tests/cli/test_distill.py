"""The verb `distill` on a run that has finished, or that was killed while it wrote its end."""

import json
import shutil
from typing import Any

import pytest

from run_records import assert_same_run, at_step, records
from tiny import change, write_run
from tiny_onn.cli.main import main
from tiny_onn.distill import saving as saving_module
from tiny_onn.distill.loop import run_distill

pytestmark = pytest.mark.usefixtures("quiet")

TOKENS = 2 * 64


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    # The second step reads more than is asked for.
    return write_run(tmp_path_factory.mktemp("finished"), train={"tokens": TOKENS - 9})


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    run_distill(config, out=out)
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def no_work(monkeypatch):
    """Let nothing of a run begin."""
    monkeypatch.setattr("tiny_onn.distill.loop.run_distill", None)


def files(folder):
    """The bytes and the time of every file."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("options", [[], ["--allow-change", "train.tokens"]], ids=str)
def test_a_finished_run_says_so_and_how_to_train_it_further(run, capsys, options):
    before = files(run)
    assert main(["distill", "--resume", "--out", str(run), *options]) == 0
    said = capsys.readouterr().err
    assert f"the run has finished after {TOKENS} tokens, and its student is {run}/student" in said
    assert f"--resume --out {run} --set train.tokens=N --allow-change train.tokens`" in said
    assert f"with N above {TOKENS}" in said
    assert files(run) == before


@pytest.mark.usefixtures("no_work")
def test_a_finished_run_without_checkpoints_is_not_started_again(run, capsys):
    shutil.rmtree(run / "checkpoints")
    assert main(["distill", "--resume", "--out", str(run)]) == 0
    assert "cannot be trained further, because its checkpoints are gone" in capsys.readouterr().err


def test_a_finished_run_can_be_trained_further_as_it_says(run, capsys):
    more = ["--set", f"train.tokens={2 * TOKENS}", "--allow-change", "train.tokens"]
    assert main(["distill", "--resume", "--out", str(run), *more]) == 0
    assert [row["step"] for row in records(run) if row["kind"] == "step"] == [1, 2, 3, 4]
    capsys.readouterr()
    assert main(["distill", "--resume", "--out", str(run)]) == 0
    assert f"the run has finished after {2 * TOKENS} tokens" in capsys.readouterr().err


def test_a_run_that_trains_further_does_not_count_as_finished(config, run):
    def look():
        # Its first end stays known until the next one.
        assert json.loads((run / "summary.json").read_text())["steps"] == 2
        assert json.loads((run / "summary.json").read_text())["interrupted"]
        raise ConnectionError

    longer = change(config, train={"tokens": 2 * TOKENS})
    options: dict[str, Any] = {"resume": True, "allow_change": ["train.tokens"]}
    with pytest.raises(ConnectionError):
        run_distill(longer, out=run, after_step=at_step(3, look), **options)
    assert main(["distill", "--resume", "--out", str(run)]) == 0
    assert [row["step"] for row in records(run) if row["kind"] == "step"] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["finish_tables", "save_student", "write_model_card"])
def test_an_end_that_was_cut_off_is_completed(config, finished, tmp_path, monkeypatch, name):
    def fail(*_arguments, **_options):
        raise ConnectionError

    out = tmp_path / "run"
    monkeypatch.setattr(saving_module, name, fail)
    with pytest.raises(ConnectionError):
        run_distill(config, out=out)
    monkeypatch.undo()
    assert main(["distill", "--resume", "--out", str(out)]) == 0
    assert_same_run(out, finished)
    for file in ("summary.json", "student/README.md", "student/tokenizer.json"):
        assert (out / file).is_file()


def test_a_student_that_was_removed_is_written_again(finished, run):
    shutil.rmtree(run / "student")
    assert main(["distill", "--resume", "--out", str(run)]) == 0
    assert_same_run(run, finished)
