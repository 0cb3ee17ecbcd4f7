"""Norms in the metric of the loss say what a missing output costs; only conversion uses them."""

import argparse

import pytest
import torch
import torch.nn.functional as F

from experiments import arms, loss_metric, split_text
from experiments.arms_table import LOSS_METRIC
from experiments.blockwise import tiny_teacher
from tiny_onn.config.read import load_config
from tiny_onn.conversion.pipeline import prepare, read_inputs
from tiny_onn.device import prepare_device
from tiny_onn.errors import UserError
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import gated_mlps


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    teacher = tiny_teacher(tmp_path_factory.mktemp("loss_metric") / "teacher")
    settings = [
        f'teacher.path="{teacher}"',
        "teacher.dtype=float32",
        "experts.num_experts=8",
        "experts.calibration_tokens=256",
        "router.target_k=4",
        "data.row_tokens=64",
        "data.eval_tokens=128",
        "train.compile=false",
        "train.device=cpu",
    ]
    return prepare_device(load_config(None, "demo", settings))[0]


def test_the_metric_is_the_second_order_cost_of_a_missing_output(config):
    inputs, _, _ = read_inputs(config, torch.device("cpu"))
    dense, rows = inputs.dense, inputs.rows
    generator = torch.Generator().manual_seed(0)
    # The last layer's output at a token is read by no other token, so that costs add up.
    draws = [loss_metric.output_fisher(dense, rows, generator)[-1] for _ in range(40)]
    fisher_DD = torch.stack(draws).mean(0)
    last = gated_mlps(dense)[-1].module
    missing_D = torch.randn(len(fisher_DD), generator=generator) * 1e-2

    def log_probs(row, missing):
        with torch.no_grad(), last.register_forward_hook(lambda _, __, output: output - missing):
            logits = dense(row.input_ids, **packed_kwargs(row)).logits[0]
        return logits.double().log_softmax(-1)

    cost, tokens = 0.0, 0
    for row in rows:
        whole_TV, cut_TV = log_probs(row, 0.0), log_probs(row, missing_D)
        cost_T = F.kl_div(cut_TV, whole_TV, log_target=True, reduction="none").sum(-1)
        cost += float(cost_T[row.loss_mask[0]].sum())
        tokens += int(row.router_mask[0].sum())
    expected = float(missing_D.double() @ fisher_DD @ missing_D.double()) / 2
    assert cost / tokens == pytest.approx(expected, rel=0.2)


def test_a_root_squared_is_the_damped_metric():
    half_DD = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    fisher_DD = half_DD @ half_DD.T
    root_DD = loss_metric.root_of(fisher_DD)
    scaled_DD = fisher_DD / fisher_DD.diagonal().mean()
    torch.testing.assert_close(root_DD, root_DD.T)
    expected = scaled_DD + loss_metric.DAMPING * torch.eye(6).double()
    torch.testing.assert_close(root_DD @ root_DD, expected)


def test_with_an_even_metric_the_student_is_the_usual_one(config, monkeypatch):
    usual = prepare(config).student.state_dict()
    monkeypatch.setattr(loss_metric, "root_of", lambda f: torch.eye(len(f), dtype=torch.float64))
    same = prepare(config, make=loss_metric.make_student).student.state_dict()
    assert usual.keys() == same.keys()
    for name, value in usual.items():
        assert torch.equal(value, same[name]), name


def test_another_metric_changes_the_cut_and_no_weight_of_the_teacher(config):
    usual, other = prepare(config), prepare(config, make=loss_metric.make_student)
    ours, theirs = (p.student.state_dict() for p in (usual, other))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours if "router" in name)
    for mine, its in zip(gated_mlps(usual.teacher), gated_mlps(other.teacher), strict=True):
        assert torch.equal(mine.down_proj.weight, its.down_proj.weight)


@pytest.mark.parametrize("arm", [arm for arm in arms.ARMS if arm.endswith(LOSS_METRIC)])
def test_several_processes_are_refused(arm, tmp_path):
    asked = {"arms": [arm], "tokens": 1, "seeds": [0], "rates": [1.0], "gate_rates": [1.0]}
    options = argparse.Namespace(plan=None, out=tmp_path, processes=2, **asked)
    parts = split_text.Parts(*[tmp_path] * 4)
    with pytest.raises(UserError, match="--processes: got 2, expected 1"):
        arms.jobs_left(options, parts)
    options.processes = 1
    assert [job.arm for job in arms.jobs_left(options, parts)] == [arm]
