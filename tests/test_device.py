"""Number formats by device: what `auto` means, what is warned of, what finished students run in."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from repository import ROOT
from tiny import change, write_run
from tiny_onn import device as device_module
from tiny_onn.config.schema import RunConfig
from tiny_onn.device import (
    bfloat16_slowdown,
    multiplies_bfloat16,
    number_format,
    with_number_format,
    without_emulation,
)
from tiny_onn.distill.loop import run_distill
from tiny_onn.ops.regions import separate_compiled_code
from tiny_onn.planning.plan import plan
from tiny_onn.runs.folder import read_run_config
from tiny_onn.runs.students import load_student

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def cpu_that(monkeypatch):
    """Let this machine's CPU have bfloat16 instructions, or none."""

    def arrange(native):
        monkeypatch.setattr(device_module, "multiplies_bfloat16", lambda _: native)

    return arrange


def asked(dtype):
    return change(RunConfig(), teacher={"dtype": dtype})


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_what_the_cpu_has_instructions_for_and_is_told(cpu_that, capsys, native, dtype):
    cpu_that(native)
    assert number_format("auto", CPU) == dtype
    assert with_number_format(asked("auto"), CPU) == asked(dtype)
    said = capsys.readouterr().err
    assert said.startswith(f'teacher.dtype = "{dtype}": ')
    assert ("has no bfloat16 instructions" in said) == (not native)


def test_an_explicit_format_stays_and_emulation_is_warned_of_with_its_factor(cpu_that, capsys):
    cpu_that(False)
    assert with_number_format(asked("float32"), CPU) == asked("float32")
    assert capsys.readouterr().err == ""
    assert with_number_format(asked("bfloat16"), CPU) == asked("bfloat16")
    (line,) = capsys.readouterr().err.splitlines()
    factor = float(line.split("bfloat16 takes ")[1].split(" times")[0])
    assert factor > 0
    cpu_that(True)
    with_number_format(asked("bfloat16"), CPU)
    assert capsys.readouterr().err == ""


def test_the_measured_factor_is_a_ratio_of_times():
    assert 0.05 < bfloat16_slowdown(CPU) < 500


@pytest.mark.parametrize(
    "variables",
    [{"ATEN_CPU_CAPABILITY": "avx2"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}],
    ids=lambda variables: next(iter(variables)),
)
def test_the_environment_can_take_the_instructions_away(variables):
    code = (
        "import torch; from tiny_onn.device import multiplies_bfloat16;"
        "print(multiplies_bfloat16(torch.device('cpu')))"
    )
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_this_machines_answer_agrees_with_its_flags():
    allowed = {"ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"}.isdisjoint(os.environ)
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    flags = next(line for line in lines if line.startswith(("flags", "Features"))).split()
    has = bool({"avx512_bf16", "amx_tile", "bf16"} & set(flags))
    assert multiplies_bfloat16(CPU) == (has and allowed)


def test_a_run_records_what_auto_was_and_goes_on_in_it(tmp_path, cpu_that):
    config = write_run(tmp_path, teacher={"dtype": "auto"}, train={"tokens": 2 * 64})
    cpu_that(False)
    run_distill(config, out=tmp_path / "run")
    assert read_run_config(tmp_path / "run").teacher.dtype == "float32"
    # Elsewhere `auto` would be the other format; the run keeps its own.
    cpu_that(True)
    longer = change(config, train={"tokens": 3 * 64})
    run_distill(longer, out=tmp_path / "run", resume=True, allow_change=["train.tokens"])
    assert read_run_config(tmp_path / "run").teacher.dtype == "float32"


def test_a_finished_student_runs_in_float32_where_bfloat16_is_emulated(tmp_path, cpu_that, capsys):
    config = write_run(tmp_path, teacher={"dtype": "bfloat16"}, train={"tokens": 2 * 64})
    cpu_that(True)
    run_distill(config, out=tmp_path / "run")
    native = load_student(str(tmp_path / "run"), CPU)
    assert (native.student.dtype, native.config.teacher.dtype) == (torch.bfloat16, "bfloat16")
    cpu_that(False)
    capsys.readouterr()
    for folder in (tmp_path / "run", tmp_path / "run" / "student"):
        emulated = load_student(str(folder), CPU)
        assert (emulated.student.dtype, emulated.config.teacher.dtype) == (torch.float32, "float32")
        assert "computing in float32" in capsys.readouterr().err
    for name, tensor in emulated.student.state_dict().items():
        assert torch.equal(tensor, native.student.state_dict()[name].to(tensor.dtype)), name


def test_nothing_changes_for_a_student_in_float32(cpu_that):
    cpu_that(False)
    assert without_emulation(asked("float32"), CPU) == asked("float32")


def test_a_plan_counts_with_the_format_of_its_device(monkeypatch):
    monkeypatch.setattr("tiny_onn.planning.sources.number_format", lambda *_: "float32")
    config = replace(RunConfig(), teacher=replace(RunConfig().teacher, dtype="auto"))
    here, gpu = (plan(config, "SmolLM2-135M", device) for device in ("cpu", "RTX 4090"))
    assert here.as_dict()["teacher_dtype"] == "float32"
    assert gpu.as_dict()["teacher_dtype"] == "bfloat16"
    assert here.moments[0].total > gpu.moments[0].total


def test_compiled_code_is_kept_apart_by_instruction_set(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    folders = []
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        for _ in range(2):
            separate_compiled_code()
        folders.append(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
    assert folders[0] != folders[1]
    assert {folder.parent for folder in folders} == {tmp_path}


def test_a_run_without_a_compiler_goes_on_uncompiled_and_says_so(tmp_path):
    code = (
        "from pathlib import Path; from tiny import change, write_run;"
        "from tiny_onn.distill.loop import run_distill; folder = Path.cwd();"
        "settings = {'compile': True, 'device': 'cpu', 'tokens': 128};"
        "config = change(write_run(folder), train=settings);"
        "run_distill(config, out=folder / 'run')"
    )
    missing = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    paths = {"PYTHONPATH": str(ROOT / "tests")}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | missing | paths,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    told = [line for line in ran.stderr.splitlines() if line.startswith("train.compile:")]
    assert len(told) == 1
    assert "No working C++ compiler found" in told[0]
    assert (tmp_path / "run" / "student").is_dir()
