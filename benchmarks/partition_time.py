"""How long the learned partition takes, and what it holds, beside the algorithm that it replaced.

The peer assigns neurons by an auction that starts from zero prices in every round and ends within
1 % of the scores' spread per neuron, regresses in float64, sorts for its threshold and ends after
12 rounds. Both start from the same energies and experts. Quality is the share of the energy that
active experts hold, `learn_partition`'s own measure in float64, and the total score of both
assignments of one table.

    python -m benchmarks partition_time [--layers 30] [--threads 2] [--calibration-tokens 6144]
        [--shape Qwen3-0.6B] [--smoke]

The embedded teacher, SmolLM2-135M, or a shape with random weights. One run: the layers are the
repeats, and both algorithms take each in turn. Ends in one JSON line.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from benchmarks.registry import Option, Result, benchmark
from benchmarks.steps import random_dense, random_rows
from tiny_onn.config.read import load_config
from tiny_onn.config.schema import RunConfig
from tiny_onn.conversion.assignment import balanced_assignment
from tiny_onn.conversion.gates import RIDGE
from tiny_onn.conversion.partition import (
    SAMPLED_TOKENS,
    by_importance,
    learn_partition,
    neuron_energy,
    sample_inputs,
)
from tiny_onn.data.rows import calibration_rows
from tiny_onn.model.backbone import activation_name, gated_mlps
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.teacher.load import load_dense, quiet_transformers

ROUNDS = 12
INCREMENTS = (0.3, 0.1, 0.03, 0.01)


def auction(scores_FE: Tensor) -> Tensor:
    """Bertsekas' auction with falling increments, from zero prices, float64."""
    scores_FE = scores_FE.double()
    num_neurons, num_experts = scores_FE.shape
    places = num_neurons // num_experts
    spread = (scores_FE.amax(1) - scores_FE.amin(1)).mean()
    prices_E = torch.zeros(num_experts, dtype=torch.float64)
    bids_FE = torch.empty(0)
    for increment in INCREMENTS:
        bids_FE = torch.full_like(scores_FE, float("-inf"))
        while len(free_U := (bids_FE.amax(1) == float("-inf")).nonzero()[:, 0]):
            best_U2, expert_U2 = (scores_FE[free_U] - prices_E).topk(2, dim=1)
            wanted_U = expert_U2[:, 0]
            raised_U = best_U2[:, 0] - best_U2[:, 1] + spread * increment
            bids_FE[free_U, wanted_U] = prices_E[wanted_U] + raised_U
            kept_PE, holder_PE = bids_FE.topk(places, dim=0)
            bids_FE = torch.full_like(bids_FE, float("-inf")).scatter_(0, holder_PE, kept_PE)
            prices_E = torch.where(kept_PE[-1].isfinite(), kept_PE[-1], prices_E)
    return bids_FE.argmax(1)


