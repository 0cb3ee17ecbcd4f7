"""Twenty steps whose losses are on record, and changes that must not move them.

After a change that is meant to move the curve, write it again and say why in the commit:

    PYTHONPATH=tests python tests/distill/test_golden.py
"""

import json
from typing import Any

import pytest
import torch

from repository import ROOT
from tiny import CONFIG, change, make_dense, make_documents
from tiny_onn.conversion.pipeline import make_student
from tiny_onn.data.packing import build_row
from tiny_onn.distill.checkpointing import checkpoint_layers
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.schedule import lr_factor, set_learning_rates
from tiny_onn.distill.step import distill_step
from tiny_onn.model.hooks import MlpInputs

CURVE = ROOT / "tests" / "distill" / "golden" / "tiny_20_steps.json"
STEPS, ROW = 20, 64
LENGTHS = ((20, 12, 32), (40, 24), (9, 30, 25), (16, 16, 16, 16), (50, 14))
GOLDEN = change(
    CONFIG,
    smk={"surprise": "gain", "direction": "max", "candidates": "all"},
    router={"budget_form": "threshold"},
    data={"row_tokens": ROW},
    optim={"expert_lr": 3e-3, "gate_lr": 3e-3},
)


def documents(step):
    """The documents of a step: the same text comes back every five steps."""
    number = step % len(LENGTHS)
    return make_documents(LENGTHS[number], seed=number)


def one_row(step):
    return [build_row(documents(step), row_tokens=ROW, pad_token_id=0)]


def half_rows(step):
    """The same documents in two rows, both padded to the same length."""
    first, *rest = documents(step)
    return [build_row(part, row_tokens=ROW, pad_token_id=0) for part in ([first], rest)]


def backward_order(step):
    """The same documents of a row in another order: attention does not cross them."""
    return [build_row(documents(step)[::-1], row_tokens=ROW, pad_token_id=0)]


def curve(config=GOLDEN, rows_of=one_row) -> list[float]:
    """The losses of twenty steps from the same start."""
    dense = make_dense("llama")
    student = make_student(config, MlpInputs(dense, one_row(0)))
    checkpoint_layers(student, config.train.checkpointing)
    optimizer = build_optimizer(student, config.optim)
    losses = []
    for step in range(STEPS):
        set_learning_rates(optimizer, lr_factor((step + 0.5) / STEPS, config.optim))
        losses.append(distill_step(student, dense, optimizer, rows_of(step), config).loss.item())
    return losses


@pytest.fixture(scope="module")
def golden() -> list[float]:
    return json.loads(CURVE.read_text())["losses"]


@pytest.fixture(scope="module")
def plain() -> list[float]:
    return curve()


def test_the_curve_is_the_one_on_record(plain, golden):
    # Another processor or torch sums in another order: 2e-7 with two threads for one.
    assert plain == pytest.approx(golden, rel=1e-4)
    # It says something: the loss falls.
    assert sum(golden[-5:]) < 0.9 * sum(golden[:5])


def test_the_curve_does_not_move_between_runs(plain):
    assert curve() == plain


@pytest.mark.parametrize("mode", ["layer", "selective", "offload"])
def test_recomputing_activations_moves_nothing(plain, mode):
    # The second forward pass runs the same operations on the same numbers.
    assert curve(change(GOLDEN, train={"checkpointing": mode})) == plain


def test_the_order_of_documents_in_a_row_does_not_matter(plain):
    # Sums over tokens in another order; measured: 1.7e-7.
    assert curve(rows_of=backward_order) == pytest.approx(plain, rel=1e-5)


def test_two_rows_teach_as_one_of_the_same_documents():
    # Sums over tokens in another order; measured: 1.9e-7. A budget moves the curve by a tenth: two
    # rows steer it by the mean of their exact thresholds, which is not that of one row.
    config = change(GOLDEN, router={"selection": "top_k"})
    assert curve(config, half_rows) == pytest.approx(curve(config), rel=1e-5)


def test_chunks_of_the_experts_and_of_the_loss_move_only_last_bits(plain):
    # Matrix products of other sizes; measured: 3.5e-7.
    for changes in ({"train": {"ffn_chunk_tokens": 16}}, {"loss": {"chunk_tokens": 16}}):
        sections: dict[str, Any] = changes
        assert curve(change(GOLDEN, **sections)) == pytest.approx(plain, rel=1e-5)


def test_the_expert_paths_teach_the_same():
    # What the grouped path can run: surprise of active experts only. It sums over an expert's own
    # tokens, the dense one over all of them with zeros between; measured: 2.1e-7.
    config = change(GOLDEN, smk={"candidates": "active"})
    dense, grouped = (
        curve(change(config, train={"expert_path": path})) for path in ("dense", "grouped")
    )
    assert grouped == pytest.approx(dense, rel=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    CURVE.parent.mkdir(exist_ok=True)
    note = (
        "losses of tests/distill/test_golden.py, written by `python tests/distill/test_golden.py`"
    )
    text = json.dumps({"what": note, "torch": torch.__version__, "losses": curve()}, indent=1)
    CURVE.write_text(text + "\n")
