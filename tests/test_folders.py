"""Which of the repository's folders import which, and that a test can stand anywhere in tests/."""

import ast

import pytest

from repository import ROOT, run_module

# What the files of a folder must not import.
FORBIDDEN = {
    "src": ("benchmarks", "docs", "experiments", "reliability", "repository", "tiny"),
    "benchmarks": ("docs", "experiments", "reliability", "repository", "tiny"),
    "experiments": ("reliability", "repository", "tiny"),
    # Like experiments, it takes the set-up of programs and machines from benchmarks.
    "reliability": ("docs", "experiments"),
}
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def imported(path):
    """The first parts of the names of all modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_folders_depend_on_each_other_in_one_direction(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    bad = {str(path): imported(path) & set(FORBIDDEN[folder]) for path in files}
    assert {path: names for path, names in bad.items() if names} == {}


def test_no_test_imports_another():
    names = {path.stem for path in TESTS}
    assert {path.stem: imported(path) & names for path in TESTS if imported(path) & names} == {}


def test_no_test_counts_the_folders_above_itself():
    above = ("__file__).parent", "__file__).resolve")
    # This file holds the words that it looks for.
    others = [path for path in TESTS if path.name != "test_folders.py"]
    texts = {path.name: path.read_text("utf-8") for path in others}
    assert [name for name, text in texts.items() if any(word in text for word in above)] == []


def test_all_generated_pages_are_up_to_date():
    assert run_module("docs.tools", "--check") == ""
