"""What a step of Muon costs: experts stepped together, against torch's Muon matrix by matrix.

    python -m benchmarks muon_step [--model SmolLM2-135M] [--device cuda] [--smoke]

The experts of a bundled shape, with random weights and gradients in float32. The peers are
`torch.optim.Muon`, which computes in bfloat16, and AdamW, fused. Parity: both Muons take the same
step, but for the rounding of bfloat16. Ends in one JSON line.
"""

import argparse

import torch
from torch import nn

from benchmarks.common import check, measure, relative_gap
from benchmarks.registry import Option, Result, benchmark
from benchmarks.steps import shape_of
from tiny_onn.distill.muon import STEP_RMS, Muon
from tiny_onn.distill.units import STACKED
from tiny_onn.model.expert_weights import by_neuron

RATE = 1e-3
# The gap between both steps by their norm: bfloat16 has 8 bits.
TOLERANCE = 0.02


def learning(shape: tuple[int, ...], generator: torch.Generator, number: int) -> list[nn.Parameter]:
    """So many weights with gradients."""
    device = generator.device
    weights = [nn.Parameter(torch.zeros(shape, device=device)) for _ in range(number)]
    for weight in weights:
        weight.grad = torch.randn(shape, generator=generator, device=device)
    return weights


@benchmark(
    "A step of Muon for all experts of a model, against torch's and AdamW's.",
    model=Option("SmolLM2-135M", "a bundled shape", smoke="tiny"),
    experts=Option(32, "of each layer", smoke=16),
    repeats=Option(10, "timed steps of each optimizer", smoke=2),
)
def run(arguments: argparse.Namespace) -> Result:
    """Time one step of each optimizer, after a check that both Muons agree."""
    model = shape_of(arguments.model).get_text_config()
    hidden, layers, experts = model.hidden_size, model.num_hidden_layers, arguments.experts
    width = model.intermediate_size // experts
    generator = torch.Generator(arguments.device).manual_seed(0)
    ours, theirs, adamw, parity = [], [], [], {}
    shapes = {STACKED: (experts, 2 * width, hidden), "down_proj": (experts, hidden, width)}
    for kind, shape in shapes.items():
        weights = learning(shape, generator, layers)
        group = {"params": weights, "lr": RATE, "weight_decay": 0.0}
        ours.append(Muon(group, momentum=0.9, num_stacked=2 if kind == STACKED else 1))
        alone = []
        for weight in weights:
            assert weight.grad is not None
            parts = (by_neuron(kind, t).flatten(0, -3) for t in (weight.detach(), weight.grad))
            for matrix, gradient in zip(*parts, strict=True):
                alone.append(nn.Parameter(matrix.clone()))
                alone[-1].grad = gradient.clone()
        theirs.append(
            torch.optim.Muon(
                alone,
                lr=RATE * STEP_RMS / 0.2,
                weight_decay=0.0,
                momentum=0.9,
                adjust_lr_fn="match_rms_adamw",
            )
        )
        same = learning(shape, generator, layers)
        adamw.append(torch.optim.AdamW(same, lr=RATE, weight_decay=0.0, fused=True))
        ours[-1].step()
        theirs[-1].step()
        moved = torch.cat([by_neuron(kind, w.detach()).flatten(0, -3) for w in weights])
        gap = relative_gap(moved, torch.stack([m.detach() for m in alone]))
        parity[kind] = check(f"muon_step, {kind}", gap, TOLERANCE)
    ways = {"ours": ours, "torch's Muon": theirs, "AdamW, fused": adamw}
    steps = {name: lambda part=part: [o.step() for o in part] for name, part in ways.items()}
    timings = measure(steps, repeats=arguments.repeats, warmup=2, device=arguments.device)
    least = timings["ours"].p50_ms
    return Result(
        rows=[{"step": name, **timing.columns()} for name, timing in timings.items()],
        ratios={f"ours / {name}": least / timings[name].p50_ms for name in ways if name != "ours"},
        parity=parity,
        settings={"model": arguments.model, "experts": experts},
    )
