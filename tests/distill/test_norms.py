"""Gains of norms that learn: exact gradients, a teacher that stays, and gains that are kept."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from run_records import at_step, send
from tiny import CONFIG, change, make_dense, make_ids, make_rows, save_teacher, write_corpus
from tiny_onn.config.checks import validate
from tiny_onn.config.read import config_from_json, resolved_json
from tiny_onn.conversion.pipeline import make_student
from tiny_onn.conversion.verify import backbone_tensors
from tiny_onn.distill.assembly import Training, assemble
from tiny_onn.distill.blockwise import blockwise_step, teacher_power
from tiny_onn.distill.loop import run_distill
from tiny_onn.distill.step import distill_step
from tiny_onn.errors import UserError
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.norms import gain_unit, norm_gains, norms_of, own_norms
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.runs.students import load_student, load_teacher_of
from tiny_onn.teacher.load import teacher_for

ROWS = make_rows((20, 13, 30, 40, 9, 25, 31, 20), 32)
FAMILIES = {"llama": 5, "qwen3": 9, "gemma2": 9, "olmo2": 9, "cohere": 3}
LEARN = change(CONFIG, optim={"norm_lr": 1e-2, "clip_norm": 1e9})
MOVING: dict[str, Any] = {"expert_lr": 0.0, "gate_lr": 0.0, "norm_lr": 1e-2}


def start(config=LEARN, family="llama", **dense_options) -> tuple[Training, Any]:
    """The program of a step, and its dense model."""
    validate(config)
    dense = make_dense(family, **dense_options)
    student = make_student(config, MlpInputs(dense, ROWS[:3]))
    return assemble(config, student, teacher_for(dense, config.teacher)), dense


def step(of: Training, rows=ROWS[:1]):
    inputs = (of.student, of.teacher, of.optimizer, rows, of.config)
    return distill_step(*inputs, passes=of.passes)


def gains(model):
    """The gains of a model's norms, by their name in the backbone."""
    backbone = getattr(model, "backbone", model)
    return {name: backbone.get_parameter(name).detach().clone() for name in norms_of(backbone)}


def keep_gradients(of: Training, monkeypatch) -> dict[str, torch.Tensor]:
    """The gradients that a step hands to the optimizer, by name."""
    kept = {}

    def note():
        for name, p in of.student.trainable().items():
            kept[name] = None if p.grad is None else p.grad.clone()

    monkeypatch.setattr(of.optimizer, "step", note)
    return kept


@pytest.mark.parametrize("family", FAMILIES)
def test_all_norms_of_a_family_are_found(family):
    dense = make_dense(family)
    vectors = {n for n, p in dense.named_parameters() if p.ndim == 1 and "norm" in n}
    assert norms_of(dense).keys() == vectors
    assert len(vectors) == FAMILIES[family]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", ["none", "layer", "selective", "offload"])
