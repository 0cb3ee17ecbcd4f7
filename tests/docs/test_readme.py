"""The README names every verb, preset and package, and its Python runs."""

import re
import shlex

import torch

from repository import ROOT
from tiny import make_student, save_teacher
from tiny_onn.cli import main as cli
from tiny_onn.config.read import preset_names
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


# `make demo` runs the verb `demo`.
VERBS = {
    *("plan", "distill", "watch", "eval", "probe", "report", "compare"),
    *("generate", "chat", "export", "config", "cache"),
}


def test_the_readme_has_commands_for_every_verb_that_needs_one():
    verbs = {shlex.split(command)[1] for command in COMMANDS}
    assert verbs == VERBS


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


def test_the_plan_prints_the_time_that_stands_beside_its_command(capsys):
    (line,) = re.findall(r"^tiny-onn plan .*$", README, re.MULTILINE)
    command, _, comment = line.partition(" #")
    assert cli.main(shlex.split(command)[1:]) == 0
    time, _, _ = comment.partition(";")
    assert time.strip() in " ".join(capsys.readouterr().out.split())


def test_presets_are_the_ones_that_exist():
    named = re.findall(r"^\| `([a-z-]+)` \|", README, re.MULTILINE)
    assert sorted(named) == sorted(preset_names())


def test_the_map_has_a_line_for_every_package_and_module():
    (map_,) = [text for language, text in BLOCKS if language == "text"]
    named = [line.partition("  ")[0].split(", ") for line in map_.splitlines()]
    package = ROOT / "src" / "tiny_onn"
    expected = {
        f"{path.name}/" if path.is_dir() else path.stem
        for path in package.iterdir()
        if not path.name.startswith("_")
    }
    assert sorted(name for names in named for name in names) == sorted(expected)


def test_what_a_newcomer_looks_for_first_is_named():
    for question, file in (
        ("gate learns", "ops/router_gradient.py"),
        ("budget's threshold moves", "routing/thresholds.py"),
        ("new surprise goes", "ops/reference.py"),
        ("checkpoint is written", "runs/checkpoint.py"),
    ):
        (line,) = [line for line in README.splitlines() if question in line]
        assert f"`{file}`" in line


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200
