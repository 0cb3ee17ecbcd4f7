"""Two processes with half of the rows each make the steps of one process."""

import json

import pytest
import torch

import parallel_cases
from pair_results import assert_equal, assert_weights_move_alike, results
from parallel_cases import OPTIMIZERS, RECIPES, STAGES, pair_jobs, saved_state
from run_records import records
from tiny_onn.parallel import ALONE

JOBS = pair_jobs()
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    """The folder of what the processes wrote, and the settings of their runs."""
    folder = tmp_path_factory.mktemp("parallel")
    return folder, parallel_cases.spawn(folder)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_with_a_row_each_two_processes_give_the_bits_of_one(folder, recipe, stage):
    # The sum of two rows is the same in either order, so nothing may differ at all. The sum of the
    # inputs that passed no expert alone begins at a number that is not 0.
    name = f"{recipe}, {stage}, 2 rows"
    first, second = results(folder, name)
    assert_equal(first, second)
    expected = JOBS[name](ALONE)
    assert sum(n.startswith("count 0") for n in expected) == 7
    if "re-seeded" in recipe:
        for key, tensor in expected.items():
            torch.testing.assert_close(first[key], tensor, rtol=0, atol=1e-5)
        return
    # With a sampled lesson a row adds to a tally twice: for the lesson and for its other tokens.
    twice = "all candidates" in recipe
    for key in [key for key in expected if twice and "sums_4E" in key]:
        bound = float(8 * EPS * expected[key].abs().max())
        torch.testing.assert_close(first.pop(key), expected.pop(key), rtol=0, atol=bound)
    assert_equal(first, expected)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_with_two_rows_each_two_processes_give_the_steps_of_one(folder, recipe, stage):
    name = f"{recipe}, {stage}, 4 rows"
    first, second = results(folder, name)
    assert_equal(first, second)
    expected = JOBS[name](ALONE)
    assert first.keys() == expected.keys()
    # In the first step every row's numbers are the same to the bit, and four of them are added in
    # another order: three roundings on each side, each by half of EPS of a sum that is at most
    # the sum of the four sizes, which for the largest numbers of a tensor is a few times these.
    bound = 64 * EPS
    for key, tensor in expected.items():
        number = key.split()[1]
        if number != "0":
            continue
        if not tensor.is_floating_point():
            assert torch.equal(first[key], tensor), key
            continue
        if "counts_4" in key:
            assert torch.equal(first[key][:3], tensor[:3]), key
        size = tensor.abs().max()
        torch.testing.assert_close(first[key], tensor, rtol=0, atol=float(bound * size))
    assert_weights_move_alike(first, expected)


def test_tensors_of_every_size_and_format_are_added_up(folder):
    expected = JOBS["sums"](ALONE)
    for rank in results(folder, "sums"):
        for name, tensor in expected.items():
            assert torch.equal(rank[name], 3 * tensor), name


@pytest.mark.parametrize("rank", [0, 1])
def test_a_gradient_that_is_not_finite_in_one_process_skips_the_step_in_both(folder, rank):
    first, second = results(folder, f"poisoned {rank}")
    assert_equal(first, second)
    assert first["finite"].tolist() == [False, True]
    assert first["unchanged"]


def test_two_processes_evaluate_as_one(folder):
    first, second = results(folder, "evaluation")
    assert_equal(first, second)
    expected = JOBS["evaluation"](ALONE)
    for name in ("settled", "load", "k_histogram"):
        assert torch.equal(first[name], expected[name]), name
    # Sums of float64 and float32 over rows, in another order.
    for name in ("result", "blocks"):
        torch.testing.assert_close(first[name], expected[name], rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("master", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_sharded_optimizer_gives_the_same_bits_and_holds_its_share(folder, optimizer, master):
    whole, sharded = (
        results(folder, f"{optimizer}, {master}, {shard}") for shard in ("none", "optimizer")
    )
    held = [[int(rank.pop("bytes 0")) for rank in ranks] for ranks in (whole, sharded)]
    for ranks in (whole, sharded):
        for rank in ranks:
            for number in (1, 2):
                del rank[f"bytes {number}"]
    assert_equal(whole[0], sharded[0])
    assert_equal(whole[1], sharded[1])
    alone = JOBS[f"{optimizer}, {master}, none"](ALONE)
    for number in range(3):
        del alone[f"bytes {number}"]
    assert_equal(whole[0], alone)
    # Both layers have as many weights. The gates' state, which is small, is in both processes.
    (all_of_it, _), (first, second) = held
    assert (first + second, 2 * first) == pytest.approx((all_of_it, all_of_it), rel=0.02)


def state_of(run, step):
    """The state of the loop at a checkpoint, without the clock and the bytes of its records."""
    state = json.loads((run / "checkpoints" / f"step-{step:07d}" / "state.json").read_text())
    del state["seconds"], state["metrics_offset"]
    return state


@pytest.mark.parametrize("name", ["two", "chain"])
def test_a_run_reads_the_text_of_one_process_whatever_number_goes_on(folder, whole, name):
    for step in (2, 4, 6, 8):
        ours, expected = state_of(folder / name, step), state_of(whole, step)
        assert ours["stream"] == expected["stream"]
        assert (ours["step"], ours["tokens"]) == (expected["step"], expected["tokens"])


@pytest.mark.parametrize("name", ["two", "chain"])
def test_a_run_ends_as_in_one_process_whatever_number_goes_on(folder, whole, name):
    # Sums of four rows in another order, through eight steps of Adam. Measured: 9e-8.
    got, expected = records(folder / name), records(whole)
    # A stopped run evaluates where it stopped, and its next part writes that record again.
    assert [(row["kind"], row["step"]) for row in got] == [
        (row["kind"], row["step"]) for row in expected
    ]
    for ours, theirs in zip(got, expected, strict=True):
        for key in theirs.keys() & {"loss", "forward_kl", "mean_k"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), ours["step"]


def test_a_sharded_run_leaves_checkpoints_that_one_process_goes_on_with(folder, whole):
    for step in (1, 8):
        ours, theirs = (
            saved_state(run / "checkpoints" / f"step-{step:07d}") for run in (folder / "two", whole)
        )
        assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {
            n: (t.dtype, t.shape) for n, t in theirs.items()
        }
