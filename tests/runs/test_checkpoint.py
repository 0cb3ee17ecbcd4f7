"""A checkpoint restores everything bit for bit, or is not there."""

import json
import os
import threading
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiny import (
    CONFIG,
    change,
    make_dense,
    make_rows,
    make_tokenizer,
    save_checkpoint,
    write_corpus,
)
from tiny_onn.conversion import pipeline as prepare
from tiny_onn.conversion.verify import backbone_hash
from tiny_onn.data.rows import training_rows
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.step import distill_step
from tiny_onn.errors import UserError
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.runs import checkpoint as checkpoint_module
from tiny_onn.runs import checkpointer as checkpointer_module
from tiny_onn.runs.checkpoint import (
    load_checkpoint,
    take_snapshot,
    valid_checkpoints,
    write_checkpoint,
)
from tiny_onn.runs.checkpointer import Checkpointer

ROWS = make_rows((20, 13, 30, 40, 9), 32)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("data") / "corpus")
    return change(CONFIG, data={"sources": (str(corpus),)})


class Session:
    """What a run holds in memory."""

    def __init__(self, config) -> None:
        self.config = config
        self.dense = make_dense("llama", vocab_size=320)
        self.student = prepare.make_student(config, MlpInputs(self.dense, ROWS))
        self.optimizer = build_optimizer(self.student, config.optim)
        self.stream = training_rows(config, make_tokenizer())
        self.losses = []

    def train(self, num_steps):
        for _ in range(num_steps):
            rows = [next(self.stream)]
            result = distill_step(self.student, self.dense, self.optimizer, rows, self.config)
            self.losses.append(result.loss.item())
        return self

    def save(self, folder, step):
        state = {"step": step, "stream": self.stream.state_dict()}
        return save_checkpoint(folder, step, self.student, self.optimizer, state)

    def load(self, folder) -> Any:
        state = load_checkpoint(folder, self.student, self.optimizer)
        if state is not None:
            self.stream.load_state_dict(state["stream"])
        return state

    def tensors(self):
        """Everything that decides the next step, flat."""
        tensors = {name: t.detach() for name, t in self.student.state_dict().items()}
        for name, parameter in self.student.trainable().items():
            for entry, value in self.optimizer.state[parameter].items():
                tensors[f"{name} {entry}"] = torch.as_tensor(value)
        return tensors


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("changes", [{}, {"router": {"objective": "none"}}], ids=["smk", "frozen"])
def test_restored_training_goes_on_bit_for_bit(config, changes, tmp_path):
    config = change(config, **changes)
    whole = Session(config).train(6)
    first = Session(config).train(3)
    first.save(tmp_path, 3)
    second = Session(config)
    assert second.load(tmp_path) == {"step": 3, "stream": first.stream.state_dict()}
    assert_same_bits(second.tensors(), first.tensors())
    second.train(3)
    assert first.losses + second.losses == whole.losses
    assert_same_bits(second.tensors(), whole.tensors())
    assert any("exp_avg_sq" in name for name in whole.tensors())


def test_a_checkpoint_holds_what_learns_and_no_backbone(config, tmp_path):
    session = Session(config).train(1)
    path = session.save(tmp_path, 1)
    names = load_file(path / "student.safetensors").keys()
    layers = [f"backbone.model.layers.{i}.mlp." for i in range(2)]
    ends = ["experts.gate_up_proj", "experts.down_proj"]
    ends += ["router.weight", "router.bias", "router.threshold", "router.num_updates"]
    assert names >= {layer + end for layer in layers for end in ends}
    learning = {name for name in session.student.state_dict() if ".mlp." in name}
    assert names == learning
    before = backbone_hash(session.student)
    session.load(tmp_path)
    assert backbone_hash(session.student) == before


def test_saving_changes_nothing(config, tmp_path):
    saving, plain = Session(config), Session(config)
    for step in range(3):
        saving.train(1).save(tmp_path, step)
        plain.train(1)
    assert_same_bits(saving.tensors(), plain.tensors())


def test_only_the_newest_two_are_kept(config, tmp_path):
    session = Session(config).train(1)
    for step in (1, 2, 9, 10, 100):
        session.save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000010", "step-0000100"]
    assert [p.name for p in valid_checkpoints(tmp_path)] == ["step-0000100", "step-0000010"]
    assert Session(config).load(tmp_path)["step"] == 100


