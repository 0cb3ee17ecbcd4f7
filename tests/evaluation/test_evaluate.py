"""The verb `eval` on a run, on a student's folder and on text, and what it refuses."""

import json
import shutil
from typing import Any

import pytest

from tiny import change, make_dense, make_tokenizer, write_run
from tiny_onn.config.read import resolved_json
from tiny_onn.config.schema import RunConfig
from tiny_onn.distill.loop import run_distill
from tiny_onn.errors import UserError
from tiny_onn.evaluation.evaluate import run_eval
from tiny_onn.runs.files import write_json
from tiny_onn.runs.folder import read_run_config
from tiny_onn.runs.metrics import read_metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    config = write_run(
        folder,
        train={"tokens": 128},
    )
    return folder / "run", run_distill(config, out=folder / "run")


def evaluated(model, text=None, max_tokens=128, **options):
    return run_eval(str(model), text=text, device="cpu", max_tokens=max_tokens, **options)


def test_a_run_evaluates_to_what_it_ended_with(finished):
    out, result = finished
    got = evaluated(out)
    for name, value in result.after.as_dict().items():
        assert got[name] == pytest.approx(value, rel=1e-5), name


def test_advice_on_a_budget_is_given_where_it_is_missed(finished, tmp_path, monkeypatch):
    out, _ = finished
    run = shutil.copytree(out, tmp_path / "a run")

    def advice(*, met):
        budget = {"target_k": 2.0, "mean_k": 3.0, "error": 0.5, "met": met}
        monkeypatch.setattr("tiny_onn.evaluation.evaluate.budget_report", lambda *_: budget)
        return evaluated(run)["budget_advice"]

    assert advice(met=True) is None
    assert advice(met=False).startswith("the thresholds were settled on other text")
    write_json(run / "summary.json", {"interrupted": True, "steps": 2})
    assert f"`tiny-onn distill --resume --out '{run}'` goes on" in advice(met=False)


def test_a_students_folder_finds_its_teacher(finished, tmp_path):
    out, _ = finished
    shutil.copytree(out / "student", tmp_path / "student")
    (tmp_path / "text.txt").write_text("the cat sat on the mat")
    from_run, alone = (evaluated(m, tmp_path / "text.txt") for m in (out, tmp_path / "student"))
    assert alone["forward_kl"] == pytest.approx(from_run["forward_kl"], rel=1e-4)
    assert alone["num_tokens"] == from_run["num_tokens"] != 0
    # The folder tells the student's own target, which is not the default.
    assert (
        alone["budget"]["target_k"] == from_run["budget"]["target_k"] != RunConfig().router.target_k
    )


def test_a_teacher_of_another_vocabulary_is_refused(finished, tmp_path):
    out, _ = finished
    other = tmp_path / "other"
    shutil.copytree(out, tmp_path / "run")
    make_dense(vocab_size=400).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    changed = change(read_run_config(out), teacher={"path": str(other)})
    write_json(tmp_path / "run" / "config.json", json.loads(resolved_json(changed)))
    with pytest.raises(UserError, match="with a vocabulary of 400, expected the student's 320"):
        evaluated(tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "no such file"), ("", "no text in it"), (b"\xff\xfe\xff", "UTF-8")],
)
def test_bad_text_is_named_by_its_argument(finished, tmp_path, text, said):
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"^--text: .*{said}"):
        evaluated(finished[0], path)


@pytest.mark.parametrize(
    ("name", "content"), [("config.json", '{"model_type": "tiny_onn"'), ("model.safetensors", "")]
)
def test_a_damaged_student_is_told_with_what_helps(finished, tmp_path, name, content):
    run = shutil.copytree(finished[0], tmp_path / "run")
    (run / "student" / name).write_text(content)
    remedy = "remove the folder and write it again with --resume"
    with pytest.raises(UserError, match=rf"^MODEL: got .*student, expected .*; {remedy}$"):
        evaluated(run)


def test_what_is_no_student_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^MODEL: got .*, expected a run folder"):
        evaluated(tmp_path)


@pytest.fixture(scope="module")
def overshot(tmp_path_factory):
    """A run whose last steps, at a rate much too high, undo what the first had reached."""
    folder = tmp_path_factory.mktemp("overshot")
    config = write_run(
        folder,
        optim={"expert_lr": 0.3, "warmup_fraction": 1.0, "decay_fraction": 0.0},
        train={
            "tokens": 8 * 64,
            "eval_every_tokens": 64,
            "save_every_tokens": 2 * 64,
            "stop_if_worse": False,
        },
    )
    run_distill(config, out=folder / "run")
    return folder / "run"


def test_the_best_checkpoint_is_named_and_can_be_had(overshot, capsys):
    records: list[dict[str, Any]] = read_metrics(overshot / "metrics.jsonl")
    records = [record for record in records if record["kind"] in ("eval", "end")]
    best = min(records, key=lambda record: record["forward_kl"])
    assert best["step"] < records[-1]["step"] == 8
    for which, record in (("newest", records[-1]), ("best", best), (str(best["step"]), best)):
        got = evaluated(overshot, checkpoint=which)
        said = capsys.readouterr().err
        assert got["step"] == record["step"]
        assert got["forward_kl"] == pytest.approx(record["forward_kl"], rel=1e-4)
        assert got["mean_k"] == pytest.approx(record["mean_k"], rel=1e-4)
        assert f"{overshot}: step {record['step']}, the " in said
        assert ("--checkpoint best" in said) == (which == "newest")


@pytest.mark.parametrize("which", ["3", "worst", "-1", "", "\u0664"])
def test_a_checkpoint_that_is_not_there_is_refused(overshot, which):
    with pytest.raises(
        UserError, match=rf"--checkpoint: got {which}, expected newest, best or .*, 8;"
    ):
        evaluated(overshot, checkpoint=which)


def test_a_best_that_is_gone_is_refused(overshot, tmp_path):
    shutil.copytree(overshot, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    shutil.rmtree(tmp_path / "run" / summary["best"]["checkpoint"])
    with pytest.raises(UserError, match=f"got best, step {summary['best']['step']}, expected"):
        evaluated(tmp_path / "run", checkpoint="best")


def test_one_student_has_no_checkpoints(overshot):
    with pytest.raises(UserError, match=r"--checkpoint: got best with .*, one student"):
        evaluated(overshot / "student", checkpoint="best")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "hi"}, r"got 'text', expected one of: prompt; eval reads .* rename the field"),
        ({"text": 3}, r"'text' holds int, expected text; eval reads the field"),
        ({"messages": [{"role": "user"}]}, r"message 1 of 'messages': got no content"),
        ({"messages": [{"role": "user", "content": "hi"}]}, r"document 0: got a chat, and the tok"),
    ],
)
def test_text_that_cannot_be_read_is_told_in_words_of_eval(finished, tmp_path, row, message):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=rf"^--text: {path}.*{message}") as raised:
        evaluated(finished[0], path)
    assert "; correct it" not in str(raised.value)
    assert "name another field" not in str(raised.value)
