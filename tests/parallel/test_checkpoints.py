"""A checkpoint of several processes is one, whatever number of processes reads it."""

import json

import pytest

import checkpoint_cases
from parallel_cases import prepared
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.saving import saving_ranks
from tiny_onn.parallel import World


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of what the processes wrote."""
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoint_cases.spawn(folder)
    return folder


def seen(folder, name, processes=2):
    """What each process of a case saw."""
    return [json.loads((folder / f"{name}-{r}.json").read_text()) for r in range(processes)]


def test_a_process_that_cannot_write_is_named_and_the_checkpoint_before_stays(folder):
    for one in seen(folder, "refused"):
        assert (
            "step-0000002: cannot write the checkpoint (process 1: File too large)" in one["told"]
        )
        assert "the previous checkpoint, step-0000001, is whole" in one["told"]
        assert one["left"] == ["step-0000001"]
        assert one["next"] is None
    assert seen(folder, "refused")[0]["after"] == ["step-0000001", "step-0000003"]


def test_training_goes_on_while_all_processes_write(folder):
    for one in seen(folder, "overlapped"):
        assert one["while writing"] == [".partial"]
        assert one["moved"]
        assert one["error"] is None
        assert one["written"] == ["step-0000001"]
        # What was saved is the moment of saving, whatever the steps did since.
        assert one["same"]
    files = sorted(path.name for path in (folder / "overlapped" / "step-0000001").iterdir())
    assert len(files) == 4
    assert {"manifest.json", "state.json"} < set(files)
    assert sum(name.endswith(".safetensors") for name in files) == 2
    manifest = (folder / "overlapped" / "step-0000001" / "manifest.json").read_text()
    assert sorted({*json.loads(manifest), "manifest.json"}) == files


def test_all_processes_skip_a_checkpoint_of_which_one_part_is_damaged(folder):
    for one in seen(folder, "damaged"):
        assert one["state"] == {"step": 1}
        assert "got 3 checkpoints, all of them damaged, expected an intact one" in one["told"]


def test_a_folder_that_one_process_does_not_see_is_refused(folder):
    for one in seen(folder, "unseen"):
        assert "got a folder that only some of 2 processes see, expected one on a file" in one


def test_a_checkpoint_that_a_network_mount_shows_later_is_waited_for_and_not_called_damaged(folder):
    for one in seen(folder, "late"):
        for step in (3, 2):
            assert one[f"{step} is late"] == {"step": step}
            told = f"step-{step:07d}: got a checkpoint that only some of 2 processes see, expected"
            assert told in one[f"{step} is lacking"]


def test_a_checkpoint_keeps_its_bits_through_one_two_four_and_one_processes(folder):
    first, second, third, fourth = seen(folder, "exchanged", 4)
    for one in (first, second, third, fourth):
        assert all(value for name, value in one.items() if name.startswith("same"))
        assert all(v == {"step": 1} for name, v in one.items() if name.startswith("state"))
        # Without shards everybody has everything, with them a part of the experts' state.
        assert one["share 4"] == 1
        assert one["share 4 sharded"] < 1
    assert first["share 2"] < 1
    assert first["files"]


@pytest.mark.parametrize("shard", ["none", "optimizer"])
def test_every_process_saves_its_share_and_of_a_sharded_optimizer_what_it_owns(shard):
    student, _, config = prepared({}, 2)
    optimizer = build_optimizer(student, config.optim, world=World(rank=0, size=2), shard=shard)
    ranks = saving_ranks(student, optimizer, 2)
    parameters = student.trainable()
    assert ranks.keys() == parameters.keys()
    loads = [sum(parameters[n].numel() for n, r in ranks.items() if r == rank) for rank in (0, 1)]
    assert max(loads) < 0.6 * sum(loads)
    owned = {n: optimizer.owners[p] for n, p in parameters.items() if p in optimizer.owners}
    assert bool(owned) == (shard == "optimizer")
    assert owned.items() <= ranks.items()