def test_saving_the_same_step_again_replaces_it(config, tmp_path):
    session = Session(config).train(1)
    session.save(tmp_path, 5)
    session.train(1).save(tmp_path, 5)
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000005"]
    restored = Session(config)
    restored.load(tmp_path)
    assert_same_bits(restored.tensors(), session.tensors())


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, os.unlink])
@pytest.mark.parametrize(
    "file", ["student.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_a_damaged_checkpoint_gives_way_to_the_previous_one(config, damage, file, tmp_path, capsys):
    session = Session(config).train(1)
    session.save(tmp_path, 1)
    expected = {name: tensor.clone() for name, tensor in session.tensors().items()}
    session.train(1)
    damage(session.save(tmp_path, 2) / file)
    restored = Session(config)
    assert restored.load(tmp_path)["step"] == 1
    assert_same_bits(restored.tensors(), expected)
    said = capsys.readouterr().err.replace("\n", "")
    assert "step-0000002: this checkpoint is damaged and is skipped" in said
    # Redone, it is whole again.
    restored.train(1).save(tmp_path, 2)
    assert_same_bits(restored.tensors(), session.tensors())
    assert Session(config).load(tmp_path)["step"] == 2


@pytest.mark.parametrize("manifest", ["", "[]", "{}", "3", "null", '{"state.json": 1}'])
def test_a_manifest_of_another_form_counts_as_damage(config, manifest, tmp_path):
    session = Session(config).train(1)
    session.save(tmp_path, 1)
    (session.save(tmp_path, 2) / "manifest.json").write_text(manifest)
    assert session.load(tmp_path)["step"] == 1


def test_no_flipped_bit_of_a_manifest_stops_a_resumption(config, tmp_path):
    session = Session(config).train(1)
    session.save(tmp_path, 1)
    path = session.save(tmp_path, 2) / "manifest.json"
    content = path.read_bytes()
    for place in range(0, len(content), 5):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        # Some bits, such as those of white space, say nothing.
        assert session.load(tmp_path)["step"] in (1, 2)


def test_a_damaged_checkpoint_does_not_crowd_out_a_whole_one(config, tmp_path):
    session = Session(config).train(1)
    for step in (10, 20):
        session.save(tmp_path, step)
    flip_a_bit(tmp_path / "step-0000020" / "student.safetensors")
    for step in (12, 14):
        session.save(tmp_path, step)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-0000012", "step-0000014", "step-0000020"]
    assert session.load(tmp_path)["step"] == 14


def test_unfinished_folders_are_ignored_and_cleared(config, tmp_path):
    session = Session(config).train(1)
    session.save(tmp_path, 1)
    unfinished = tmp_path / ".partial-1"
    unfinished.mkdir()
    (unfinished / "student.safetensors").write_bytes(b"half")
    (tmp_path / "step-0000007").mkdir()
    assert valid_checkpoints(tmp_path) == [tmp_path / "step-0000001"]
    assert session.load(tmp_path)["step"] == 1
    session.save(tmp_path, 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000001", "step-0000008"]


def test_without_a_whole_checkpoint_nothing_is_restored(config, tmp_path):
    session = Session(config).train(1)
    before = {name: tensor.clone() for name, tensor in session.tensors().items()}
    assert session.load(tmp_path / "none") is None
    truncate(session.save(tmp_path, 1) / "optimizer.safetensors")
    with pytest.raises(
        UserError, match="got 1 checkpoints, all of them damaged, expected an intact"
    ):
        session.load(tmp_path)
    assert_same_bits(session.tensors(), before)


def test_the_manifest_names_every_file(config, tmp_path):
    path = Session(config).train(1).save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert {*manifest, "manifest.json"} == {file.name for file in path.iterdir()}


def test_a_disk_that_refuses_is_told_and_leaves_the_previous_checkpoint(
    config, tmp_path, monkeypatch
):
    session = Session(config).train(1)
    session.save(tmp_path, 1)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tiny_onn.publish._sync", refuse)
    with pytest.raises(UserError, match=r"cannot write the checkpoint \(No space left on device\)"):
        session.save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000001"]
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        session.save(blocked, 2)


def test_the_first_checkpoint_that_fails_promises_no_earlier_one(config, tmp_path, monkeypatch):
    session = Session(config).train(1)
    real = checkpoint_module.save_file
    monkeypatch.setattr(checkpoint_module, "save_file", out_of_space)
    with pytest.raises(UserError, match=r"there is no earlier checkpoint; free some space$"):
        session.save(tmp_path, 1)
    monkeypatch.setattr(checkpoint_module, "save_file", real)
    session.save(tmp_path, 2)
    monkeypatch.setattr(checkpoint_module, "save_file", out_of_space)
    with pytest.raises(UserError, match="previous checkpoint, step-0000002, is whole: free some"):
        session.save(tmp_path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000002"]


def out_of_space(*_):
    raise OSError(28, "No space left on device")


def snapshot(session, step):
    return take_snapshot(step, session.student, session.optimizer, {"step": step})


def test_a_checkpoint_is_written_while_training_goes_on(config, tmp_path, monkeypatch):
    session = Session(config).train(1)
    at_work, go_on = threading.Event(), threading.Event()
    real = checkpoint_module.save_file

    def slow(*arguments):
        at_work.set()
        assert go_on.wait(60)
        real(*arguments)

    monkeypatch.setattr(checkpoint_module, "save_file", slow)
    with Checkpointer(tmp_path, keep=2) as writer:
        expected = {name: tensor.clone() for name, tensor in session.tensors().items()}
        assert writer.save(snapshot(session, 1)) is None
        assert at_work.wait(60)
        session.train(2)
        assert writer.poll() is None
        assert valid_checkpoints(tmp_path) == []
        go_on.set()
        assert writer.wait() is None
    # What was saved is the moment of saving, whatever the steps did since.
    restored = Session(config)
    load_checkpoint(tmp_path, restored.student, restored.optimizer)
    assert_same_bits(restored.tensors(), expected)


def test_one_write_is_in_flight_at_most_and_leaving_waits_for_it(config, tmp_path, monkeypatch):
    session, writing, most = Session(config).train(1), [], []
    real = checkpoint_module.write_checkpoint

    def counted(*arguments, **options):
        writing.append(1)
        most.append(len(writing))
        path = real(*arguments, **options)
        writing.pop()
        return path

    monkeypatch.setattr(checkpointer_module, "write_checkpoint", counted)
    with Checkpointer(tmp_path, keep=3) as writer:
        for step in range(1, 5):
            assert writer.save(snapshot(session, step)) is None
    assert most == [1, 1, 1, 1]
    names = ["step-0000004", "step-0000003", "step-0000002"]
    assert [path.name for path in valid_checkpoints(tmp_path)] == names


def test_a_write_that_fails_is_told_once_and_the_next_is_tried(config, tmp_path, monkeypatch):
    session = Session(config).train(1)
    real = checkpoint_module.save_file
    with Checkpointer(tmp_path, keep=2) as writer:
        writer.save(snapshot(session, 1))
        assert writer.wait() is None
        monkeypatch.setattr(checkpoint_module, "save_file", out_of_space)
        writer.save(snapshot(session, 2))
        monkeypatch.setattr(checkpoint_module, "save_file", out_of_space)
        told = writer.save(snapshot(session, 3))
        assert told is not None
        assert "step-0000002: cannot write the checkpoint (No space left" in told
        assert "step-0000003" in str(writer.wait())
        assert writer.wait() is None
        monkeypatch.setattr(checkpoint_module, "save_file", real)
        assert writer.save(snapshot(session, 4)) is None
    names = [path.name for path in valid_checkpoints(tmp_path)]
    assert names == ["step-0000004", "step-0000001"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_best_is_kept_beside_the_newest(config, tmp_path, keep):
    session = Session(config).train(1)
    for step in range(1, 8):
        best = 2 if step < 6 else 6
        write_checkpoint(tmp_path, snapshot(session, step), keep=keep, best=best)
        newest = range(max(1, step - keep + 1), step + 1)
        expected = {*newest, *([best] if step >= best else [])}
        assert {int(path.name[5:]) for path in tmp_path.iterdir()} == expected


def test_tidying_leaves_the_newest_and_the_best(config, tmp_path):
    session = Session(config).train(1)
    with Checkpointer(tmp_path, keep=1) as writer:
        writer.best = 1
        for step in (1, 2, 3):
            writer.save(snapshot(session, step))
        writer.wait()
        assert [path.name for path in valid_checkpoints(tmp_path)] == [
            "step-0000003",
            "step-0000001",
        ]
        writer.best = 3
        writer.tidy()
    assert [path.name[-1] for path in valid_checkpoints(tmp_path)] == ["3"]


def test_a_checkpoint_of_another_format_is_refused_by_name(config, tmp_path, monkeypatch):
    session = Session(config).train(1)
    monkeypatch.setattr(checkpoint_module, "FORMAT", 1)
    session.save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(
        UserError, match="step-0000001: got a checkpoint of format 1, expected 3, 4 or 5"
    ):
        session.load(tmp_path)
