"""How long a dense model takes to become a student, phase by phase, and what its experts hold.

    python -m benchmarks conversion [--shape Qwen3-0.6B] [--threads 16]
        [--calibration-tokens 8192] [--no-gates] [--base COMMIT] [--smoke]

The embedded teacher, SmolLM2-135M, on its text, or a bundled shape with random weights on random
tokens; the preset `demo`, float32, on a CPU. Phases: the model's pass over the calibration text,
the learned partition, and gates, budgets and mean outputs. The partition's parts are seconds of
CPU, summed over layers and threads; where layers run side by side, each on one thread, their sum
is the threads' times the partition's seconds.

What the partition reaches is its own objective by its definition in float64: the share of the
energy of the experts that a linear gate picks, the gate of the one half of the tokens for the
other half; the mean over layers. `--base` measures another commit's package in the same way, with
what its partition reaches. Parity: every neuron is in one expert. Ends in one JSON line.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from benchmarks.common import check
from benchmarks.registry import Goal, Option, Result, benchmark
from benchmarks.steps import random_dense, random_rows
from tiny_onn.config.read import load_config
from tiny_onn.config.schema import RunConfig
from tiny_onn.conversion import partition
from tiny_onn.conversion.pipeline import make_student
from tiny_onn.data.packing import PackedRow
from tiny_onn.data.rows import calibration_rows
from tiny_onn.model.backbone import activation_name, gated_mlps
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.teacher.load import load_dense, quiet_transformers

# The penalty of the gate's regression, as a share of the inputs' mean square.
RIDGE = 1e-3
# Functions of `partition` whose time is told apart; the rest is mostly products over tokens.
PARTS = ("sample_inputs", "neuron_energy", "Ridge", "exact_threshold", "balanced_assignment")
# Seconds that the learned partition may take, by shape and number of threads.
GOALS = {(None, 2): 30.0, ("Qwen3-0.6B", 16): 300.0}


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Within the context the parts of the partition add up the CPU seconds of their threads."""
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.thread_time() - start

        return call

    found = {name: getattr(partition, name) for name in PARTS}
    for name, function in found.items():
        setattr(partition, name, timed(name, function))
    try:
        yield seconds
    finally:
        for name, function in found.items():
            setattr(partition, name, function)


def held_share(
    energy_TF: Tensor, x_TD: Tensor, expert_F: Tensor, num_experts: int, target_k: float
) -> float:
    """The share of the energy that the experts picked by a cross-fitted gate hold, in float64."""
    share_TF = energy_TF.double()
    share_TF /= share_TF.sum(1, keepdim=True).clamp_min(1e-30)
    energy_TE = share_TF @ F.one_hot(expert_F, num_experts).double()
    target_TE = energy_TE.clamp_min(1e-12).log()
    features_TD = F.pad(x_TD.double(), (0, 1), value=1.0)
    logits_TE = torch.empty_like(target_TE)
    for own, other in ((0, 1), (1, 0)):
        other_TD = features_TD[other::2]
        gram_DD = other_TD.T @ other_TD
        penalty_D = RIDGE * gram_DD.diagonal()[:-1].mean() * torch.ones(len(gram_DD)).double()
        penalty_D[-1] = 0
        moment_DE = other_TD.T @ target_TE[other::2]
        solution_DE = torch.linalg.solve(gram_DD + penalty_D.diag(), moment_DE)
        logits_TE[own::2] = features_TD[own::2] @ solution_DE
    probs_TE = logits_TE.softmax(-1)
    num_active = round(len(probs_TE) * target_k)
    lowest = probs_TE.flatten().topk(num_active).values[-1]
    return (energy_TE * (probs_TE >= lowest)).sum().item() / len(energy_TE)


