"""Inactive experts leave their mean output; scales start at 1; all experts on is the teacher."""

import pytest
import torch

from tiny import CONFIG, change, make_dense, make_ids, make_rows, make_student
from tiny_onn.conversion.mean_outputs import fit_compensation
from tiny_onn.conversion.pipeline import make_student as prepared_student
from tiny_onn.conversion.verify import identity_gap
from tiny_onn.data.rows import needs_text
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import gated_mlps, last_hidden_states
from tiny_onn.model.experts import Execution
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.student import TinyOnnForCausalLM, split_parameters
from tiny_onn.planning.costs import forward_flops

S = 2
ROWS = make_rows((20, 13, 30, 64, 9, 40, 17, 22, 33), 64)


def counted_inputs(dense, layer):
    seen = []
    mlp = gated_mlps(dense)[layer]
    handle = mlp.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for row in ROWS:
            last_hidden_states(dense, row.input_ids, **packed_kwargs(row))
    handle.remove()
    return torch.cat(seen)[torch.cat([row.router_mask[0] for row in ROWS])]


def corrections(bank) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """A bank's mean outputs and scales."""
    assert bank.mean_outputs is not None
    assert bank.expert_scale is not None
    return bank.mean_outputs, bank.expert_scale


def means(student, layer=0) -> torch.nn.Parameter:
    found = student.banks()[layer].mean_outputs
    assert found is not None
    return found


def expert_outputs(bank, x):
    """Every expert's output, (E, T, D)."""
    return torch.stack(
        [
            (bank.activation(x @ gate.T) * (x @ up.T)) @ down.T
            for (gate, up), down in zip(
                (gate_up.chunk(2) for gate_up in bank.experts.gate_up_proj),
                bank.experts.down_proj,
                strict=True,
            )
        ]
    )


def test_mean_outputs_are_those_of_the_tokens_that_leave_the_expert_inactive():
    dense = make_dense("llama")
    student = make_student(dense, compensation="mean", selection="top_k")
    banks = student.banks()
    # One expert that is always active has no such token.
    with torch.no_grad():
        banks[1].router.bias[2] = 1e3
    fit_compensation(MlpInputs(dense, ROWS), banks)
    x = counted_inputs(dense, 1)
    inactive = ~banks[1].router(x).active
    for e, outputs in enumerate(expert_outputs(banks[1], x)):
        rows = outputs[inactive[:, e]]
        expected = rows.mean(0) if len(rows) else torch.zeros(32)
        torch.testing.assert_close(means(student, 1)[e], expected, rtol=1e-4, atol=1e-5)
    assert not inactive[:, 2].any()


@pytest.mark.parametrize("path", ["dense", "grouped"])
def test_a_bank_adds_the_means_of_inactive_experts_and_scales_active_ones(path):
    bank = make_student(make_dense("llama"), compensation="mean", learn_scale=True).banks()[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in corrections(bank):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    bank.set_execution(Execution(path=path))
    mean_outputs, scale = corrections(bank)
    x = torch.randn(9, 32, generator=generator)
    active = bank.router(x).active
    expected = torch.zeros(9, 32)
    for e, outputs in enumerate(expert_outputs(bank, x)):
        given = scale[e] * outputs
        expected += torch.where(active[:, e, None], given, mean_outputs[e])
    torch.testing.assert_close(bank(x), expected, rtol=1e-4, atol=1e-5)


def test_means_lower_the_error_of_every_layer_on_the_text_they_come_from():
    dense = make_dense("llama", num_hidden_layers=3)
    plain, helped = (
        make_student(dense, compensation=kind, selection="top_k").banks()
        for kind in ("none", "mean")
    )
    fit_compensation(MlpInputs(dense, ROWS), helped)
    for layer, mlp in enumerate(gated_mlps(dense)):
        x = counted_inputs(dense, layer)
        with torch.no_grad():
            errors = [(banks[layer](x) - mlp.module(x)).square().sum() for banks in (plain, helped)]
        assert errors[1] < errors[0]


def test_all_experts_on_is_the_dense_model():
    dense, ids = make_dense("llama"), make_ids()
    student = make_student(dense, compensation="mean", learn_scale=True)
    fit_compensation(MlpInputs(dense, ROWS), student.banks())
    assert means(student).abs().sum() > 0
    size = dense(input_ids=ids).logits.abs().max().item()
    assert identity_gap(student, dense, ids) <= 1e-5 * size


def test_both_learn_with_the_experts_and_are_absent_when_off():
    dense = make_dense("llama")
    off = make_student(dense)
    assert not [
        name for name, _ in off.named_parameters() if "mean_outputs" in name or "scale" in name
    ]
    on = make_student(dense, compensation="mean", learn_scale=True)
    experts, gates = split_parameters(on)
    assert len(experts) == 2 * 4
    assert len(gates) == 2 * 2
    on(input_ids=make_ids()).logits.square().mean().backward()
    for name, parameter in experts.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_both_are_saved_with_the_student(tmp_path):
    dense = make_dense("llama", dtype="bfloat16")
    student = make_student(dense, compensation="mean", learn_scale=True)
    fit_compensation(MlpInputs(dense, ROWS), student.banks())
    with torch.no_grad():
        corrections(student.banks()[1])[1][3] = 1.25
    student.save_pretrained(tmp_path)
    again = TinyOnnForCausalLM.from_pretrained(tmp_path)
    assert again.config.compensation == "mean"
    for ours, theirs in zip(student.banks(), again.banks(), strict=True):
        for mine, loaded in zip(corrections(ours), corrections(theirs), strict=True):
            assert torch.equal(mine, loaded)
            assert loaded.dtype == torch.float32


def test_settings_fit_the_means_from_text_and_count_their_work():
    dense = make_dense("llama")
    plain = change(CONFIG, router={"selection": "top_k"})
    helped = change(plain, experts={"compensation": "mean"})
    assert not needs_text(plain)
    assert needs_text(helped)
    students = [prepared_student(config, MlpInputs(dense, ROWS)) for config in (plain, helped)]
    assert means(students[1]).abs().sum() > 0
    before, after = (forward_flops(student, 4.0, 10.0)["ffn_flops"] for student in students)
    assert after - before == 2 * 2 * 8 * 32


def test_nothing_stands_in_for_a_shared_expert():
    experts = {"init": "importance", "compensation": "mean", "gate_init": "ridge"}
    config = change(CONFIG, experts={**experts, "num_shared": S}, data={"row_tokens": 64})
    student = prepared_student(config, MlpInputs(make_dense(), ROWS))
    for bank in student.banks():
        assert bank.mean_outputs is not None
        assert not bank.mean_outputs[:S].any()
        assert bank.mean_outputs[S:].any(-1).any()
