"""A student in transformers' own Trainer: what moves, in full precision and under bf16."""

from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tiny import make_dense, make_ids, make_student
from tiny_onn.conversion.verify import backbone_hash
from tiny_onn.errors import UserError
from tiny_onn.model.experts import recorded_routings
from tiny_onn.model.fine_tuning import kind_of
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.routing.budgets import set_budget

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


def trainer_of(student, folder, rows=None, **options):
    data: Any = rows or [{"input_ids": row, "labels": row} for row in make_ids(16)]
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            **options,
        }
    )
    return Trainer(model=student, args=arguments, train_dataset=data, eval_dataset=data)


def train(student, folder, rows=None, **options):
    """Train for some steps; return the losses and the names of tensors that moved."""
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trainer = trainer_of(student, folder, rows, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.evaluate()["eval_loss"] < losses[0]
    after = student.state_dict()
    return losses, {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_a_frozen_backbone_stays_and_the_experts_move(tmp_path, options):
    student = load(tmp_path)
    backbone = backbone_hash(student)
    student.fine_tune()
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
    student.fine_tune()
    train(student, tmp_path, bf16=True)
    student.save_pretrained(tmp_path / "tuned")
    tuned: Any = TinyOnnForCausalLM.from_pretrained(tmp_path / "tuned")
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, tuned.state_dict()[name]), name
        assert tensor.dtype == torch.float32, name


def kinds_of(names):
    return {kind_of(name) for name in names}


def test_gates_of_a_loaded_student_are_frozen_because_no_loss_reaches_them(tmp_path):
    student = load(tmp_path)
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert kinds_of(frozen) == {"gates"}
    assert "frozen: gates (" in student.describe_learning()
    student(input_ids=make_ids(), labels=make_ids()).loss.backward()
    # Data-parallel training refuses a parameter that requires a gradient and gets none.
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize(
    ("selection", "weighting"), [("budget", "unit"), ("top_k", "softmax"), ("top_any", "unit")]
)
def test_gates_learn_from_the_loss_when_they_are_asked_to(tmp_path, selection, weighting, options):
    student = load(tmp_path, selection=selection, weighting=weighting)
    said = student.fine_tune(experts=False, gates=True)
    # Gates change little in a step, so every step sees the same rows.
    rows = [{"input_ids": row, "labels": row} for row in make_ids(4)]
    losses, moved = train(student, tmp_path, rows, max_steps=16, **options)
    assert losses[-1] < losses[0]
    assert kinds_of(moved) == {"gates"}
    assert "parameters that train: gates (" in said
    assert "nothing holds the mean number of experts" in said


def test_what_learns_and_what_is_frozen_is_said_once(tmp_path, capsys):
    student = load(tmp_path)
    student.fine_tune(backbone=True)
    train(student, tmp_path)
    said = capsys.readouterr().err
    assert said.count("parameters that train: experts (") == 1
    assert "backbone (" in said
    assert "frozen: gates (" in said
    student.requires_grad_(True)
    assert "no gradient reaches the gates; fine_tune(gates=True)" in student.describe_learning()


@pytest.mark.parametrize("selection", ["static", "random", "oracle"])
def test_gates_that_are_not_read_cannot_be_asked_to_learn(selection):
    student = make_student(make_dense(), selection=selection)
    with pytest.raises(UserError, match=f"^gates: got True with router.selection = '{selection}'"):
        student.fine_tune(gates=True)


def test_fine_tuning_routes_by_the_budget_that_was_set(tmp_path):
    student = load(tmp_path)
    for bank in student.banks():
        bank.router.threshold_table.copy_(torch.linspace(0.5, 0.0, 8))
        bank.router.threshold_table[-1] = -1.0
    set_budget(student, 8.0)
    student.fine_tune()
    with recorded_routings(student.banks()) as routings:
        student.train(True)
        student(input_ids=make_ids())
    assert all(routing.active.all() for routing in routings)


@pytest.mark.parametrize("gates", [False, True])
def test_training_resumes_from_a_checkpoint_of_the_trainer_to_the_same_weights(tmp_path, gates):
    straight = load(tmp_path)
    straight.fine_tune(gates=gates, backbone=True)
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(straight, tmp_path, **options).train()
    resumed: Any = TinyOnnForCausalLM.from_pretrained(tmp_path / "student")
    resumed.fine_tune(gates=gates, backbone=True)
    trainer = trainer_of(resumed, tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry][-1] == 4
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    stored: Any = TinyOnnForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-4")
    ids = make_ids()
    with torch.no_grad():
        expected, got = (each.train(False)(input_ids=ids).logits for each in (straight, stored))
    assert torch.equal(got, expected)


def test_accumulated_steps_equal_one_of_all_rows_where_their_lengths_differ(tmp_path):
    rows = [
        {"input_ids": row, "labels": torch.where(torch.arange(16) < 3 * (i % 4), -100, row)}
        for i, row in enumerate(make_ids(16))
    ]
    trained = []
    for size, steps in ((4, 1), (1, 4)):
        student = load(tmp_path)
        student.fine_tune()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer_of(student, tmp_path, rows, max_steps=1, **options).train()
        trained.append(student.state_dict())
    for name, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][name], rtol=1e-4, atol=1e-5)