def quality(
    config: RunConfig, dense: PreTrainedModel, inputs: MlpInputs, orders: Sequence[Tensor]
) -> list[float]:
    """Per layer, the held share of the partition that an order of neurons stands for."""
    activation = ACT2FN[activation_name(dense.config.get_text_config())]
    samples = partition.sample_inputs(inputs, partition.SAMPLED_TOKENS)
    E, shares = config.experts.num_experts, []
    for mlp, x_TD, order_F in zip(gated_mlps(dense), samples, orders, strict=True):
        check("conversion, neurons used once", float(order_F.unique().numel() != len(order_F)), 0.0)
        expert_F = torch.empty_like(order_F)
        expert_F[order_F] = torch.arange(len(order_F)) // (len(order_F) // E)
        energy_TF = partition.neuron_energy(mlp, x_TD, activation)
        shares.append(held_share(energy_TF, x_TD, expert_F, E, config.router.target_k))
    return shares


def model_and_text(
    arguments: argparse.Namespace,
) -> tuple[RunConfig, PreTrainedModel, list[PackedRow]]:
    """The settings, the dense model and the calibration rows."""
    tokens, device = arguments.calibration_tokens, torch.device("cpu")
    sets = [f"experts.calibration_tokens={tokens}", "teacher.dtype=float32", "data.row_tokens=1024"]
    config = load_config(None, "demo", [*sets, "train.device=cpu", "train.compile=false"])
    if arguments.shape is None:
        dense, tokenizer = load_dense(config.teacher, device)
        return config, dense, calibration_rows(config, tokenizer, device)
    dense = random_dense(arguments.shape, config, device)
    vocabulary = dense.config.get_text_config().vocab_size
    length = config.data.row_tokens
    count = -(-tokens // length)
    return config, dense, random_rows(vocabulary, length, documents=(9, 900), num_rows=count)


@benchmark(
    "Seconds of a conversion by phase, and the energy that its learned experts hold.",
    shape=Option(None, "random weights of this shape; default: the embedded teacher", smoke="tiny"),
    calibration_tokens=Option(6144, "the default is the demo's", smoke=512),
    threads=Option(2),
    gates=Option(True, "also time gates, budgets and means"),
)
@torch.no_grad()
def run(arguments: argparse.Namespace) -> Result:
    """Convert once, and weigh what the partition reached."""
    torch.set_num_threads(arguments.threads)
    quiet_transformers()
    rows: list[dict[str, Any]] = []

    def phase(name: str, function: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = function()
        times = {"seconds": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        rows.append({"phase": name, **times})
        print(rows[-1], flush=True)
        return result

    config, dense, text = phase("model and text", lambda: model_and_text(arguments))
    inputs = MlpInputs(dense, text)
    phase("pass over the text", lambda: inputs.visit(lambda *_: None, "reading, rows"))
    generator = torch.Generator().manual_seed(config.train.seed)
    with timed_parts() as parts:
        settings = (inputs, config.experts, config.router.target_k, generator)
        orders = phase("learned partition", lambda: partition.partition_neurons(*settings))
    if arguments.gates:
        phase("gates, budgets and means", lambda: make_student(config, inputs, orders))
    shares = quality(config, dense, inputs, orders)
    rows.append({"phase": "held share of the energy", "share": sum(shares) / len(shares)})
    learned = rows[2]["seconds"]
    goal = GOALS.get((arguments.shape, arguments.threads))
    name = f"seconds of the learned partition / {goal:g}" if goal else ""
    return Result(
        rows=rows,
        ratios={name: learned / goal} if goal else {"learned partition / pass": learned
                                                    / rows[1]["seconds"]},
        goals={name: Goal(at_most=1.0)} if goal else {},
        settings={
            "shape": arguments.shape,
            "calibration_tokens": arguments.calibration_tokens,
            "threads": arguments.threads,
        },
        more={
            "parts_cpu_s": {**parts, "rest": rows[2]["cpu_s"] - sum(parts.values())},
            "held_shares": shares,
        },
    )  # fmt: skip