class Layer:
    """What a layer's partition is learned from, and the previous algorithm in float64."""

    def __init__(self, energy_TF: Tensor, x_TD: Tensor, num_experts: int, target_k: float) -> None:
        self.given = (energy_TF, x_TD)
        self.sizes = (num_experts, target_k)
        self.first_F = by_importance(energy_TF, num_experts)

    def prepare(self) -> None:
        """Shares of the energy, and each half of the tokens with the other's factored moments."""
        energy_TF, x_TD = self.given
        self.share_TF = energy_TF / energy_TF.sum(1, keepdim=True).clamp_min(1e-30)
        features_TD = F.pad(x_TD.double(), (0, 1), value=1.0)
        even, odd = features_TD[::2].contiguous(), features_TD[1::2].contiguous()
        self.halves = []
        for own_TD, other_TD, start in ((even, odd, 0), (odd, even, 1)):
            gram_DD = other_TD.T @ other_TD
            penalty_D = RIDGE * gram_DD.diagonal()[:-1].mean() * torch.ones(len(gram_DD))
            penalty_D[-1] = 0
            factors = torch.linalg.lu_factor(gram_DD + penalty_D.diag())
            self.halves.append((own_TD, other_TD, start, factors))

    def activate(self, expert_F: Tensor) -> tuple[Tensor, float]:
        """The experts that a cross-fitted gate activates, and the share of energy they hold."""
        num_experts, target_k = self.sizes
        energy_TE = self.share_TF @ F.one_hot(expert_F, num_experts).to(self.share_TF)
        target_TE = energy_TE.clamp_min(1e-12).log().double()
        logits_TE = torch.empty_like(target_TE)
        for own_TD, other_TD, start, factors in self.halves:
            moment_DE = other_TD.T @ target_TE[1 - start :: 2]
            logits_TE[start::2] = own_TD @ torch.linalg.lu_solve(*factors, moment_DE)
        probs_TE = logits_TE.float().softmax(-1)
        num_active = round(len(probs_TE) * target_k)
        ordered = probs_TE.flatten().sort(descending=True).values
        active_TE = (probs_TE > ordered[num_active - 1 : num_active + 1].mean()).float()
        return active_TE, (energy_TE * active_TE).sum().item() / len(energy_TE)

    def previous(self) -> Tensor:
        """The partition that the previous algorithm learns."""
        self.prepare()
        best, best_F, expert_F = -1.0, self.first_F, self.first_F
        for _ in range(ROUNDS):
            active_TE, captured = self.activate(expert_F)
            if captured <= best + 1e-4:
                break
            best, best_F = captured, expert_F
            expert_F = auction(self.share_TF.T @ active_TE)
        return best_F

    def ours(self) -> Tensor:
        """The partition that the package learns."""
        return learn_partition(*self.given, self.first_F, *self.sizes)

    def compare(self) -> dict[str, float]:
        """Times and quality of both."""
        row: dict[str, float] = {}
        for name, function in (("previous", self.previous), ("ours", self.ours)):
            (expert_F,), row[f"{name}_s"], row[f"{name}_cpu_s"] = timed(lambda f=function: (f(),))
            row[f"{name}_captured"] = self.activate(expert_F)[1]
        scores_FE = self.share_TF.T @ self.activate(self.first_F)[0]
        neurons_F = torch.arange(len(scores_FE))
        for name, assign in (("previous", auction), ("ours", balanced_assignment)):
            total = scores_FE.double()[neurons_F, assign(scores_FE)].sum().item()
            row[f"{name}_total"] = total / len(self.share_TF)
        return row


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a function gives, its wall seconds and its CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def inputs_of(arguments: argparse.Namespace) -> tuple[RunConfig, PreTrainedModel, list[Tensor]]:
    """The settings, the teacher and its MLPs' inputs, float32."""
    sets = [f"experts.calibration_tokens={arguments.calibration_tokens}", "teacher.dtype=float32"]
    device = torch.device("cpu")
    if arguments.shape is None:
        config = load_config(None, "demo", sets)
        dense, tokenizer = load_dense(config.teacher, device)
        rows = calibration_rows(config, tokenizer, device)
    else:
        config = load_config(None, "demo", sets)
        dense = random_dense(arguments.shape, config, device)
        vocabulary = dense.config.get_text_config().vocab_size
        rows = random_rows(vocabulary, arguments.calibration_tokens, documents=(9, 900))
    return config, dense, sample_inputs(MlpInputs(dense, rows), SAMPLED_TOKENS)


@benchmark(
    "Time of the learned partition beside the algorithm that it replaced, and the quality of both.",
    layers=Option(1000, "the first so many"),
    shape=Option(None, "random weights of this shape; default: the teacher's", smoke="tiny"),
    calibration_tokens=Option(6144, smoke=512),
    threads=Option(2),
)
@torch.no_grad()
def run(arguments: argparse.Namespace) -> Result:
    """Learn every layer's partition in both ways."""
    torch.set_num_threads(arguments.threads)
    quiet_transformers()
    (config, dense, inputs), _, sampling_cpu_s = timed(lambda: inputs_of(arguments))
    activation = ACT2FN[activation_name(dense.config.get_text_config())]
    sizes = (config.experts.num_experts, config.router.target_k)
    rows, energy_s, energy_cpu_s = [], 0.0, 0.0
    for number, (mlp, x_TD) in enumerate(zip(gated_mlps(dense), inputs, strict=True)):
        if number == arguments.layers:
            break
        energy_TF, seconds, cpu_seconds = timed(partial(neuron_energy, mlp, x_TD, activation))
        energy_s, energy_cpu_s = energy_s + seconds, energy_cpu_s + cpu_seconds
        rows.append({"layer": number} | Layer(energy_TF, x_TD, *sizes).compare())
        print(rows[-1], flush=True)
    sums = {key: sum(row[key] for row in rows) for key in rows[0]}
    return Result(
        rows=rows,
        ratios={
            "seconds, ours / previous": sums["ours_s"] / sums["previous_s"],
            "CPU seconds, ours / previous": sums["ours_cpu_s"] / sums["previous_cpu_s"],
            "captured share, ours / previous": sums["ours_captured"] / sums["previous_captured"],
            "assignment total, ours / auction": sums["ours_total"] / sums["previous_total"],
        },
        settings={
            "shape": arguments.shape,
            "calibration_tokens": arguments.calibration_tokens,
            "threads": arguments.threads,
        },
        more={
            "means": {key: total / len(rows) for key, total in sums.items() if key != "layer"},
            "seconds": {
                "ours": sums["ours_s"],
                "previous": sums["previous_s"],
                "energies": energy_s,
                "energies, CPU": energy_cpu_s,
                "teacher and its pass, CPU": sampling_cpu_s,
            },
        },
    )
