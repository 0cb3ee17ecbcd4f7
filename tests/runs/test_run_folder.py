"""The run folder: what is written, what is refused, and what survives a crash."""

import json
import math
import platform
import signal
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest
import torch

import tiny_onn
from tiny_onn.config.read import load_config
from tiny_onn.config.schema import RunConfig
from tiny_onn.errors import UserError
from tiny_onn.runs.files import write_json
from tiny_onn.runs.folder import (
    create_run_folder,
    forgotten_if_refused,
    read_run_config,
    record_conversion,
    refuse_several,
    resume_run_folder,
    runs_in,
    was_begun_by,
)
from tiny_onn.runs.lock import run_lock
from tiny_onn.runs.metrics import MetricsWriter, read_metrics


def run_python(code, *arguments):
    """Run `code` in an interpreter of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_checkout_that_is_not_installed_begins_runs(tmp_path, monkeypatch):
    # A search path without the package's metadata, as with PYTHONPATH=src.
    found = metadata.distribution
    monkeypatch.setattr(
        metadata, "distribution", lambda name: found("none" if name == "tiny-onn" else name)
    )
    create_run_folder(path := tmp_path / "run", RunConfig(), argv=[])
    assert json.loads((path / "environment.json").read_text())["tiny_onn"] == "(not installed)"


def test_new_folder_holds_settings_and_environment(tmp_path):
    path = tmp_path / "runs" / "one"
    config = load_config(None, "model-card", ["train.seed=3"])
    create_run_folder(path, config, argv=["tiny-onn", "distill"])
    assert sorted(entry.name for entry in path.iterdir()) == ["config.json", "environment.json"]
    assert read_run_config(path) == config
    environment = json.loads((path / "environment.json").read_text())
    assert environment["command"] == ["tiny-onn", "distill"]
    assert environment["python"] == platform.python_version()
    assert environment["torch"] == torch.__version__
    assert environment["device"]
    assert environment["started_utc"].endswith("+00:00")


def test_recorded_commit_is_that_of_the_checkout(tmp_path):
    create_run_folder(tmp_path, RunConfig(), argv=[])
    environment = json.loads((tmp_path / "environment.json").read_text())
    source = Path(str(tiny_onn.__file__))
    here = source.parent
    command = ["git", "-C", str(here), "ls-files", "--error-unmatch", str(source)]
    tracked = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if tracked:
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        assert environment["git_commit"] == head
        assert environment["git_dirty"] in (True, False)
    else:
        assert environment["git_commit"] is None


def test_folder_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty, expected a new one; add --resume"):
        create_run_folder(tmp_path, RunConfig(), argv=[])
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def failed_run(path):
    """What a run leaves that fails in its first step."""
    create_run_folder(path, RunConfig(), argv=["first"])
    resume_run_folder(path, RunConfig(), argv=["second"])
    write_json(path / "conversion.json", {"backbone_sha256": "of a teacher that was mended since"})
    (path / "checkpoints").mkdir()
    (path / "lock").write_text("{}")
    with MetricsWriter(path / "metrics.jsonl") as writer:
        writer.write({"kind": "blocks", "step": 0})
        writer.write({"kind": "start", "step": 0})


def test_a_run_that_failed_before_its_first_step_is_started_anew(tmp_path):
    failed_run(tmp_path)
    create_run_folder(tmp_path, load_config(None, None, ["train.seed=1"]), argv=["third"])
    left = sorted(entry.name for entry in tmp_path.iterdir())
    # The lock is held by the run that starts.
    assert left == ["config.json", "environment.json", "lock"]
    assert read_run_config(tmp_path).train.seed == 1
    assert json.loads((tmp_path / "environment.json").read_text())["command"] == ["third"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", b'{"kind": "start", "step": 0}\n{"kind": "step", "step": 1}\n'),
        ("metrics.jsonl", b'{"kind": "blockwise", "step": 10}\n'),
        ("metrics.jsonl", b'{"kind": "skipped", "step": 1}\n'),
        ("metrics.jsonl", b'{"kind": "blocks", "step": 9}\n'),
        ("metrics.jsonl", b'{"kind": "start", "step": 0}\n{"kind": "ste'),
        ("metrics.jsonl", b"no record\n"),
        ("checkpoints/step-1/state.json", b"{}"),
        ("student/config.json", b"{}"),
        ("summary.json", b"{}"),
        ("notes.txt", b"mine"),
        ("environment.json.bak", b"mine"),
    ],
)
def test_a_run_with_results_is_never_started_anew(tmp_path, name, content):
    failed_run(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(content)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with pytest.raises(UserError, match=r"not empty, expected a new one|got no JSON object"):
        create_run_folder(tmp_path, RunConfig(), argv=["third"])
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_settings_with_a_byte_order_mark_are_read(tmp_path):
    create_run_folder(tmp_path, RunConfig(), argv=[])
    file = tmp_path / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_run_config(tmp_path) == RunConfig()


def test_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"cannot write it .* choose another --out"):
            create_run_folder(path, RunConfig(), argv=[])


def test_read_only_file_system_is_refused():
    with pytest.raises(UserError, match=r"^/proc/tiny-onn-run: cannot write it"):
        create_run_folder(Path("/proc/tiny-onn-run"), RunConfig(), argv=[])


def test_resuming_with_the_same_settings_adds_an_environment(tmp_path):
    create_run_folder(tmp_path, RunConfig(), argv=["first"])
    resume_run_folder(tmp_path, RunConfig(), argv=["second"])
    resume_run_folder(tmp_path, RunConfig(), argv=["third"])
    commands = [
        json.loads((tmp_path / name).read_text())["command"]
        for name in ("environment.json", "environment-1.json", "environment-2.json")
    ]
    assert commands == [["first"], ["second"], ["third"]]


def test_resuming_with_changed_settings_is_refused(tmp_path):
    create_run_folder(tmp_path, RunConfig(), argv=[])
    changed = load_config(None, None, ["train.seed=1"])
    with pytest.raises(UserError, match=r"got changed settings \(train.seed: 0 -> 1\)"):
        resume_run_folder(tmp_path, changed, argv=[])


@pytest.mark.parametrize("content", [None, b"\xff", b"", b"{}"])
def test_resuming_what_is_no_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: "):
        resume_run_folder(tmp_path, RunConfig(), argv=[])


def test_json_file_is_replaced_and_no_temporary_stays(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    write_json(path, {"x": [2, None]})
    assert json.loads(path.read_text()) == {"x": [2, None]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    done = run_python(
        """
        import resource, sys
        from pathlib import Path
        from tiny_onn.errors import UserError
        from tiny_onn.runs.files import write_json
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_json(Path(sys.argv[1]), {"x": "y" * 100_000})
        except UserError as error:
            print(error)
        """,
        path,
    )
    assert "a.json: cannot write it (File too large)" in done.stdout, done.stderr
    assert json.loads(path.read_text()) == {"x": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_metrics_come_back_in_order_and_can_be_followed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in range(3):
            writer.write({"step": step, "loss": 0.1 * step})
            assert len(read_metrics(path)) == step + 1
            assert writer.offset == path.stat().st_size
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2]


def test_resumed_metrics_forget_what_followed_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 0})
        offset = writer.offset
        writer.write({"step": 1, "run": "first"})
    with MetricsWriter(path, offset) as writer:
        assert writer.offset == offset
        writer.write({"step": 1, "run": "second"})
    assert read_metrics(path) == [{"step": 0}, {"step": 1, "run": "second"}]


def test_metrics_shorter_than_the_checkpoint_says_are_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"{}\n")
    with pytest.raises(UserError, match="got 3 bytes, expected at least the 9"):
        MetricsWriter(path, 9)
    assert path.read_bytes() == b"{}\n"


def test_metrics_survive_a_killed_process(tmp_path):
    path = tmp_path / "metrics.jsonl"
    done = run_python(
        """
        import os, signal, sys
        from pathlib import Path
        from tiny_onn.runs.metrics import MetricsWriter
        writer = MetricsWriter(Path(sys.argv[1]))
        writer.write({"step": 0})
        writer.write({"step": 1})
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        path,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_metrics(path) == [{"step": 0}, {"step": 1}]


