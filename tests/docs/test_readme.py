"""The README's commands parse, its presets and files exist, and its Python runs."""

import re
import shlex

import pytest
import torch

from repository import ROOT
from tiny import make_student, save_teacher
from tiny_onn.cli import main as cli
from tiny_onn.config.read import load_config, preset_names
from tiny_onn.config.schema import TeacherConfig
from tiny_onn.teacher.load import load_dense

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
SHELL = [text for language, text in BLOCKS if not language]
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    line.partition(" #")[0].partition(" >")[0]
    for text in SHELL
    for line in text.replace("\\\n", " ").splitlines()
    if line.startswith("tiny-onn")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command, monkeypatch):
    ran = []

    def record(verb):
        ran.append(verb)

    named = (cli.Demo, cli.Plan, cli.Distill, cli.Eval, cli.Probe, cli.Report, cli.Compare)
    for verb in (*named, cli.Generate, cli.Config):
        monkeypatch.setattr(verb, "__call__", record)
    assert cli.main(shlex.split(command)[1:]) == 0
    (verb,) = ran
    if getattr(verb, "preset", None):
        load_config(None, verb.preset, getattr(verb, "overrides", ()))


def test_the_readme_has_commands_for_every_verb_that_needs_one():
    verbs = {shlex.split(command)[1] for command in COMMANDS}
    assert verbs == {"plan", "distill", "eval", "probe", "report", "compare", "generate", "config"}


def test_the_first_two_commands_are_targets_of_the_makefile():
    first = SHELL[0].splitlines()
    assert [line.split()[:2] for line in first] == [["make", "demo"], ["make", "test"]]
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo:", targets, re.MULTILINE)
    assert re.search(r"^test:", targets, re.MULTILINE)


def test_python_runs_on_a_student(tmp_path, capsys):
    (code,) = PYTHON
    dense, tokenizer = load_dense(
        TeacherConfig(path=str(save_teacher(tmp_path / "dense")), dtype="float32"),
        torch.device("cpu"),
    )
    make_student(dense).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code = code.replace("runs/mine/student", str(tmp_path))
    assert str(tmp_path) in code
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_presets_are_the_ones_that_exist():
    named = re.findall(r"^\| `([a-z-]+)` \|", README, re.MULTILINE)
    assert sorted(named) == sorted(preset_names())


def test_modules_that_are_named_exist():
    for name in re.findall(r"`((?:ops/)?[a-z_]+\.py)`", README):
        assert any((ROOT / "src" / folder / name).exists() for folder in ("", "tiny_onn")), name


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200
