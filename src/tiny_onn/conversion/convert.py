"""The construction of a student from a dense model, whose MLPs are cut into experts.

The student's embeddings, attention and norms are the dense model's own frozen tensors, shared by
reference: they take no memory of their own and serve the teacher at the same time. With all experts
on at unit weight, a student cut from dense weights computes the dense model; `convert` checks that
layer by layer and `identity_gap` measures it at the logits.

Legend: D hidden, E experts, I expert width, F = E * I neurons, L layers.
"""

import copy
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from tiny_onn.config.schema import ExpertsConfig, RouterConfig
from tiny_onn.errors import UserError
from tiny_onn.model.backbone import GatedMlp, gated_mlps
from tiny_onn.model.backbone_mode import in_mlp
from tiny_onn.model.experts import ExpertBank
from tiny_onn.model.router import RoutingRule, temporary_rules
from tiny_onn.model.student import TinyOnnConfig, TinyOnnForCausalLM

GATE_STD = 0.02


def student_config(
    dense: PreTrainedModel, experts: ExpertsConfig, router: RouterConfig
) -> TinyOnnConfig:
    """Return the student's configuration for a dense model.

    Raises:
        UserError: the architecture, the sizes or k do not fit.
    """
    width = gated_mlps(dense)[0].gate_proj.out_features
    if experts.expert_dim == 0 and width % experts.num_experts:
        raise UserError(
            f"experts.num_experts: got {experts.num_experts}, expected a divisor of {width}, the "
            f"width of this model's MLP; for example {_nearest_divisor(width, experts.num_experts)}"
        )
    return TinyOnnConfig(
        backbone=copy.deepcopy(dense.config),
        num_experts=experts.num_experts,
        moe_intermediate_size=experts.expert_dim or width // experts.num_experts,
        routing=RoutingRule.of_settings(experts, router),
        compensation=experts.compensation,
        learn_scale=experts.learn_scale,
        token_scale=experts.token_scale,
        dtype=dense.dtype,
    )


def convert(
    dense: PreTrainedModel,
    experts: ExpertsConfig,
    router: RouterConfig,
    *,
    generator: torch.Generator,
    neuron_order: Sequence[Int[Tensor, " neurons"]] | None = None,
) -> TinyOnnForCausalLM:
    """Convert a dense model to a student whose backbone shares the dense model's tensors.

    Args:
        dense: the teacher, frozen by this call.
        experts: the settings of the experts.
        router: the settings of the routers.
        generator: CPU generator of random experts and gates.
        neuron_order: per layer, dense neuron indices in the order in which they fill the experts;
            None keeps the dense order.

    Raises:
        UserError: the architecture, the sizes or k do not fit.
    """
    config = student_config(dense, experts, router)
    dense.requires_grad_(False)
    student = share_backbone(dense, config)
    std = getattr(dense.config.get_text_config(), "initializer_range", 0.02)
    for index, (bank, mlp) in enumerate(zip(student.banks(), gated_mlps(dense), strict=True)):
        bank.router.reset(None if experts.gate_init == "zeros" else generator, GATE_STD)
        bank.reset_corrections()
        if experts.init == "random":
            bank.experts.reset(generator, std)
        else:
            fill_from_dense(bank, mlp, None if neuron_order is None else neuron_order[index])
            _verify_layer(bank, mlp, index, dense)
        bank.requires_grad_(True)
    return student


def share_backbone(dense: PreTrainedModel, config: TinyOnnConfig) -> TinyOnnForCausalLM:
    """Build a student with uninitialised experts whose other tensors are the dense model's own."""
    with torch.device("meta"):
        student = TinyOnnForCausalLM(config)
    student.config._attn_implementation = dense.config._attn_implementation
    adopt_backbone(student, dense)
    for bank in student.banks():
        bank.to_empty(device=dense.device)
        bank.float()
    student.generation_config = copy.deepcopy(dense.generation_config)
    return student.train(False)


def adopt_backbone(
    student: TinyOnnForCausalLM, dense: PreTrainedModel, besides: Collection[str] = ()
) -> None:
    """Replace the student's backbone tensors by the dense model's, by reference.

    Args:
        student: the student.
        dense: the dense model.
        besides: the names in the dense model of tensors that the student keeps.
    """
    dense_tensors = [*dense.named_parameters(remove_duplicate=False), *dense.named_buffers()]
    for name, tensor in dense_tensors:
        if not in_mlp(name) and name not in besides:
            owner_name, _, attribute = name.rpartition(".")
            setattr(student.backbone.get_submodule(owner_name), attribute, tensor)


@torch.no_grad()
def fill_from_dense(
    bank: ExpertBank, mlp: GatedMlp, order: Int[Tensor, " neurons"] | None = None
) -> None:
    """Cut a dense MLP into the bank: neuron `order[e * I + i]` becomes neuron i of expert e."""
    E, D, I = bank.experts.down_proj.shape
    gate_up_down = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T)
    gate, up, down = (
        (rows_FD if order is None else rows_FD[order.to(rows_FD.device)]).reshape(E, I, D)
        for rows_FD in gate_up_down
    )
    bank.experts.gate_up_proj.copy_(torch.cat((gate, up), dim=1))
    bank.experts.down_proj.copy_(down.mT)


@torch.no_grad()
def _verify_layer(bank: ExpertBank, mlp: GatedMlp, index: int, dense: PreTrainedModel) -> None:
    """Refuse an MLP that computes something else than down(act(gate x) * (up x))."""
    generator = torch.Generator().manual_seed(index)
    x_TD = torch.randn(4, bank.experts.hidden_dim, generator=generator).to(dense.device)
    expected = copy.deepcopy(mlp.module).float()(x_TD)
    with all_experts_on([bank]):
        error = (bank(x_TD) - expected).abs().max().item()
    size = expected.abs().max().item()
    if not error <= 1e-4 * size + 1e-6:
        raise UserError(
            f"architecture {type(dense).__name__}: layer {index}'s MLP differs from "
            f"down(act(gate(x)) * up(x)) by {error:.3g} (outputs up to {size:.3g}), expected "
            "equality to rounding; this family cannot be converted"
        )


def all_experts_on(banks: Sequence[ExpertBank]) -> AbstractContextManager[None]:
    """Return a context within which every expert is active at weight 1."""
    num_experts = float(banks[0].router.weight.shape[0])
    rule = RoutingRule(selection="top_k", weighting="unit", target_k=num_experts)
    return temporary_rules([bank.router for bank in banks], [rule] * len(banks))


def _nearest_divisor(width: int, wanted: int) -> int:
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))