def test_unfinished_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1}')
    assert read_metrics(path) == [{"step": 0}]


@pytest.mark.parametrize("line", [b"{", b"[1]", b"", b"\xff"])
def test_broken_line_is_told_with_its_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(UserError, match="got no JSON object in line 2"):
        read_metrics(path)


def test_missing_metrics_are_told(tmp_path):
    with pytest.raises(UserError, match="cannot read it"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_number_that_is_not_finite_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"loss": math.nan, "norm": math.inf})
    (record,) = read_metrics(path)
    assert str(record) == "{'loss': nan, 'norm': inf}"


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_full_disk_lets_records_wait_and_is_told_once(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    writer = MetricsWriter(path)
    for step in range(3):
        writer.write({"step": step})
    said = capsys.readouterr().err
    assert said.count("No space left on device; records wait in memory") == 1
    assert writer.offset == 3 * len(b'{"step": 0}\n')
    for end in (writer.sync, writer.close):
        with pytest.raises(UserError, match="No space left on device"):
            end()
    writer.close()


def test_records_that_waited_follow_once_there_is_space(tmp_path):
    path = tmp_path / "metrics.jsonl"
    done = run_python(
        """
        import resource, signal, sys
        from pathlib import Path
        from tiny_onn.runs.metrics import MetricsWriter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))
        with MetricsWriter(Path(sys.argv[1])) as writer:
            for step in range(5):
                writer.write({"step": step})
            print(Path(sys.argv[1]).stat().st_size)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            writer.write({"step": 5})
            print(Path(sys.argv[1]).stat().st_size == writer.offset)
        """,
        path,
    )
    # The third line was cut in its middle.
    assert done.stdout.split() == ["30", "True"], done.stderr
    assert [record["step"] for record in read_metrics(path)] == list(range(6))


def test_a_launch_knows_the_run_that_it_began_and_no_other(tmp_path):
    ours, other, plain = (tmp_path / name for name in ("ours", "other", "plain"))
    assert not was_begun_by("a launch", ours)
    create_run_folder(ours, RunConfig(), argv=[], launch="a launch")
    for folder in (other, plain):
        create_run_folder(folder, RunConfig(), argv=[])
    resume_run_folder(other, RunConfig(), argv=[], launch="a launch")
    asked = [was_begun_by("a launch", folder) for folder in (ours, other, plain)]
    assert asked == [True, True, False]
    assert not any(was_begun_by(name, ours) for name in ("another launch", None))
    assert not was_begun_by(None, plain)
    (ours / "config.json").unlink()
    assert not was_begun_by("a launch", ours)


@pytest.mark.parametrize(
    ("error", "kept"), [(UserError("text: got none"), False), (KeyboardInterrupt(), True)]
)
def test_a_run_that_is_refused_before_its_first_step_leaves_nothing(tmp_path, error, kept):
    out = tmp_path / "runs" / "one"
    with pytest.raises(type(error)), run_lock(out), forgotten_if_refused(out):
        failed_run(out)
        raise error
    # A run that was interrupted can be resumed.
    assert out.exists() == kept


def test_a_refused_run_with_results_keeps_them(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"), forgotten_if_refused(tmp_path):
        create_run_folder(tmp_path, RunConfig(), argv=[])
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(("content", "said"), [("{", "cannot read it"), ("[]", "got list")])
def test_a_damaged_record_of_a_run_is_told(tmp_path, content, said):
    create_run_folder(tmp_path, RunConfig(), argv=[])
    for name in ("environment", "conversion"):
        (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(UserError, match=rf"environment\.json: {said}.*, expected a JSON object"):
        was_begun_by("a launch", tmp_path)
    with pytest.raises(UserError, match=rf"conversion\.json: {said}.*, expected a JSON object"):
        record_conversion(tmp_path / "conversion.json", {"backbone_sha256": "0"})


def test_a_models_folder_is_no_run_and_a_students_names_its_run(tmp_path):
    student = tmp_path / "run" / "student"
    student.mkdir(parents=True)
    write_json(student / "config.json", {"model_type": "tiny_onn", "architectures": []})
    with pytest.raises(UserError, match=r"got the folder of a model, .* name the folder of a run"):
        read_run_config(student)
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=f"expected a run; name its run, {tmp_path / 'run'}$"):
        read_run_config(student)


def test_a_folder_of_folders_of_runs_names_some_of_them(tmp_path):
    for name in "abcd":
        create_run_folder(tmp_path / "demo" / name, RunConfig(), argv=[])
    # A run that has not begun to record is not named.
    refuse_several(tmp_path)
    for name in "abcd":
        (tmp_path / "demo" / name / "metrics.jsonl").touch()
    named = ", ".join(str(tmp_path / "demo" / name) for name in "abc")
    for ask in (refuse_several, read_run_config):
        with pytest.raises(UserError, match=rf"got a folder of runs, .* one of {named}, \.\.\.$"):
            ask(tmp_path)
    with pytest.raises(UserError, match=rf"or a folder of runs; name one of {tmp_path / 'demo'}$"):
        runs_in(tmp_path)
    refuse_several(tmp_path / "demo" / "a")
    assert [run.name for run in runs_in(tmp_path / "demo")] == [*"abcd"]


def test_a_name_that_is_too_long_is_no_run():
    long = Path("a" * 300)
    assert not was_begun_by("a launch", long)
    with pytest.raises(UserError, match=r"^RUN: got aaa"):
        runs_in(long)
