"""PEFT's adapters on the experts, by the parameter names of transformers' MoE blocks."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tiny import make_dense, make_ids, make_student
from tiny_onn.model.experts import Execution
from tiny_onn.model.student import TinyOnnForCausalLM

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    # PEFT 0.21 (2026-11) uses a name of transformers 5.23 that is to be removed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapted(student, target_parameters=EXPERTS) -> Any:
    torch.manual_seed(0)
    settings = LoraConfig(r=2, lora_alpha=8, target_modules=[], target_parameters=target_parameters)
    return get_peft_model(student, settings)


def train(model, steps=8) -> list[float]:
    ids = make_ids(4)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=3e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("path", ["dense", "grouped"])
@pytest.mark.parametrize("selection", ["top_k", "budget", "oracle"])
def test_adapters_on_the_experts_learn_and_merge_into_what_they_computed(path, selection):
    student = make_student(make_dense(), selection=selection)
    for bank in student.banks():
        bank.set_execution(Execution(path=path))
    ids = make_ids()
    before = student(input_ids=ids).logits
    model = adapted(student)
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2
    assert all(".lora_" in name and p.grad.any() for name, p in trained.items())
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert not torch.allclose(expected, before, atol=1e-2)
        merged = model.merge_and_unload()
        got = merged(input_ids=ids).logits
    assert type(merged) is TinyOnnForCausalLM
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", EXPERTS)
def test_either_weight_alone_is_adapted(target):
    model = adapted(make_student(make_dense()), [target])
    losses = train(model)
    assert losses[-1] < losses[0]


def test_an_adapter_is_saved_and_put_on_a_loaded_student(tmp_path):
    make_student(make_dense()).save_pretrained(tmp_path / "student")
    model = adapted(TinyOnnForCausalLM.from_pretrained(tmp_path / "student"))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        TinyOnnForCausalLM.from_pretrained(tmp_path / "student"), tmp_path / "adapter"
    )
    with torch.no_grad():
        expected, got = (each.eval()(input_ids=make_ids()).logits for each in (model, again))
    assert torch.equal(got, expected)


def test_gates_learn_beside_adapters_and_are_saved_with_them(tmp_path):
    make_student(make_dense()).save_pretrained(tmp_path / "student")
    student: Any = TinyOnnForCausalLM.from_pretrained(tmp_path / "student")
    student.fine_tune(gates=True)
    settings = LoraConfig(
        r=2, target_modules=[], target_parameters=EXPERTS, modules_to_save=["router"]
    )
    model: Any = get_peft_model(student, settings)
    gates = [p for n, p in model.named_parameters() if ".router." in n and p.requires_grad]
    before = [gate.detach().clone() for gate in gates]
    train(model)
    assert len(gates) == 4
    assert not any(torch.equal(*pair) for pair in zip(gates, before, strict=True))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        TinyOnnForCausalLM.from_pretrained(tmp_path / "student"), tmp_path / "adapter"
    )
    with torch.no_grad():
        expected, got = (each.eval()(input_ids=make_ids()).logits for each in (model, again))
    assert torch.equal(got, expected)


def test_adapters_in_the_trainer_say_that_they_alone_learn(capsys):
    model = adapted(make_student(make_dense()))
    model.train()
    model(input_ids=make_ids(), labels=make_ids())
    said = capsys.readouterr().err
    assert "parameters that train: experts (2,624 of 11,840); frozen: gates (528)" in said
