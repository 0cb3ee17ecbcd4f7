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


@pytest.mark.parametrize(
    ("arm", "option", "own"),
    [("smk, half sampled", "sampled", []), ("smk, more text", "more_text", [Path("learn")])],
)
def test_an_arm_of_another_text_asks_for_it(arm, option, own):
    job = Job(arm, 1, 0, 1.0, 1.0)
    parts = Parts(Path("parts"), Path("learn"), Path("report"), None)
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')}: got nothing"):
        arms.learned_from(job, argparse.Namespace(sampled=None, more_text=None), parts)
    asked = argparse.Namespace(**{option: Path("/other")})
    assert arms.learned_from(job, asked, parts) == [*own, Path("/other")]
