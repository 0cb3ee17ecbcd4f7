"""A student in transformers' own Trainer: what moves, in full precision and under bf16."""

from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tiny import make_dense, make_ids, make_student
from tiny_onn.conversion.verify import backbone_hash
from tiny_onn.model.student import TinyOnnForCausalLM

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    # The argument's name since transformers 5.23 is not known to 5.17.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated"),
]


def load(folder, **changes) -> Any:
    options = {"compensation": "mean", "learn_scale": True, **changes}
    make_student(make_dense(), **options).save_pretrained(folder / "student")
    student: Any = TinyOnnForCausalLM.from_pretrained(folder / "student")
    return student


def train(student, folder, **options):
    """Train for four steps; return the losses and the names of tensors that moved."""
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    rows = [{"input_ids": row, "labels": row} for row in make_ids(16)]
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        use_cpu=True,
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        warmup_steps=0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model=student, args=arguments, train_dataset=rows, eval_dataset=rows)  # pyright: ignore[reportArgumentType]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.evaluate()["eval_loss"] < losses[0]
    after = student.state_dict()
    return losses, {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_a_frozen_backbone_stays_and_the_experts_move(tmp_path, options):
    student = load(tmp_path)
    backbone = backbone_hash(student)
    student.freeze_backbone()
    losses, moved = train(student, tmp_path, **options)
    assert losses[-1] < losses[0]
    assert backbone_hash(student) == backbone
    kinds = {name.rpartition(".mlp.")[2] for name in moved}
    weights = {"experts.gate_up_proj", "experts.down_proj"}
    assert kinds == weights | {"mean_outputs", "expert_scale"}
    assert all(p.grad is None for name, p in student.named_parameters() if ".router." in name)


def test_a_loaded_student_trains_as_a_whole_but_for_its_routers(tmp_path):
    _, moved = train(load(tmp_path), tmp_path, bf16=True)
    assert any(".mlp." not in name for name in moved)
    assert not any(".router." in name for name in moved)


def test_what_was_trained_under_bf16_is_stored_and_loaded_in_its_own_formats(tmp_path):
    student = load(tmp_path)
    student.freeze_backbone()
    train(student, tmp_path, bf16=True)
    student.save_pretrained(tmp_path / "tuned")
    tuned: Any = TinyOnnForCausalLM.from_pretrained(tmp_path / "tuned")
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, tuned.state_dict()[name]), name
        assert tensor.dtype == torch.float32, name
