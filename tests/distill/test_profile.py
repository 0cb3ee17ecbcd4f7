"""A profiled run leaves a trace and two tables, and no student."""

import json

import pytest
from rich.console import Console

from tiny import CONFIG, change, save_teacher, write_corpus
from tiny_onn.cli import main as cli
from tiny_onn.config.read import resolved_json
from tiny_onn.config.schema import RunConfig
from tiny_onn.distill.profile import OUTSIDE, PROFILED_STEPS, render, run_profile
from tiny_onn.errors import UserError

PHASES = ("teacher forward", "student forward", "loss", "backward", "optimizer")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("run")
    return change(
        CONFIG,
        teacher={"path": str(save_teacher(folder / "teacher"))},
        data={"sources": (str(write_corpus(folder / "corpus")),), "row_tokens": 64},
        train={"rows_per_step": 2, "checkpointing": "layer", "expert_path": "dense"},
    )


@pytest.fixture(scope="module")
def profiled(config, tmp_path_factory):
    """The folder and the result."""
    out = tmp_path_factory.mktemp("profile") / "run"
    return out, run_profile(config, out=out, argv=["tiny-onn"])


def test_the_trace_holds_the_phases_of_every_profiled_step(profiled):
    out, _ = profiled
    events = json.loads((out / "profile" / "trace.json").read_text())["traceEvents"]
    for phase in PHASES:
        spans = [e for e in events if e["name"] == phase and e["ph"] == "X"]
        # Two rows a step, one update.
        assert len(spans) == PROFILED_STEPS * (1 if phase == "optimizer" else 2)
    assert {e["name"] for e in events} >= {"aten::mm", "_DenseMaskedBackward"}


def test_phases_add_up_to_the_step_and_operators_stay_inside_it(profiled):
    out, result = profiled
    assert tuple(result.phase_milliseconds) == (*PHASES, OUTSIDE)
    assert sum(result.phase_milliseconds.values()) == pytest.approx(result.step_milliseconds)
    assert min(result.phase_milliseconds.values()) > 0
    times = [operator.milliseconds for operator in result.operators]
    assert times == sorted(times, reverse=True)
    assert 0 < sum(times) <= result.step_milliseconds
    names = {operator.name for operator in result.operators}
    assert "aten::mm" in names
    assert not names & {*PHASES, "ProfilerStep*"}
    assert json.loads((out / "profile" / "summary.json").read_text()) == result.as_dict()


def test_nothing_of_a_run_is_left_but_its_settings(profiled):
    out, _ = profiled
    names = {entry.name for entry in out.iterdir()}
    assert names == {"config.json", "environment.json", "profile"}


def test_a_refused_profile_leaves_no_folder(config, tmp_path):
    nowhere = change(config, teacher={"path": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match="nowhere"):
        run_profile(nowhere, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tables_name_every_phase(profiled):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(render(profiled[1]))
    text = capture.get()
    assert all(phase in text for phase in PHASES)


def test_the_command_profiles_and_ends_cleanly(config, tmp_path, capsys):
    settings = json.loads(resolved_json(config))
    overrides = [
        f"--set={section}.{key}={json.dumps(settings[section][key])}"
        for section, key in (
            ("teacher", "path"),
            ("teacher", "dtype"),
            ("data", "sources"),
            ("data", "row_tokens"),
            ("experts", "num_experts"),
            ("experts", "calibration_tokens"),
            ("router", "target_k"),
            ("train", "compile"),
            ("train", "device"),
        )
    ]
    out = tmp_path / "run"
    argv = ["distill", "--preset", "demo", *overrides, "--out", str(out), "--profile"]
    assert cli.main(argv) == 0
    assert "student forward" in capsys.readouterr().out
    assert (out / "profile" / "trace.json").exists()
    assert cli.main([*argv, "--resume"]) == 2
    assert "--resume" in capsys.readouterr().err
