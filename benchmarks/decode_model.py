"""Tokens a second of Qwen3-0.6B with random weights, and of its student at some k.

Used by `decode.py`. Greedy decoding with transformers' static cache, of one sequence and of several
at once, which begin with different tokens; one step, the choice of the token included, is a CUDA
graph.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from benchmarks.common import captured, check, measure
from benchmarks.steps import random_dense, settings
from tiny_onn.conversion.convert import convert

# The active experts that are timed, by the number of sequences.
KS = {1: (4, 8, 16, 32), 8: (16,), 16: (16,)}
SMALL_KS = {1: (2, 32), 3: (2,)}


class Decoder:
    """Greedy decoding of some sequences: a step that a graph can hold."""

    def __init__(self, model: Any, device: str, length: int, batch: int = 1) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length)
        self.first = torch.arange(1, batch + 1, device=device)[:, None]
        self.token = self.first.clone()
        self.position = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.places = torch.arange(length, device=device)
        self.written = torch.zeros(batch, length, dtype=torch.long, device=device)

    def step(self) -> Tensor:
        """Read each sequence's last token, write its likeliest next one; return the logits."""
        mask = (self.places <= self.position)[None, None]
        output = self.model(
            input_ids=self.token,
            position_ids=self.position,
            attention_mask={"full_attention": mask},
            past_key_values=self.cache,
            use_cache=True,
        )
        self.token.copy_(output.logits[:, -1:].argmax(-1))
        self.written.index_copy_(1, self.position[0], self.token)
        self.position.add_(1)
        return output.logits

    def reset(self) -> None:
        """Back to the first position."""
        layers: Any = self.cache.layers
        for layer in layers:
            if layer.is_initialized:
                layer.cumulative_length.zero_()
        self.token.copy_(self.first)
        self.position.zero_()


def whole_model(device: str, *, smoke: bool) -> Iterator[dict]:
    """Tokens a second of the student at some k, and of the dense model, by number of sequences."""
    length = 16 if smoke else 256
    config = settings("router.selection=top_k")
    dense = random_dense("tiny" if smoke else "Qwen3-0.6B", config, device)
    dense.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(0)
    student = convert(dense, config.experts, config.router, generator=generator).train(False)
    student.requires_grad_(False)
    student.round_experts()
    for batch, ks in (SMALL_KS if smoke else KS).items():
        rates: dict[str, float] = {}
        models: dict[str, Any] = {"dense": dense, **{f"k = {k}": student for k in ks}}
        for name, model in models.items():
            for bank in student.banks() if model is student else ():
                bank.router.set_budget(float(name.removeprefix("k = ")))
            with torch.no_grad():
                rates[name] = rate(name, Decoder(model, device, length, batch), device, smoke)
        yield {
            "kind": "model",
            "batch": batch,
            "context_tokens": length,
            "tokens_per_s": rates,
            "ratio": {name: rate / rates["dense"] for name, rate in rates.items()},
        }


def rate(name: str, decoder: Decoder, device: str, smoke: bool) -> float:
    """Tokens a second of all sequences together, captured.

    Raises:
        SystemExit: the captured step writes other tokens: nothing is timed.
    """
    new, repeats = (4, 1) if smoke else (64, 5)

    def write(step: Callable[[], object]) -> Tensor:
        decoder.reset()
        for _ in range(new):
            step()
        return decoder.written[:, :new].clone()

    expected = write(decoder.step)
    step = captured(decoder.step, device)
    same = float(not torch.equal(write(step), expected))
    check(f"decode, model, {name}, {len(expected)} at once: captured", same, 0.0)
    times = measure({name: lambda: write(step)}, repeats=repeats, warmup=1, device=device)
    return expected.numel() / (times[name].p50_ms / 1e3)
