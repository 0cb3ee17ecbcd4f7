"""Running out of memory ends a run with one line that says what to lower and by how much."""

import re

import pytest
import torch

from tiny import CONFIG, change, make_dense, save_teacher, write_corpus
from tiny_onn import evaluate as evaluate_module
from tiny_onn import train as train_module
from tiny_onn.errors import UserError
from tiny_onn.memory_advice import is_out_of_memory, remedies
from tiny_onn.plan import plan
from tiny_onn.step import distill_step
from tiny_onn.train import run_distill


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    return change(
        CONFIG,
        teacher={"path": str(save_teacher(folder / "teacher"))},
        data={
            "sources": (str(write_corpus(folder / "corpus")),),
            "row_tokens": 512,
            "eval_tokens": 512,
            "held_out_fraction": 0.2,
        },
        train={"tokens": 6 * 512, "eval_every_tokens": 0, "save_every_tokens": 2 * 512},
    )


def exhaust_host():
    # 32 TiB: the allocator's own error.
    torch.empty(1 << 45, dtype=torch.uint8)


def exhaust_python():
    bytearray(1 << 62)


def exhaust_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("exhaust", [exhaust_host, exhaust_python, exhaust_gpu])
def test_a_step_without_memory_keeps_the_checkpoint_and_says_what_to_lower(
    config, tmp_path, monkeypatch, exhaust
):
    count = iter(range(1, 100))

    def step(*arguments, **options):
        if next(count) == 4:
            exhaust()
        return distill_step(*arguments, **options)

    monkeypatch.setattr(train_module, "distill_step", step)
    out = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        run_distill(config, out=out)
    message = str(caught.value)
    assert message.startswith("train.device: out of memory on cpu, which has ")
    assert re.search(r"data\.row_tokens 512 -> 256 saves \d+\.\d\d MiB \(new run\)", message)
    assert re.search(r'train\.checkpointing "none" -> "layer" saves \d+\.\d\d MiB;', message)
    assert "the checkpoint step-0000002 is whole: --resume" in message
    assert "\n" not in message
    # As it says.
    monkeypatch.setattr(train_module, "distill_step", distill_step)
    lower = change(config, train={"checkpointing": "layer"})
    allowed = ("train.checkpointing",)
    assert run_distill(lower, out=out, resume=True, allow_change=allowed).tokens == 6 * 512


def test_an_evaluation_without_memory_is_told_the_same_way(config, tmp_path, monkeypatch):
    def compare(*_):
        exhaust_host()

    monkeypatch.setattr(evaluate_module, "compare", compare)
    with pytest.raises(UserError, match=r"out of memory on cpu.*there is no checkpoint yet"):
        run_distill(config, out=tmp_path / "run")


def test_other_errors_pass(config, tmp_path, monkeypatch):
    def step(*_, **options):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(train_module, "distill_step", step)
    with pytest.raises(RuntimeError, match="shapes cannot"):
        run_distill(config, out=tmp_path / "run")
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_savings_are_the_plans(config):
    config = change(config, loss={"chunk_tokens": 512}, data={"row_tokens": 4096})
    teacher = make_dense("llama", vocab_size=320).config
    peak, found = remedies(config, teacher, "cpu", 1 << 33)
    planned = plan(config, config.teacher.path, "cpu")
    assert peak == planned.peak.total
    assert found
    savings = [saved for _, _, saved in found]
    assert savings == sorted(savings, reverse=True)
    for name, value, saved in found:
        section, key = name.split(".")
        lowered = change(config, **{section: {key: value}})
        assert plan(lowered, config.teacher.path, "cpu").peak.total == peak - saved
