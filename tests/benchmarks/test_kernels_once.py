"""The program for compute-sanitizer runs every kernel that there is, and says if it did not."""

import re
from types import SimpleNamespace

import pytest

from benchmarks import kernels_once
from repository import ROOT, run_module

DEFINED = re.compile(r"^@triton\.jit\n@no_type_check\ndef (\w+_kernel)\(", re.MULTILINE)


def test_every_kernel_of_the_package_runs_once_in_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    printed = run_module("benchmarks.kernels_once")
    (ran,) = (line for line in printed.splitlines() if line.startswith("ran: "))
    assert ran.removeprefix("ran: ").split(", ") == sorted(kernels_in_the_sources())
    assert "did not run" not in printed


def kernels_in_the_sources():
    """Return the names of all kernels that stand in the sources."""
    files = (ROOT / "src" / "tiny_onn").rglob("*.py")
    return [name for file in files for name in DEFINED.findall(file.read_text("utf-8"))]


def test_the_command_at_the_top_names_every_layer():
    last = len(kernels_once.SPARSE) + len(kernels_once.DECODED) - 1
    assert f"seq 0 {last} | xargs" in (kernels_once.__doc__ or "")


def test_modules_of_kernels_are_all_asked_for_theirs():
    files = (ROOT / "src" / "tiny_onn").rglob("*.py")
    with_kernels = {file.stem for file in files if DEFINED.search(file.read_text("utf-8"))}
    assert with_kernels == set(kernels_once.MODULES)


class Kernel:
    """What stands for a compiled kernel: it has its function, and is launched on a grid."""

    fn = None

    def __getitem__(self, grid):
        return lambda: grid


def test_a_kernel_that_did_not_run_is_named_and_fails(monkeypatch, capsys):
    module = SimpleNamespace(first_kernel=Kernel(), other_kernel=Kernel())
    original = module.first_kernel
    monkeypatch.setattr(kernels_once, "import_module", lambda _: module)
    monkeypatch.setattr(kernels_once, "MODULES", ("any",))
    monkeypatch.setattr(kernels_once, "SPARSE", ("case",))
    monkeypatch.setattr(kernels_once, "DECODED", ())
    monkeypatch.setattr(kernels_once, "train_once", lambda _: module.first_kernel[3]())
    assert kernels_once.main() == 1
    assert capsys.readouterr().out == "ran: first_kernel\ndid not run: other_kernel\n"
    assert module.first_kernel is original
    # A part of the layers need not run them all.
    assert kernels_once.main(["0"]) == 0
