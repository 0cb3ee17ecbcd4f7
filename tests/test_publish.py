"""A file or folder in its place: whole, on the disk, or not there."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from tiny_onn.publish import publish


def test_a_folder_is_renamed_once_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    finished, target = tmp_path / "partial", tmp_path / "target"
    (finished / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (finished / name).write_text(name)
    real, done = os.fsync, []

    def sync(descriptor):
        done.append((os.fstat(descriptor).st_ino, target.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    publish(finished, target)
    before = {number for number, there in done if not there}
    assert before == {path.stat().st_ino for path in (*target.rglob("*"), target)}
    assert done[-1] == (tmp_path.stat().st_ino, True)
    assert not finished.exists()


def test_a_file_replaces_the_one_that_is_there(tmp_path):
    (tmp_path / "partial").write_text("new")
    (tmp_path / "target").write_text("old")
    publish(tmp_path / "partial", tmp_path / "target")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("target", "new")]


def test_a_folder_that_is_there_goes_only_when_asked(tmp_path):
    for name in ("partial", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    with pytest.raises(OSError, match="not empty"):
        publish(tmp_path / "partial", tmp_path / "target")
    assert (tmp_path / "target" / "target").exists()
    publish(tmp_path / "partial", tmp_path / "target", over_folder=True)
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["partial"]


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o770])
@pytest.mark.parametrize("is_folder", [True, False])
def test_whoever_may_use_a_folder_may_use_its_weights(tmp_path, is_folder, mode):
    finished, target = tmp_path / "partial", tmp_path / "target.safetensors"
    weights = finished / "model.safetensors" if is_folder else finished
    weights.parent.mkdir(exist_ok=True)
    save_file({"weight": torch.ones(1)}, weights)
    weights.parent.chmod(mode)
    publish(finished, target)
    published = target / "model.safetensors" if is_folder else target
    assert stat.S_IMODE(published.stat().st_mode) == mode & 0o666
