"""A run whose teacher lies elsewhere now: `--teacher` names it, and another model is told apart."""

import json
import shutil
from typing import Any

import pytest
import torch

from tiny import change, make_tokenizer, save_teacher, write_run
from tiny_onn.config.read import resolved_json
from tiny_onn.deploy.generate import run_generate
from tiny_onn.distill.loop import run_distill
from tiny_onn.errors import UserError
from tiny_onn.evaluation.evaluate import run_eval
from tiny_onn.evaluation.frontier import run_frontier
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.probe.probe import run_probe
from tiny_onn.runs.files import write_json
from tiny_onn.runs.folder import read_run_config

pytestmark = pytest.mark.usefixtures("quiet")

GONE = "name it with --teacher PATH_OR_HUB_ID"


def make_moved(folder, dtype="float32"):
    """A finished run with a checkpoint on the way, its project renamed after it; other models."""
    old, new = folder / "a", folder / "b"
    old.mkdir()
    config = write_run(
        old,
        train={"tokens": 4 * 64, "save_every_tokens": 2 * 64},
        teacher={"path": str(save_teacher(old / "teacher")), "dtype": dtype},
    )
    run_distill(config, out=old / "run")
    old.rename(new)
    (new / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 2)
    # A run in the middle: the checkpoint is all there is of its student.
    shutil.copytree(new / "run", new / "middle")
    shutil.rmtree(new / "middle" / "student")
    save_teacher(new / "other_weights", seed=1)
    save_teacher(new / "other_sizes", hidden_size=16)
    save_teacher(new / "other_width", intermediate_size=96)
    save_teacher(new / "other_depth", num_hidden_layers=3)
    save_teacher(new / "other_family", "qwen3")
    return new


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    return make_moved(tmp_path_factory.mktemp("moved"))


@pytest.fixture(scope="module")
def moved_bfloat16(tmp_path_factory):
    return make_moved(tmp_path_factory.mktemp("moved_bfloat16"), "bfloat16")


def evaluated(project, model, **options) -> dict[str, Any]:
    text = project / "text.txt"
    return run_eval(str(project / model), text=text, device="cpu", max_tokens=64, **options)


def probed(project, model, out, **options):
    sizes: dict[str, Any] = {"layers": [0], "max_tokens": 12, "document_tokens": 6, "fit_tokens": 0}
    text = project / "text.txt"
    return run_probe(str(project / model), out=out, text=text, device="cpu", **sizes, **options)


def generated(model, **options):
    options = {"prompt": "the quick", "max_new_tokens": 4, "temperature": 0.0, "seed": 0, **options}
    return run_generate(str(model), device="cpu", **options)


@pytest.mark.parametrize("model", ["run", "middle", "run/student"])
def test_the_message_for_a_missing_teacher_names_the_option(moved, model, tmp_path):
    with pytest.raises(UserError, match=rf"^teacher.path: got .*a/teacher.*{GONE}$"):
        evaluated(moved, model)
    with pytest.raises(UserError, match=rf"^teacher.path: got .*a/teacher.*{GONE}$"):
        probed(moved, model, tmp_path)


@pytest.mark.parametrize("project", ["moved", "moved_bfloat16"])
def test_every_verb_finds_a_teacher_that_is_named(project, tmp_path, request, capsys):
    # A student alone is evaluated in longer rows, whose experts are computed another way.
    rounding = torch.finfo(torch.bfloat16).eps if project == "moved_bfloat16" else 1e-4
    project = request.getfixturevalue(project)
    teacher = str(project / "teacher")
    results = [evaluated(project, m, teacher=teacher) for m in ("run", "middle", "run/student")]
    for result in results:
        assert result["teacher"] == teacher
        assert result["forward_kl"] == pytest.approx(results[0]["forward_kl"], rel=rounding)
    for model in ("run", "middle", "run/student"):
        found = probed(project, model, tmp_path / model.replace("/", "-"), teacher=teacher)
        assert found["teacher"] == teacher
    points = run_frontier(
        str(project / "run"),
        budgets=[8.0],
        text=project / "text.txt",
        device="cpu",
        max_tokens=64,
        out=tmp_path / "frontier",
        teacher=teacher,
    )
    assert points["teacher"] == teacher
    assert "weights" not in capsys.readouterr().err


