"""What the pages name is there: files, headings, commands and programs."""

import ast
import importlib.util
import re
import shlex

import pytest

from benchmarks.registry import NAMES
from repository import ROOT
from tiny_onn.cli import main as cli
from tiny_onn.config.read import load_config

PAGES = (
    *("README.md", "CONTRIBUTING.md", "experiments/README.md", "reliability/README.md"),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
TEXTS = {name: (ROOT / name).read_text("utf-8") for name in PAGES}
BLOCK = re.compile(r"```(?:\w*)\n(.*?)```|((?:^    .+\n)+)", re.DOTALL | re.MULTILINE)
VERBS = (
    "Demo",
    "Plan",
    "Cache",
    "Distill",
    "Watch",
    "Eval",
    "Probe",
    "Report",
    "Compare",
    "Generate",
    "Chat",
    "Export",
    "Config",
)

each_page = pytest.mark.parametrize("name", PAGES)


def lines_of(text):
    """Yield the lines of all blocks of code, those that end in a backslash joined to the next."""
    for fenced, indented in BLOCK.findall(text):
        yield from (line.strip() for line in (fenced or indented).replace("\\\n", " ").splitlines())


def anchors_of(text):
    """Return the addresses of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_files_that_are_named_exist(name):
    roots = (ROOT, ROOT / "src" / "tiny_onn", (ROOT / name).parent)
    files = re.findall(r"`([a-z_/]+\.py)`", TEXTS[name])
    assert [file for file in files if not any((root / file).is_file() for root in roots)] == []


@each_page
def test_links_lead_to_files_and_headings(name):
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[name]):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in anchors_of(path.read_text("utf-8")), target


@each_page
def test_commands_are_understood(name, monkeypatch):
    ran = []

    def record(verb):
        ran.append(verb)

    for verb in VERBS:
        monkeypatch.setattr(getattr(cli, verb), "__call__", record)
    for line in lines_of(TEXTS[name]):
        if not line.startswith("tiny-onn"):
            continue
        for command in line.partition(" #")[0].partition(" >")[0].split(" && "):
            assert cli.main(shlex.split(command)[1:]) == 0, command
            if preset := getattr(verb := ran.pop(), "preset", None):
                load_config(None, preset, getattr(verb, "overrides", ()))


@each_page
def test_programs_that_are_named_exist(name):
    text = " ".join(TEXTS[name].split())
    for program in re.findall(r"python -m ([a-z_.]+)", text):
        assert importlib.util.find_spec(program.rstrip(".")) is not None, program
    named = set(re.findall(r"python -m benchmarks ([a-z_]+)", text))
    assert named <= set(NAMES)


def test_contributing_shows_the_layers_that_are_checked():
    tree = ast.parse((ROOT / "tests" / "test_conventions.py").read_text("utf-8"))
    (layers,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    ]
    (block,) = re.findall(r"```text\n(.*?)```", TEXTS["CONTRIBUTING.md"], re.DOTALL)
    shown = [row.strip().split(", ") for row in block.split("<")]
    assert shown == [list(row) for row in layers if row != ("__init__",)]
