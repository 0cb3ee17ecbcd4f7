"""N steps, a stop, N more: the same bits as 2N steps; what may change in between, and what not."""

import json
import signal
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest

from run_records import at_step, send
from tiny import CONFIG, TIMES, change, save_teacher, write_corpus
from tiny_onn.config.changes import CHANGEABLE, REASONS, check_changes, with_absolute_paths
from tiny_onn.config.schema import RunConfig
from tiny_onn.distill.loop import run_distill
from tiny_onn.errors import UserError
from tiny_onn.runs.folder import create_run_folder, read_run_config
from tiny_onn.runs.metrics import read_metrics

STEPS, STOP = 6, 3


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    # Experts wide enough that bitsandbytes keeps 8-bit state for one of their two tensors.
    teacher = save_teacher(folder / "teacher", intermediate_size=96)
    return change(
        CONFIG,
        teacher={"path": str(teacher)},
        data={
            "sources": (str(write_corpus(folder / "corpus", num_files=6)),),
            "row_tokens": 48,
            "eval_tokens": 96,
            "held_out_fraction": 0.2,
        },
        train={"tokens": STEPS * 48, "eval_every_tokens": 2 * 48, "save_every_tokens": 0},
    )


def records(out):
    rows = read_metrics(out / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def last_checkpoint(out):
    """The bytes of its tensors, and its state without the clock."""
    path = out / "checkpoints" / f"step-{STEPS:07d}"
    state = json.loads((path / "state.json").read_text())
    del state["seconds"]
    # The length of a record depends on the digits of its times.
    del state["metrics_offset"]
    files = ("student.safetensors", "optimizer.safetensors")
    return [(path / name).read_bytes() for name in files], state


CASES: dict[str, dict[str, Any]] = {
    "adamw, budget": {"optim": {"name": "adamw"}, "router": {"budget_form": "cumulative"}},
    "adamw bf16, top_k, two rows": {
        "optim": {"name": "adamw", "master_dtype": "bfloat16"},
        "router": {"selection": "top_k"},
        "rows": 2,
    },
    "adamw8bit, threshold, two rows": {
        "optim": {"name": "adamw8bit"},
        "router": {"budget_form": "threshold"},
        "rows": 2,
    },
    "adamw8bit bf16, static": {
        "optim": {"name": "adamw8bit", "master_dtype": "bfloat16"},
        "router": {"selection": "static", "objective": "none"},
    },
    "paged, random": {
        "optim": {"name": "paged_adamw8bit"},
        "router": {"selection": "random", "objective": "none"},
    },
    "adafactor, task, three rows": {
        "optim": {"name": "adafactor"},
        "router": {"selection": "top_k", "objective": "task"},
        "rows": 3,
    },
    "two experts shared, some explored, annealed": {
        "experts": {"num_shared": 2, "init": "importance", "keep_massive": True},
        "router": {"budget_form": "threshold", "anneal_fraction": 0.5, "balance_rate": 0.01},
        "smk": {"explore_fraction": 0.3},
    },
    "rows shuffled": {"data": {"shuffle_tokens": 2 * 48}},
    "rows shuffled, two a step, norms learn, some cross-entropy": {
        "data": {"shuffle_tokens": 5 * 48},
        "optim": {"norm_lr": 1e-3},
        "loss": {"label_coef": 0.1},
        "rows": 2,
    },
    "muon, norms learn": {"optim": {"name": "muon", "norm_lr": 1e-3, "lr_scale": "rms"}},
    "muon bf16, two rows": {"optim": {"name": "muon", "master_dtype": "bfloat16"}, "rows": 2},
    "adafactor bf16, budget": {
        "optim": {"name": "adafactor", "master_dtype": "bfloat16"},
        "router": {"budget_form": "threshold"},
        "smk": {"candidates": "all", "targets": "set", "surprise": "gain"},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_goes_on_bit_for_bit(config, tmp_path, case):
    changes = dict(CASES[case])
    rows = changes.pop("rows", 1)
    train = {"rows_per_step": rows, "tokens": STEPS * 48 * rows, "eval_every_tokens": 2 * 48 * rows}
    config = change(config, train=train, **changes)
    whole, out = tmp_path / "whole", tmp_path / "run"
    run_distill(config, out=whole)
    number = signal.SIGTERM if rows == 2 else signal.SIGINT
    first = run_distill(config, out=out, after_step=at_step(STOP, partial(send, number)))
    assert (first.interrupted, first.tokens) == (True, STOP * 48 * rows)
    run_distill(config, out=out, resume=True)
    assert records(out) == records(whole)
    tensors, state = last_checkpoint(out)
    assert (tensors, state) == last_checkpoint(whole)
    # Neither half begins or ends with an epoch.
    position = state["stream"]
    if "block" in position:
        assert position["block"]["taken"] > 0
    else:
        assert position["epoch"] >= 1 or rows == 1
        assert position["position"] > 0
    assert state["stage"] == {"name": "global", "begin": 0}


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_with_checkpoints_goes_on_without_converting_again(
    config, tmp_path, monkeypatch, stop
):
    """All that a conversion makes comes from the checkpoint, at the change of stage too."""
    config = change(
        config,
        experts={
            "init": "coactivation",
            "gate_init": "ridge",
            "refit": True,
            "compensation": "mean",
            "learn_scale": True,
            "token_scale": True,
        },
        router={"budget_form": "threshold"},
        optim={"lr_scale": "rms"},
        train={"blockwise_tokens": 2 * 48, "tokens": (STEPS - 2) * 48},
    )
    whole, out = tmp_path / "whole", tmp_path / "run"
    run_distill(config, out=whole)
    run_distill(config, out=out, after_step=at_step(stop, partial(send, signal.SIGINT)))
    monkeypatch.setattr("tiny_onn.distill.loop.prepare", None)
    run_distill(config, out=out, resume=True)
    assert records(out) == records(whole)
    assert last_checkpoint(out) == last_checkpoint(whole)


FIXED = [
    *("data.eval_row_tokens", "data.eval_tokens", "data.held_out_fraction", "data.row_tokens"),
    *("data.settling_fraction", "data.shuffle_tokens", "data.split"),
    *("data.text_field", "experts.calibration_tokens", "experts.compensation"),
    *("experts.expert_dim", "experts.gate_init", "experts.init", "experts.keep_massive"),
    *("experts.learn_scale", "experts.num_experts", "experts.num_shared", "experts.refit"),
    *("experts.token_scale", "experts.weighting", "optim.lr_scale"),
    *("optim.master_dtype", "optim.name", "optim.norm_lr"),
    *("router.anneal_fraction", "router.at_least_one", "router.blockwise_anneal_fraction"),
    *("router.budget_form", "router.budget_scope", "router.objective", "router.oracle_budget"),
    *("router.selection", "router.target_k", "teacher.double_quant", "teacher.dtype"),
    *("teacher.placement", "teacher.quantization", "train.blockwise_tokens", "train.seed"),
]


def test_every_setting_can_change_or_says_why_not():
    settings = [f"{s}.{key}" for s, keys in asdict(RunConfig()).items() for key in keys]
    fixed = sorted(set(settings) - CHANGEABLE)
    assert set(settings) >= CHANGEABLE
    for name in fixed:
        assert name in REASONS or name.partition(".")[0] in REASONS, name
    # Changed with care: a setting that decides what saved tensors or positions mean stays fixed.
    assert fixed == FIXED


def test_changes_need_leave_and_are_named():
    before = RunConfig()
    after = change(before, train={"tokens": 9}, optim={"expert_lr": 1.0})
    both = ["train.tokens", "optim.expert_lr"]
    assert check_changes(before, before, both) == []
    assert check_changes(before, after, both) == [
        "optim.expert_lr: 0.0006 -> 1.0",
        "train.tokens: 262144 -> 9",
    ]
    told = (
        r"got changed settings \(optim.expert_lr: 0.0006 -> 1.0\).*--allow-change optim.expert_lr"
    )
    with pytest.raises(UserError, match=told):
        check_changes(before, after, ["train.tokens"])


def test_what_cannot_change_is_refused_with_the_reason():
    before = RunConfig()
    after = change(before, experts={"num_experts": 16}, train={"tokens": 9})
    told = (
        "experts.num_experts cannot change: the student was converted with this value; or add"
        " --allow-"
    )
    with pytest.raises(UserError, match=told):
        check_changes(before, after, [])
    with pytest.raises(
        UserError, match=r"got experts\.num_experts, expected a setting that a run can change"
    ):
        check_changes(before, after, ["experts.num_experts"])
    with pytest.raises(UserError, match=r"got train\.tokenz, expected SECTION.KEY of a setting"):
        check_changes(before, before, ["train.tokenz"])


def test_a_longer_run_is_the_same_run_with_leave_and_recorded(config, tmp_path):
    out = tmp_path / "run"
    run_distill(config, out=out)
    longer = change(config, train={"tokens": 8 * 48}, loss={"chunk_tokens": 64})
    with pytest.raises(UserError, match=r"add --allow-change loss\.chunk_tokens --allow-change t"):
        run_distill(longer, out=out, resume=True)
    assert read_run_config(out) == config
    allowed = ("train.tokens", "loss.chunk_tokens")
    run_distill(longer, out=out, resume=True, allow_change=allowed)
    assert read_run_config(out) == longer
    (environment,) = (json.loads(p.read_text()) for p in out.glob("environment-*.json"))
    assert environment["changes"] == [
        "loss.chunk_tokens: 0 -> 64",
        f"train.tokens: {6 * 48} -> {8 * 48}",
    ]
    steps: list[Any] = [row for row in records(out) if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["loss_chunk_tokens"] for row in steps] == [512] * 6 + [64] * 2
    # The new settings are the run's from now on.
    run_distill(longer, out=out, resume=True)


def test_a_run_goes_on_from_another_folder(config, tmp_path, monkeypatch):
    corpus, teacher = tmp_path / "here" / "corpus", tmp_path / "here" / "teacher"
    corpus.parent.mkdir()
    corpus.symlink_to(config.data.sources[0])
    teacher.symlink_to(config.teacher.path)
    relative = change(config, teacher={"path": "teacher"}, data={"sources": ("./corpus",)})
    monkeypatch.chdir(tmp_path / "here")
    run_distill(relative, out=tmp_path / "run", after_step=at_step(2, partial(send, signal.SIGINT)))
    recorded = read_run_config(tmp_path / "run")
    assert recorded.teacher.path == str(teacher)
    assert recorded.data.sources == (str(corpus),)
    monkeypatch.chdir(tmp_path)
    # With the folder's settings it goes on, with paths that mean another place it does not.
    with pytest.raises(UserError, match=r"data\.sources: .*here/corpus.* -> .*--allow-change"):
        run_distill(relative, out=tmp_path / "run", resume=True)
    assert run_distill(recorded, out=tmp_path / "run", resume=True).tokens == STEPS * 48


def test_names_that_are_no_paths_stay_as_they_are():
    config = change(
        RunConfig(),
        teacher={"path": "Qwen/Qwen3-0.6B"},
        data={"sources": ("embedded", "hf:a/b:c", "/abs/x.txt", "~nobody-of-this-name/x")},
    )
    assert with_absolute_paths(config) == config


def test_a_changed_teacher_is_refused(config, tmp_path):
    out = tmp_path / "run"
    run_distill(config, out=out, after_step=at_step(1, partial(send, signal.SIGINT)))
    other = save_teacher(tmp_path / "other", intermediate_size=96, seed=1)
    moved = change(config, teacher={"path": str(other)})
    with pytest.raises(UserError, match=r"teacher\.path: got other weights than the run began"):
        run_distill(moved, out=out, resume=True, allow_change=("teacher.path",))
    assert read_run_config(out) == config


def test_refused_text_does_not_become_the_runs(config, tmp_path):
    out = tmp_path / "run"
    run_distill(config, out=out, after_step=at_step(1, partial(send, signal.SIGINT)))
    other = write_corpus(tmp_path / "other", seed=1)
    moved = change(config, data={"sources": (str(other),)})
    with pytest.raises(UserError, match=r"the data's text .* changed"):
        run_distill(moved, out=out, resume=True, allow_change=("data.sources",))
    assert read_run_config(out) == config
    assert run_distill(config, out=out, resume=True).tokens == STEPS * 48


def test_resuming_an_older_folder_with_relative_paths_compares_what_they_mean(
    config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").symlink_to(config.data.sources[0])
    relative = change(config, data={"sources": ("corpus",)})
    create_run_folder(tmp_path / "run", relative, argv=[])
    assert run_distill(relative, out=tmp_path / "run", resume=True).tokens == STEPS * 48
