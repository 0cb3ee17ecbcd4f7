"""Students to export, and programs that run where this package cannot be imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

from tiny import make_dense, make_student, make_tokenizer
from tiny_onn.model.student import TinyOnnForCausalLM

HAS_LLAMA_CPP = importlib.util.find_spec("llama_cpp") is not None
WITHOUT_PACKAGE = """
import importlib.abc
import sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tiny_onn", "jaxtyping", "beartype"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""


def save_student(folder: Path, family="llama", *, seed=0, dense=None, **changes) -> Path:
    """A student whose router, corrections and thresholds all have something to say, in a folder."""
    dense = make_dense(family, vocab_size=320, **(dense or {}))
    student = make_student(dense, seed=seed, **changes).train(False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for bank in student.banks():
            router = bank.router
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
            router.bias.copy_(torch.randn(router.bias.shape, generator=generator))
            router.selection_bias.copy_(torch.randn(router.bias.shape, generator=generator) * 0.3)
            cumulative = router.rule.budget_form == "cumulative"
            router.settled.fill_(0.35 if cumulative else 0.08)
            if bank.mean_outputs is not None:
                means = torch.randn(bank.mean_outputs.shape, generator=generator)
                bank.mean_outputs.copy_(means * 0.3)
            if bank.expert_scale is not None:
                bank.expert_scale.copy_(
                    torch.rand(bank.expert_scale.shape, generator=generator) + 0.5
                )
    student.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What the student in a folder computes, in this package."""
    student = TinyOnnForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return student.eval()(ids).logits


def run_without_package(
    program: str, *arguments: object, cache: Path, folder: Path | None = None
) -> str:
    """Run a program, in a folder, where this package cannot be imported, and return its output."""
    command = [sys.executable, "-c", WITHOUT_PACKAGE + program, *map(str, arguments)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
