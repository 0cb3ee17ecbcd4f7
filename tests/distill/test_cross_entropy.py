"""Cross-entropy to the text in a step's loss: its share, and what it leaves alone."""

import pytest
import torch
import torch.nn.functional as F

from tiny import change, start_damaged
from tiny_onn.distill.optim import build_optimizer
from tiny_onn.distill.step import distill_step
from tiny_onn.evaluation.compare import evaluate
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import head_of, last_hidden_states
from tiny_onn.teacher.held_out import HeldOut


@pytest.mark.parametrize("coef", [0.0, 0.25, 0.9])
def test_a_steps_loss_holds_the_share_of_cross_entropy(coef):
    student, dense, rows, config = start_damaged(label_coef=coef)
    nll, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            hidden = last_hidden_states(student.train(), row.input_ids, **packed_kwargs(row))[0]
        logits = head_of(student).logits(hidden)
        nll += float(F.cross_entropy(logits, row.labels[0], reduction="sum"))
        count += int(row.loss_mask.sum())
    optimizer = build_optimizer(student, config.optim, seed=0)
    result = distill_step(student, dense, optimizer, rows, config)
    kl = result.forward_kl
    assert kl is not None and kl > 1e-3
    expected = (1 - coef) * kl + coef * nll / count
    torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=0)


def test_held_out_numbers_are_those_without_a_share():
    student, dense, rows, config = start_damaged(label_coef=0.9)
    held_out = HeldOut(dense, rows)
    with_share = evaluate(student, held_out, config.loss)
    assert with_share == evaluate(student, held_out, change(config, loss={"label_coef": 0.0}).loss)
