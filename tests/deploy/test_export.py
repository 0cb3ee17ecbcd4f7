"""The verb export: what is refused in one line, and a destination that appears whole."""

import pytest
import torch

from export_cases import save_student
from repository import ROOT
from tiny import save_teacher
from tiny_onn.cli.export import TARGETS
from tiny_onn.cli.main import main
from tiny_onn.deploy import export
from tiny_onn.deploy.answers import load_speaker
from tiny_onn.deploy.export import EXAMPLES, WRITERS, run_export
from tiny_onn.errors import UserError

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return str(save_student(tmp_path_factory.mktemp("export") / "student"))


def test_every_target_has_its_writer_and_its_example():
    assert tuple(WRITERS) == tuple(EXAMPLES) == TARGETS
    assert EXAMPLES["transformers"] in (ROOT / "docs" / "exports.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--to", "onnx"), "--to: got onnx, expected one of transformers, vllm, gguf, dense"),
        (("--to", "gguf", "--keep", "4"), "--keep: got 4 with --to gguf, expected --to dense"),
        (("--to", "dense", "--fixed-k"), "--fixed-k: got --to dense, expected --to gguf"),
        (("--to", "dense", "--keep", "0"), "--keep: got 0, expected an integer >= 1"),
    ],
)
def test_mistakes_are_told_in_one_line(student, tmp_path, capsys, options, said):
    assert main(["export", student, *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tiny-onn: error: {said}")
    assert error.count("\n") == 1


def test_a_folder_that_is_no_student_is_refused(tmp_path, capsys):
    teacher = save_teacher(tmp_path / "teacher")
    for model in (teacher, tmp_path / "missing"):
        command = ["export", str(model), "--to", "dense", "--out", str(tmp_path / "out")]
        assert main(command) == 2
        assert "tiny-onn: error: MODEL: got" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_destination_that_exists_is_left_alone(student, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    mine = out / "mine" if kind == "folder" else out
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"^--out: got .*, which exists already"):
        run_export(student, to="dense", out=out)
    assert mine.read_text() == "mine"


def test_an_export_that_stops_leaves_nothing(student, tmp_path, monkeypatch):
    def stops(job, folder):
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "WRITERS", {"dense": stops})
    with pytest.raises(UserError, match=r"^--out: cannot write .*No space left on device"):
        run_export(student, to="dense", out=tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []


def test_the_command_says_what_is_lost(student, tmp_path, capfd):
    out = tmp_path / "out"
    assert main(["export", student, "--to", "dense", "--out", str(out)]) == 0
    assert "the sparsity is lost" in capfd.readouterr().err.replace("\n", " ")
    assert (out / "model.safetensors").is_file()


def test_an_export_is_no_model_of_generate_and_the_student_is_named_instead(student, tmp_path):
    run_export(student, to="transformers", out=tmp_path / "out")
    with pytest.raises(UserError, match=r"^MODEL: got .*out, .* an export of a student, name the"):
        load_speaker(str(tmp_path / "out"), torch.device("cpu"))
