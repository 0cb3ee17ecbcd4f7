"""Text that a teacher samples: its tokens are drawn from the model, and its files are as long."""

import argparse
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from experiments import arms
from experiments.arms_table import Job
from experiments.blockwise import tiny_teacher
from experiments.split_text import Parts
from experiments.teacher_text import continued
from repository import run_module
from tiny_onn.errors import UserError


def test_tokens_are_sampled_as_without_a_cache(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher(tmp_path / "teacher")).eval()
    prompts_BT = torch.randint(0, model.config.vocab_size, (3, 5))
    found_BT = continued(model, prompts_BT, 6, torch.Generator().manual_seed(1))
    generator, expected_BT = torch.Generator().manual_seed(1), prompts_BT
    with torch.no_grad():
        for _ in range(6):
            p_BV = model(expected_BT).logits[:, -1].softmax(-1)
            expected_BT = torch.cat(
                [expected_BT, torch.multinomial(p_BV, 1, generator=generator)], 1
            )
    assert torch.equal(found_BT, expected_BT)


def test_the_program_runs():
    assert "256 tokens sampled" in run_module("experiments.teacher_text", "--smoke")


def test_an_arm_of_sampled_text_asks_for_it():
    job = Job("smk, half sampled", 1, 0, 1.0, 1.0)
    parts = Parts(*[Path("parts")] * 4)
    with pytest.raises(UserError, match="--sampled: got nothing"):
        arms.learned_from(job, argparse.Namespace(sampled=None), parts)
    asked = argparse.Namespace(sampled=Path("/sampled"))
    assert arms.learned_from(job, asked, parts) == Path("/sampled")
