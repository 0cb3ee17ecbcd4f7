"""Tokens a second at batch 1: Qwen3-0.6B with random weights, and its student at some k.

Used by `decode.py`. Greedy decoding with transformers' static cache; one step, the choice of the
token included, is a CUDA graph.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from benchmarks.common import captured, check, measure
from benchmarks.steps import random_dense, settings
from tiny_onn.conversion.convert import convert


class Decoder:
    """Greedy decoding of one sequence: a step that a graph can hold."""

    def __init__(self, model: Any, device: str, length: int) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length)
        self.token = torch.ones(1, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.places = torch.arange(length, device=device)
        self.written = torch.zeros(length, dtype=torch.long, device=device)

    def step(self) -> None:
        """Read the last token, write the likeliest next one."""
        mask = (self.places <= self.position)[None, None]
        output = self.model(
            input_ids=self.token,
            position_ids=self.position,
            attention_mask={"full_attention": mask},
            past_key_values=self.cache,
            use_cache=True,
        )
        self.token.copy_(output.logits[:, -1:].argmax(-1))
        self.written.index_copy_(0, self.position[0], self.token[0])
        self.position.add_(1)

    def reset(self) -> None:
        """Back to the first position."""
        layers: Any = self.cache.layers
        for layer in layers:
            if layer.is_initialized:
                layer.cumulative_length.zero_()
        self.token.fill_(1)
        self.position.zero_()


def whole_model(device: str, *, smoke: bool) -> Iterator[dict]:
    """Tokens a second of the student at some k, and of the dense model."""
    length, new, repeats = (16, 4, 1) if smoke else (256, 64, 5)
    config = settings("router.selection=top_k")
    dense = random_dense("tiny" if smoke else "Qwen3-0.6B", config, device)
    dense.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(0)
    student = convert(dense, config.experts, config.router, generator=generator).train(False)
    student.requires_grad_(False)
    student.round_experts()
    rates: dict[str, float] = {}
    ks = (2, 32) if smoke else (4, 8, 16, 32)
    models: dict[str, Any] = {"dense": dense, **{f"k = {k}": student for k in ks}}
    with torch.no_grad():
        for name, model in models.items():
            for bank in student.banks() if model is student else ():
                bank.router.set_budget(float(name.removeprefix("k = ")))
            decoder = Decoder(model, device, length)

            def write(step: Callable[[], object], decoder: Decoder = decoder) -> Tensor:
                decoder.reset()
                for _ in range(new):
                    step()
                return decoder.written[:new].clone()

            expected = write(decoder.step)
            step = captured(decoder.step, device)
            same = float(not torch.equal(write(step), expected))
            check(f"decode, model, {name}: captured", same, 0.0)
            functions = {name: lambda step=step, write=write: write(step)}
            times = measure(functions, repeats=repeats, warmup=1, device=device)
            rates[name] = new / (times[name].p50_ms / 1e3)
    yield {
        "kind": "model",
        "context_tokens": length,
        "tokens_per_s": rates,
        "ratio": {name: rate / rates["dense"] for name, rate in rates.items()},
    }
