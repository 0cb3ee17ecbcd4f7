"""Partition and gates in the metric of the loss: the arms of `arms.py` that end so.

Conversion groups neurons by their energy `h^2 |down|^2`, and fits gates to the norms of experts'
outputs, as if all directions of an MLP's output mattered alike. To second order, an output v that
is missing at a token costs `v^T F v / 2` of KL divergence. F is the Fisher information of the
output: the mean of `g g^T`, where g is the gradient of the cross-entropy at the output and labels
are drawn from the teacher's own predictions. Here norms are those of `F^(1/2) v`. It is the metric
of Optimal Brain Surgeon (Hassibi and Stork, 1993) at a layer's output.

Legend: T tokens, D hidden, L layers.
"""

import copy
from collections.abc import Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny_onn.config.routing_checks import has_budget
from tiny_onn.config.schema import RunConfig
from tiny_onn.conversion import pipeline
from tiny_onn.conversion.mean_outputs import fit_compensation
from tiny_onn.data.packing import PackedRow
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import gated_mlps
from tiny_onn.model.hooks import MlpInputs, Visitor
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.routing.budgets import fit_start_thresholds

# Calibration tokens from which F is estimated.
FISHER_TOKENS = 16_384
# The share of the mean of F's diagonal that is added to the diagonal.
DAMPING = 0.02


class WeighedInputs(MlpInputs):
    """A model whose down projections are weighed, with the MLP inputs of the model as it is."""

    def __init__(self, inputs: MlpInputs, roots: Sequence[Float[Tensor, "hidden hidden"]]) -> None:
        super().__init__(copy.deepcopy(inputs.dense), inputs.rows)
        self._unweighed = inputs
        with torch.no_grad():
            for mlp, root_DD in zip(gated_mlps(self.dense), roots, strict=True):
                weight = mlp.down_proj.weight
                weight.copy_(root_DD.to(weight.device) @ weight.double())

    def visit(self, visitor: Visitor, text: str) -> None:
        """Call `visitor(layer, x_TD, row)` with the inputs of the unweighed model."""
        self._unweighed.visit(visitor, text)


def output_fisher(
    dense: PreTrainedModel, rows: Sequence[PackedRow], generator: torch.Generator
) -> list[Float[Tensor, "hidden hidden"]]:
    """Each layer's Fisher information of the MLP's output, a token's mean, float64 on the CPU.

    Args:
        dense: The teacher.
        rows: The text, on the teacher's device.
        generator: CPU generator of the labels.
    """
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    sizes = [mlp.down_proj.out_features for mlp in gated_mlps(dense)]
    sums = [torch.zeros(size, size, dtype=torch.float64) for size in sizes]
    tokens = 0
    for row in rows:
        outputs.clear()
        embedded = dense.get_input_embeddings()(row.input_ids).detach().requires_grad_()
        with ExitStack() as hooks, torch.enable_grad():
            for mlp in gated_mlps(dense):
                hooks.enter_context(mlp.module.register_forward_hook(keep))
            logits_TV = dense(inputs_embeds=embedded, **packed_kwargs(row)).logits[0].float()
            probs_TV = logits_TV.detach().softmax(-1).cpu()
            labels_T = torch.multinomial(probs_TV, 1, generator=generator)[:, 0]
            loss_T = F.cross_entropy(logits_TV, labels_T.to(logits_TV.device), reduction="none")
            (loss_T * row.loss_mask[0]).sum().backward()
        mask_T = row.router_mask[0]
        tokens += int(mask_T.sum())
        for total, output in zip(sums, outputs, strict=True):
            assert output.grad is not None
            grad_TD = output.grad[0][mask_T].double()
            total.add_((grad_TD.T @ grad_TD).cpu())
    return [total / max(1, tokens) for total in sums]


def root_of(fisher_DD: Float[Tensor, "hidden hidden"]) -> Float[Tensor, "hidden hidden"]:
    """The symmetric square root, damped, where the mean of the diagonal is scaled to 1."""
    scaled_DD = fisher_DD / fisher_DD.diagonal().mean().clamp_min(1e-300)
    scaled_DD = scaled_DD + DAMPING * torch.eye(len(scaled_DD), dtype=scaled_DD.dtype)
    values_D, vectors_DD = torch.linalg.eigh(scaled_DD)
    return (vectors_DD * values_D.clamp_min(0).sqrt()) @ vectors_DD.T


def make_student(
    config: RunConfig, inputs: MlpInputs, order: Sequence[Tensor] | None
) -> TinyOnnForCausalLM:
    """What `conversion.pipeline.make_student` returns, with partition and gates in the metric."""
    number = max(1, FISHER_TOKENS // config.data.row_tokens)
    generator = torch.Generator().manual_seed(config.train.seed)
    roots = [root_of(part) for part in output_fisher(inputs.dense, inputs.rows[:number], generator)]
    weighed = WeighedInputs(inputs, roots)
    order = pipeline.partition(config, weighed) if order is None else order
    gates = [b.router.state_dict() for b in pipeline.make_student(config, weighed, order).banks()]
    student = pipeline.make_student(config, inputs, order)
    banks = student.banks()
    with torch.no_grad():
        for bank, gate in zip(banks, gates, strict=True):
            bank.router.weight.copy_(gate["weight"])
            bank.router.bias.copy_(gate["bias"])
            # The thresholds are fitted anew, as if for the first time.
            bank.router.num_updates.zero_()
    if has_budget(config.router):
        fit_start_thresholds(inputs, banks, config.router.budget_scope)
    if config.experts.compensation == "mean":
        fit_compensation(inputs, banks)
    return student
