"""Two processes that each hold a share of the weights make the steps of one that holds all."""

import json

import pytest
import torch

import full_cases
from full_cases import MASTERS, MODES, OPTIMIZERS, RECIPES
from pair_results import assert_equal, assert_weights_move_alike, results
from parallel_cases import saved_state
from run_records import records, student_of
from tiny import CONFIG, change, save_teacher
from tiny_onn.config.checks import validate
from tiny_onn.distill.loop import run_distill
from tiny_onn.distill.start_checks import check_start
from tiny_onn.errors import UserError
from tiny_onn.parallel import ALONE, World, check_world
from tiny_onn.planning.cluster import Cluster
from tiny_onn.planning.plan import plan

JOBS = full_cases.jobs()
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    """The folder of what the processes wrote, and the settings of their run."""
    folder = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINY_ONN_TEST_FOLDER", str(folder))
        yield folder, full_cases.spawn(folder)


def assert_same_steps(folder, name, clipped=False):
    """Two processes with a row each gave the bits of one, but for the norm of the gradients."""
    first, second = results(folder, name)
    assert_equal(first, second)
    expected = JOBS[name](ALONE)
    assert sum(n.startswith("count 0") for n in expected) == 7
    for key in [key for key in expected if key.endswith(" norm")]:
        # The squares of shares are added in another order.
        ours, theirs = float(first.pop(key)), float(expected.pop(key))
        assert ours == pytest.approx(theirs, rel=8 * EPS), key
    if not clipped:
        return assert_equal(first, expected)
    for key, tensor in expected.items():
        # The norm scales the gradients, of which a step of Adam forgets the scale but not its
        # rounding. Measured: 2e-7.
        bound = 1e-6 * max(1.0, float(tensor.abs().max()))
        torch.testing.assert_close(first[key], tensor, rtol=0, atol=bound)
    return None


@pytest.mark.parametrize("stage", ["global", "blockwise"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_with_a_row_each_the_steps_of_shares_have_the_bits_of_whole_weights(folder, recipe, stage):
    assert_same_steps(folder, f"{recipe}, {stage}, 2 rows", clipped=recipe == "task")


@pytest.mark.parametrize("mode", MODES)
def test_layers_that_are_computed_again_gather_their_weights_again(folder, mode):
    assert_same_steps(folder, f"checkpointing {mode}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_with_two_rows_each_the_steps_of_shares_are_those_of_one_process(folder, recipe):
    name = f"{recipe}, global, 4 rows"
    first, second = results(folder, name)
    assert_equal(first, second)
    expected = JOBS[name](ALONE)
    for key, tensor in expected.items():
        # Four rows are added in another order, and the counts of the first step are whole numbers.
        if key.startswith("count 0") and not tensor.is_floating_point():
            assert torch.equal(first[key], tensor), key
        elif key.startswith(("count 0", "measured 0")):
            bound = float(64 * EPS * tensor.abs().max())
            torch.testing.assert_close(first[key], tensor, rtol=0, atol=bound)
    assert_weights_move_alike(first, expected)


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_of_shares_has_the_bits_of_one_of_whole_weights(folder, optimizer, master):
    first, second = results(folder, f"{optimizer}, {master}")
    alone = JOBS[f"{optimizer}, {master}"](ALONE)
    weights = {n for n in first if n.startswith("student")}
    assert_equal({n: first[n] for n in weights}, {n: second[n] for n in weights})
    saved = [{n for n in ours if n.startswith("saved")} for ours in (first, second)]
    # Each process saves whole tensors, and no tensor is saved twice.
    assert all(saved)
    assert not saved[0] & saved[1]
    assert_equal(first | second, alone)


def test_a_process_holds_its_share_of_experts_state_and_teacher(folder):
    alone = JOBS["memory"](ALONE)
    for ours in results(folder, "memory"):
        for name in ("experts", "state", "teacher"):
            assert 2 * int(ours[name]) == int(alone[name]), name
        assert torch.equal(ours["backbone"], alone["backbone"])


def test_a_quantised_teacher_stays_whole(folder):
    first, second = results(folder, "quantised")
    assert_equal(first, second)
    assert first["whole"]
    assert_equal(first, JOBS["quantised"](ALONE))


def test_processes_with_shares_evaluate_rows_that_do_not_divide_evenly_as_one(folder):
    first, second = results(folder, "evaluation")
    assert_equal(first, second)
    expected = JOBS["evaluation"](ALONE)
    for name in ("settled", "load", "k_histogram"):
        assert torch.equal(first[name], expected[name]), name
    for name in ("result", "blocks"):
        torch.testing.assert_close(first[name], expected[name], rtol=4 * EPS, atol=0)


def test_a_run_goes_on_with_shares_without_and_with_them_again(folder, whole):
    got, expected = records(folder / "chain"), records(whole)
    assert [(row["kind"], row["step"]) for row in got] == [
        (row["kind"], row["step"]) for row in expected
    ]
    for ours, theirs in zip(got, expected, strict=True):
        for key in theirs.keys() & {"loss", "forward_kl", "mean_k"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), ours["step"]


def test_a_checkpoint_of_shares_holds_whole_tensors(folder, whole):
    ours, theirs = (
        saved_state(run / "checkpoints" / "step-0000006") for run in (folder / "chain", whole)
    )
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {
        n: (t.dtype, t.shape) for n, t in theirs.items()
    }
    state = json.loads((folder / "chain" / "checkpoints" / "step-0000006/state.json").read_text())
    assert state["tokens"] == 6 * 4 * 64


def test_the_student_of_a_run_with_shares_loads_alone(folder, whole):
    ours, theirs = (student_of(run).state_dict() for run in (folder / "chain", whole))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optim": {"name": "adafactor"}}, 'optim.name: got "adafactor" with train.shard = "full"'),
        (
            {"train": {"checkpointing": "selective"}},
            'train.checkpointing: got "selective" with train.shard = "full", expected "layer"',
        ),
    ],
)
def test_what_needs_whole_weights_is_refused(changes, told):
    config = change(change(CONFIG, train={"shard": "full"}), **changes)
    with pytest.raises(UserError) as refused:
        validate(config)
    assert told in str(refused.value)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit"])
def test_shares_that_cut_a_block_of_8_bit_state_are_refused_before_anything_is_loaded(
    optimizer, tmp_path
):
    save_teacher(tmp_path / "teacher", intermediate_size=8 * 9)
    (tmp_path / "teacher" / "model.safetensors").unlink()
    config = change(
        CONFIG,
        teacher={"path": str(tmp_path / "teacher")},
        optim={"name": optimizer},
        train={"shard": "full", "rows_per_step": 2},
    )
    with pytest.raises(UserError, match="and 1152 weights of a projection in each of 2 processes"):
        run_distill(config, out=tmp_path / "run", world=World(rank=0, size=2))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="and 1152 weights of a projection in each of 2 processes"):
        plan(config, tmp_path / "teacher", "H100", cluster=Cluster(gpus=2, shard="full"))
    for fitting in (
        change(config, optim={"name": "adamw"}),
        change(config, train={"shard": "optimizer"}),
    ):
        check_start(fitting, tmp_path, world=World(rank=0, size=2))
    check_start(config, tmp_path)


def test_experts_that_do_not_divide_over_the_processes_are_refused():
    config = change(CONFIG, train={"shard": "full", "rows_per_step": 6})
    with pytest.raises(UserError, match='got "full" with 3 processes and 8 experts, expected a'):
        check_world(config, World(rank=0, size=3))
    check_world(change(config, train={"shard": "none"}), World(rank=0, size=3))
