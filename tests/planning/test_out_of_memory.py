"""Running out of memory ends a run with one line that says what to lower and by how much."""

import re

import pytest
import torch

from run_records import at_step
from tiny import CONFIG, change, make_dense, save_teacher, write_corpus
from tiny_onn.conversion.pipeline import prepare
from tiny_onn.distill.loop import run_distill
from tiny_onn.errors import UserError
from tiny_onn.planning.advice import is_out_of_memory, remedies
from tiny_onn.planning.plan import plan


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
    config, tmp_path, exhaust
):
    out = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        run_distill(config, out=out, after_step=at_step(3, exhaust))
    message = str(caught.value)
    assert message.startswith("train.device: out of memory on cpu, which has ")
    assert re.search(r"data\.row_tokens 512 -> 256 saves \d+\.\d\d MiB \(new run\)", message)
    assert re.search(r'train\.checkpointing "none" -> "layer" saves \d+\.\d\d MiB;', message)
    assert "the checkpoint step-0000002 is whole: use --resume" in message
    assert "\n" not in message
    # As it says.
    lower = change(config, train={"checkpointing": "layer"})
    allowed = ("train.checkpointing",)
    assert run_distill(lower, out=out, resume=True, allow_change=allowed).tokens == 6 * 512


def test_an_evaluation_without_memory_is_told_the_same_way(config, tmp_path):
    prepared = prepare(config)
    # The run begins with an evaluation.
    prepared.student.banks()[0].register_forward_pre_hook(lambda *_: exhaust_host())
    with pytest.raises(UserError, match=r"out of memory on cpu.*there is no checkpoint yet"):
        run_distill(config, out=tmp_path / "run", prepared=prepared)


def test_other_errors_pass(config, tmp_path):
    def fail():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot"):
        run_distill(config, out=tmp_path / "run", after_step=at_step(1, fail))
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
