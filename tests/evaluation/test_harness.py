"""Tasks of lm-evaluation-harness: both models' numbers, their paired intervals, and refusals."""

import importlib.util
import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tiny import make_student, save_teacher
from tiny_onn.config.schema import TeacherConfig
from tiny_onn.errors import UserError
from tiny_onn.evaluation import harness
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.routing.budgets import set_budget
from tiny_onn.teacher.load import load_dense

pytestmark = [
    # The harness and its packages warn of each other's old names.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
with_extra = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="the extra lm-eval is not installed"
)
WORDS = "the quick brown fox jumps over a lazy dog".split()
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
TEXT = """
task: text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: bits_per_byte
"""
GROUP = """
group: both
task: [first, second]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""


def question(number):
    words = [WORDS[(number * step) % len(WORDS)] for step in (1, 2, 4)]
    return {"question": " ".join(words), "choices": WORDS[:4], "answer": number % 4}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks, a group of both, and a text."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, numbers in (("first", range(12)), ("second", range(12, 32))):
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(json.dumps(question(number)) for number in numbers))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    (folder / "text.yaml").write_text(TEXT.format(data=folder / "first.jsonl"))
    (folder / "gone.yaml").write_text(TASK.format(name="gone", data=folder / "gone.jsonl"))
    (folder / "group.yaml").write_text(GROUP)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders of a student and of its teacher."""
    folder = tmp_path_factory.mktemp("models")
    teacher = str(save_teacher(folder / "teacher"))
    config = TeacherConfig(path=teacher, dtype="float32")
    dense, tokenizer = load_dense(config, torch.device("cpu"))
    student = make_student(dense)
    for bank in student.banks():
        bank.router.threshold_table.copy_(torch.linspace(0.5, 0.0, 8))
        bank.router.threshold_table[-1] = -1.0
    student.config.teacher = teacher
    student.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    return str(folder / "student"), teacher


def run(model, names, folder, **changes):
    options = {"num_fewshot": None, "limit": None, "batch_size": 4, "chat": False, **changes}
    keywords = {name: options.pop(name) for name in ("budget", "out") if name in options}
    asked: Any = {"tasks": names, "tasks_folder": folder, **options}
    return harness.run_tasks(model, device="cpu", options=asked, **keywords)


def accuracy(network, tokenizer, numbers):
    """The share of questions whose right choice is the likeliest, one text at a time."""
    network.set_attn_implementation("sdpa")
    right = []
    for number in numbers:
        asked = question(number)
        start = tokenizer(asked["question"])["input_ids"]
        scores = []
        for choice in asked["choices"]:
            ids = tokenizer(f"{asked['question']} {choice}")["input_ids"]
            with torch.no_grad():
                logs = network(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logs[i - 1, ids[i]].item() for i in range(len(start), len(ids))))
        right.append(scores.index(max(scores)) == asked["answer"])
    return np.mean(right)


@with_extra
@pytest.mark.parametrize("budget", [None, 2.0, 8.0])
def test_both_models_get_the_accuracy_that_their_likelihoods_give(models, tasks, budget):
    student, teacher = models
    result = run(student, ["first"], tasks, budget=budget)
    (row,) = result["rows"]
    tokenizer = AutoTokenizer.from_pretrained(student)
    network = TinyOnnForCausalLM.from_pretrained(student).eval()
    if budget is not None:
        set_budget(network, budget)
    dense, _ = load_dense(TeacherConfig(path=teacher, dtype="float32"), torch.device("cpu"))
    assert row["student"] == pytest.approx(accuracy(network, tokenizer, range(12)))
    assert row["teacher"] == pytest.approx(accuracy(dense, tokenizer, range(12)))
    assert row["difference"] == row["student"] - row["teacher"]
    assert (row["task"], row["metric"], row["num_documents"]) == ("first", "acc", 12)
    low, high = row["interval"]
    assert low <= row["difference"] <= high
    if budget == 8.0:
        # With all experts on, the student is its teacher.
        assert (low, high, row["difference"]) == (0.0, 0.0, 0.0)


@with_extra
def test_a_group_pools_its_documents_and_a_perplexity_has_no_interval(models, tasks, tmp_path):
    result = run(models[0], ["both", "text"], tasks, out=tmp_path / "out", limit=10)
    rows = {row["task"]: row for row in result["rows"]}
    assert {name: row["num_documents"] for name, row in rows.items()} == {
        "first": 10,
        "second": 10,
        "both": 20,
        "text": 10,
    }
    assert rows["both"]["interval"] is not None
    assert rows["text"]["interval"] is None
    assert json.loads((tmp_path / "out" / "tasks.json").read_text()) == result
    lines = (tmp_path / "out" / "tasks_samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 2 * 30
    ours = [s["acc"] for s in samples if (s["model"], s["task"]) == ("student", "second")]
    assert np.mean(ours) == rows["second"]["student"]


@with_extra
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", r"^--tasks: got nothing, expected the name of a task of lm-evaluation-harness"),
        ("gone", r"^--tasks: got gone, whose data or definition cannot be loaded \(FileNotFound"),
    ],
)
def test_a_task_that_cannot_be_had_is_refused_in_one_line(models, tasks, name, said):
    with pytest.raises(UserError, match=said):
        run(models[0], [name], tasks)


@with_extra
def test_a_folder_without_tasks_and_a_chat_without_a_template_are_refused(models, tasks):
    with pytest.raises(UserError, match=r"^--tasks-folder: got .*no, expected a folder"):
        run(models[0], ["first"], tasks / "no")
    with pytest.raises(UserError, match=r"^--chat: got .* no chat template"):
        run(models[0], ["first"], tasks, chat=True)


def test_a_missing_extra_is_said_with_its_remedy(models, tasks, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install lm-eval scipy"):
        run(models[0], ["first"], tasks)


def interval(ours, theirs) -> list[float]:
    ends = harness.paired_interval(ours, theirs)
    assert ends is not None
    return ends


@with_extra
def test_the_interval_is_that_of_the_mean_difference_over_pairs():
    generator = np.random.default_rng(1)
    theirs = generator.random(400)
    ours = theirs + generator.normal(0.1, 0.02, 400)
    low, high = interval(ours, theirs)
    differences = ours - theirs
    half = 1.96 * differences.std() / 20
    assert low == pytest.approx(differences.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(differences.mean() + half, abs=0.1 * half)
    assert interval(theirs, ours) == pytest.approx([-high, -low], abs=0.1 * half)
    # Documents that are not paired say far less.
    loose = interval(ours, np.sort(theirs))
    assert loose[1] - loose[0] > 5 * (high - low)
    assert interval(ours, theirs) == [low, high]


def test_there_is_no_interval_without_pairs():
    values = np.ones(3)
    assert harness.paired_interval(None, values) is None
    assert harness.paired_interval(values, None) is None
    assert harness.paired_interval(values[:1], values[:1]) is None