def test_gradients_of_all_gains_are_those_of_plain_autograd(family, checkpointing, monkeypatch):
    of, _ = start(change(LEARN, train={"checkpointing": checkpointing}), family)
    kept, row = keep_gradients(of, monkeypatch), ROWS[0]
    step(of)
    # The logits of both models, the loss of the definition, and torch's own backward pass.
    kwargs = packed_kwargs(row)
    ours = of.student.train()(input_ids=row.input_ids, **kwargs).logits[0].double()
    with torch.no_grad():
        theirs = of.teacher(input_ids=row.input_ids, **kwargs).logits[0].double()
    kl_T = F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="none").sum(-1)
    loss = kl_T[row.loss_mask[0]].mean()
    names = norm_gains(of.student)
    expected = torch.autograd.grad(loss, list(names.values()))
    for name, gradient in zip(names, expected, strict=True):
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(kept[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("placement", ["shared", "separate"])
def test_the_teacher_keeps_its_own_gains_to_the_bit(placement, dtype):
    config = change(LEARN, teacher={"placement": placement, "dtype": dtype})
    of, dense = start(config, "qwen3", dtype=dtype)
    ids, before = make_ids(), {n: p.clone() for n, p in of.teacher.named_parameters()}
    started, frozen = gains(of.student), backbone_tensors(of.student)
    frozen = {n: t.clone() for n, t in frozen.items() if n not in started}
    with torch.no_grad():
        logits = of.teacher(input_ids=ids, use_cache=False).logits
    for _ in range(3):
        step(of)
    with torch.no_grad():
        assert torch.equal(of.teacher(input_ids=ids, use_cache=False).logits, logits)
    for name, parameter in of.teacher.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert not parameter.requires_grad
    for name, gain in gains(of.student).items():
        assert not torch.equal(gain, started[name]), name
    for name, tensor in frozen.items():
        assert torch.equal(backbone_tensors(of.student)[name], tensor), name
    assert all(torch.equal(t, before[n]) for n, t in gains(dense).items())


def test_without_a_rate_nothing_of_the_backbone_learns():
    of, dense = start(CONFIG)
    assert not norm_gains(of.student)
    assert all(".mlp." in name for name in of.student.trainable())
    assert [group["system"] for group in of.optimizer.param_groups] == ["experts", "gates"]
    assert of.student.backbone.model.norm.weight is dense.model.norm.weight
    assert "norms_learned" not in of.student.config.to_dict()


def test_the_backbone_stays_without_dropout():
    of, _ = start()
    layer = of.student.train().backbone.model.layers[0]
    assert layer.mlp.training
    assert not layer.self_attn.training


def test_gains_have_a_group_without_decay_on_the_experts_schedule():
    of, _ = start(change(LEARN, optim={"weight_decay": 0.5, "gate_weight_decay": 0.5}))
    group = of.optimizer.param_groups[-1]
    assert (group["system"], group["lr"], group["weight_decay"]) == ("norms", 1e-2, 0.0)
    assert len(group["params"]) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unit_of_a_gain_is_the_root_mean_square_of_its_factors(family):
    dense = make_dense(family)
    for norm in norms_of(dense).values():
        # Gemma's norms store the difference from 1.
        factors = norm.get_parameter("weight") + float(family == "gemma2")
        assert float(gain_unit(norm)) == pytest.approx(float(factors.square().mean().sqrt()), 1e-4)


def test_rates_in_units_are_free_of_a_gains_scale():
    # A step of Adam is the rate in the unit, so that a gain of 100 moves 100 times as far.
    config = change(LEARN, optim={**MOVING, "lr_scale": "rms", "eps": 1e-30})
    validate(config)
    moved = []
    for factor in (1.0, 64.0):
        dense = make_dense(tie_word_embeddings=False)
        dense.model.norm.weight.mul_(factor)
        dense.lm_head.weight.div_(factor)
        student = make_student(config, MlpInputs(dense, ROWS[:3]))
        of = assemble(config, student, dense)
        before = gains(student)["model.norm.weight"]
        step(of)
        moved.append((gains(student)["model.norm.weight"] - before) / factor)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-6)
    assert moved[0].abs().max() > 1e-3


def test_bfloat16_gains_add_up_steps_below_their_rounding():
    config = change(LEARN, teacher={"dtype": "bfloat16"}, optim={**MOVING, "norm_lr": 1e-4})
    of, _ = start(config, dtype="bfloat16")
    norm = of.student.backbone.model.norm.weight
    before = norm.detach().clone().float()
    for _ in range(4):
        step(of)
    copied = of.optimizer.state[norm]["master"]
    assert copied.dtype == torch.float32
    assert (copied - before).abs().max() > 2e-4
    assert torch.equal(norm, copied.bfloat16())


def test_the_blockwise_stage_leaves_gains_alone():
    of, _ = start()
    before = gains(of.student)
    power = teacher_power(of.teacher, ROWS[:2])
    blockwise_step(of.student, of.teacher, of.optimizer, ROWS[:2], of.config, power=power)
    assert all(torch.equal(gain, before[name]) for name, gain in gains(of.student).items())


def test_norms_without_gains_are_refused():
    dense = make_dense("olmo2")
    student = make_student(CONFIG, MlpInputs(dense, ROWS[:3]))
    for name in norms_of(dense):
        module = student.backbone.get_submodule(name.removesuffix(".weight"))
        del module.weight
    with pytest.raises(UserError, match=r"optim\.norm_lr: got .* expected 0; set it to 0"):
        own_norms(student)


def test_rates_below_0_are_refused_and_old_runs_have_0():
    with pytest.raises(UserError, match=r"optim\.norm_lr: got -1\.0, expected a number >= 0"):
        validate(change(CONFIG, optim={"norm_lr": -1.0}))
    text = resolved_json(CONFIG).replace('    "norm_lr": 0.0,\n', "")
    assert "norm_lr" not in text
    assert config_from_json(text).optim.norm_lr == 0


@pytest.fixture(scope="module")
def run_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("norms")
    return change(
        LEARN,
        teacher={"path": str(save_teacher(folder / "teacher", "qwen3"))},
        data={
            "sources": (str(write_corpus(folder / "corpus", num_files=6)),),
            "row_tokens": 48,
            "eval_tokens": 96,
            "held_out_fraction": 0.2,
        },
        # Smaller than what bfloat16 resolves, in which a backbone counts as its teacher's.
        optim={"norm_lr": 1e-5, "lr_scale": "rms"},
        train={"tokens": 6 * 48, "eval_every_tokens": 2 * 48, "save_every_tokens": 0},
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("blockwise", [0, 2 * 48])
def test_a_stopped_run_goes_on_bit_for_bit_and_its_student_keeps_its_gains(
    run_config, tmp_path, dtype, blockwise
):
    config = change(
        run_config,
        teacher={"dtype": dtype},
        optim={"norm_lr": 1e-2 if dtype == "bfloat16" else 1e-5},
        train={"blockwise_tokens": blockwise},
    )
    whole, out = tmp_path / "whole", tmp_path / "run"
    run_distill(config, out=whole)
    first = run_distill(config, out=out, after_step=at_step(4, partial(send, 15)))
    assert first.interrupted
    stopped = load_student(str(out), torch.device("cpu"))
    run_distill(config, out=out, resume=True)
    last = f"step-{6 + blockwise // 48:07d}"
    for name in ("student.safetensors", "optimizer.safetensors"):
        ours, theirs = (path / "checkpoints" / last / name for path in (out, whole))
        assert ours.read_bytes() == theirs.read_bytes(), name
    loaded = load_student(str(out), torch.device("cpu"))
    teacher = load_teacher_of(loaded, torch.device("cpu"))
    again: Any = TinyOnnForCausalLM.from_pretrained(out / "student")
    finished, reloaded = gains(loaded.student), gains(again)
    for name, gain in gains(teacher).items():
        # The teacher, whose backbone is otherwise shared, has its own gains.
        assert not torch.equal(gain, finished[name]), name
        assert not torch.equal(gains(stopped.student)[name], finished[name]), name
        assert torch.equal(reloaded[name], finished[name]), name


def test_a_resumed_run_cannot_begin_to_train_norms(run_config, tmp_path):
    run_distill(run_config, out=tmp_path, after_step=at_step(2, partial(send, 15)))
    for rate in (0.0, 1e-3):
        config = change(run_config, optim={"norm_lr": rate})
        with pytest.raises(UserError, match=r"optim\.norm_lr cannot change"):
            run_distill(config, out=tmp_path, resume=True)