def test_only_a_checkpoint_needs_the_teacher_to_generate(moved, capsys):
    teacher = str(moved / "teacher")
    with pytest.raises(UserError, match=GONE):
        generated(moved / "middle")
    expected = generated(moved / "run")
    assert generated(moved / "middle", teacher=teacher) == expected
    assert generated(moved / "run", teacher=teacher) == expected
    assert generated(moved / "run", checkpoint="2", teacher=teacher)


@pytest.mark.parametrize("other", ["weights", "sizes", "width", "depth", "family"])
@pytest.mark.parametrize("model", ["run", "middle"])
def test_another_model_is_refused_for_a_run(moved, model, other, tmp_path):
    teacher = str(moved / f"other_{other}")
    with pytest.raises(UserError, match=rf"^--teacher: got {teacher}.*, expected (the|one of) "):
        evaluated(moved, model, teacher=teacher)
    with pytest.raises(UserError, match=rf"^--teacher: got {teacher}.*, expected (the|one of) "):
        probed(moved, model, tmp_path, teacher=teacher)


@pytest.mark.parametrize("other", ["sizes", "width", "depth", "family"])
def test_another_architecture_is_refused_for_a_student_alone(moved, other):
    teacher = str(moved / f"other_{other}")
    with pytest.raises(UserError, match=rf"^--teacher: got {teacher}.*, .*the student's sizes \("):
        evaluated(moved, "run/student", teacher=teacher)


def test_a_student_that_may_have_been_fine_tuned_is_measured_with_a_warning(moved, capsys):
    said = "its weights outside the MLPs differ from the student's"
    other = str(moved / "other_weights")
    assert evaluated(moved, "run/student", teacher=other)["teacher"] == other
    assert f"{other}: {said}" in capsys.readouterr().err
    tuned: Any = TinyOnnForCausalLM.from_pretrained(moved / "run" / "student")
    with torch.no_grad():
        tuned.get_input_embeddings().weight += 0.01
    tuned.save_pretrained(moved / "tuned")
    make_tokenizer().save_pretrained(moved / "tuned")
    evaluated(moved, "tuned", teacher=str(moved / "teacher"))
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("model", ["run", "middle"])
def test_another_model_in_the_recorded_place_is_refused(moved, model, tmp_path):
    shutil.copytree(moved / model, tmp_path / "run")
    config = change(read_run_config(moved / model), teacher={"path": str(moved / "other_weights")})
    write_json(tmp_path / "run" / "config.json", json.loads(resolved_json(config)))
    with pytest.raises(
        UserError, match=r"^teacher.path: got .*other_weights, another model, expected the run's"
    ):
        evaluated(moved, tmp_path / "run")
    assert evaluated(moved, tmp_path / "run", teacher=str(moved / "teacher"))


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"backbone_sha256": 3}'])
def test_a_run_that_recorded_no_backbone_is_used_with_a_warning(moved, tmp_path, content, capsys):
    shutil.copytree(moved / "middle", tmp_path / "run")
    record = tmp_path / "run" / "conversion.json"
    record.unlink()
    if content is not None:
        record.write_text(content)
    assert generated(tmp_path / "run", teacher=str(moved / "teacher"))
    assert f"{record}: got no backbone_sha256" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["run", "middle", "run/student"])
@pytest.mark.parametrize("name", ["", "./none", "text.txt"])
def test_a_name_that_leads_nowhere_is_refused_as_the_option(moved, model, name, monkeypatch):
    monkeypatch.chdir(moved)
    with pytest.raises(UserError, match=r"^--teacher: got "):
        evaluated(moved, model, teacher=name)


def test_a_student_that_records_no_teacher_asks_for_one(moved, tmp_path):
    shutil.copytree(moved / "run" / "student", tmp_path / "student")
    file = tmp_path / "student" / "config.json"
    settings = json.loads(file.read_text())
    del settings["teacher"]
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"^MODEL: got a student that does not record .*{GONE[8:]}"):
        evaluated(moved, tmp_path / "student")
    assert evaluated(moved, tmp_path / "student", teacher=str(moved / "teacher"))


def test_a_dense_model_has_no_teacher(moved, tmp_path):
    with pytest.raises(UserError, match=r"^--teacher: got x with .*, a dense model"):
        generated(moved / "teacher", teacher="x")
    with pytest.raises(UserError, match=r"^--teacher: got x with .*, a dense model"):
        probed(moved, "teacher", tmp_path, teacher="x")
