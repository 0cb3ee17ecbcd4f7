"""From a dense model to a student: transplant the backbone, cut the MLPs into experts, verify.

The student's embeddings, attention and norms are the dense model's own tensors, shared by
reference: copied bit for bit at no memory, frozen, and free to serve the teacher at the same time.
With all experts on at unit weight a student cut from dense weights is the dense model; `convert`
checks that layer by layer and `identity_gap` measures it at the logits.

Legend: D hidden, E experts, I expert width, F = E * I neurons, L layers.
"""

import copy
import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tiny_onn.config.schema import ExpertsConfig, RouterConfig
from tiny_onn.errors import UserError
from tiny_onn.model.backbone import GatedMlp, backbone_of, gated_mlps, head_of, last_hidden_states
from tiny_onn.model.backbone_mode import in_mlp
from tiny_onn.model.experts import ExpertBank
from tiny_onn.model.router import RoutingRule, temporary_rules
from tiny_onn.model.student import TinyOnnConfig, TinyOnnForCausalLM

GATE_STD = 0.02


def student_config(
    dense: PreTrainedModel, experts: ExpertsConfig, router: RouterConfig
) -> TinyOnnConfig:
    """The student's configuration for a dense model.

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
    """A student of a dense model; its backbone shares the dense model's tensors.

    Args:
        dense: the teacher, frozen by this call.
        experts: how experts start.
        router: how they are chosen.
        generator: CPU generator of random experts and gates.
        neuron_order: per layer, dense neuron indices in the order in which they fill the experts;
            None: as they are.

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
    """A student with uninitialised experts whose other tensors are the dense model's own."""
    with torch.device("meta"):
        student = TinyOnnForCausalLM(config)
    student.config._attn_implementation = dense.config._attn_implementation
    adopt_backbone(student, dense)
    for bank in student.banks():
        bank.to_empty(device=dense.device)
        bank.float()
    student.generation_config = copy.deepcopy(dense.generation_config)
    return student.train(False)


def adopt_backbone(student: TinyOnnForCausalLM, dense: PreTrainedModel) -> None:
    """Replace the student's backbone tensors by the dense model's, by reference."""
    dense_tensors = [*dense.named_parameters(remove_duplicate=False), *dense.named_buffers()]
    for name, tensor in dense_tensors:
        if not in_mlp(name):
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
    """Refuse an MLP that computes something else than act(gate x) * (up x)."""
    generator = torch.Generator().manual_seed(index)
    x_TD = torch.randn(4, bank.experts.hidden_dim, generator=generator).to(dense.device)
    expected = copy.deepcopy(mlp.module).float()(x_TD)
    with all_experts_on([bank]):
        gap = (bank(x_TD) - expected).abs().max().item()
    size = expected.abs().max().item()
    if not gap <= 1e-4 * size + 1e-6:
        raise UserError(
            f"architecture {type(dense).__name__}: layer {index}'s MLP differs from "
            f"down(act(gate(x)) * up(x)) by {gap:.3g} (outputs up to {size:.3g}), expected "
            "equality to rounding; this family cannot be converted"
        )


def all_experts_on(banks: Sequence[ExpertBank]) -> AbstractContextManager[None]:
    """A context within which every expert is active at weight 1."""
    everyone = float(banks[0].router.weight.shape[0])
    rule = RoutingRule(selection="top_k", weighting="unit", target_k=everyone)
    return temporary_rules([bank.router for bank in banks], [rule] * len(banks))


@torch.no_grad()
def identity_gap(
    student: TinyOnnForCausalLM, dense: PreTrainedModel, input_ids: Int[Tensor, "batch tokens"]
) -> float:
    """Largest absolute difference of the dense logits and the student's with all experts on.

    Both are computed in float32, whatever they are stored in: in bfloat16 the two ways of adding up
    the same MLP differ by rounding alone, which says nothing about the conversion. Memory: the
    dense model once more, in float32, for the time of the call.
    """
    wide = copy.deepcopy(dense).float()
    assert isinstance(student.config, TinyOnnConfig)
    twin = share_backbone(wide, student.config)
    for bank, own in zip(twin.banks(), student.banks(), strict=True):
        bank.load_state_dict(own.state_dict(), assign=True)
    expected = wide(input_ids=input_ids, use_cache=False).logits
    with all_experts_on(twin.banks()):
        got = twin(input_ids=input_ids, use_cache=False).logits
    return (got - expected).abs().max().item()


@torch.no_grad()
def verify_head(dense: PreTrainedModel, input_ids: Int[Tensor, "batch tokens"]) -> float:
    """Largest difference between the model's logits and those of `head_of` on its hidden states.

    Raises:
        UserError: they differ by more than rounding: the family's head does something more.
    """
    expected = dense(input_ids=input_ids, use_cache=False).logits.float()
    got: Float[Tensor, "..."] = head_of(dense).logits(last_hidden_states(dense, input_ids)[0])
    gap, size = (got - expected[0]).abs().max().item(), expected.abs().max().item()
    if not gap <= (0.02 if dense.dtype == torch.bfloat16 else 1e-4) * size:
        raise UserError(
            f"architecture {type(dense).__name__}: its logits differ from softcap(scale * W h) by "
            f"{gap:.3g} (logits up to {size:.3g}), expected equality to rounding; this family's "
            "output head is not supported"
        )
    return gap


def backbone_hash(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """SHA-256 of every tensor outside the MLPs, by name, number format, shape and bytes.

    Args:
        model: a dense model or a student.
        dtype: the number format the model is taken to be in; None: its own.
    """
    digest = hashlib.sha256()
    cast = dtype is not None and dtype != model.dtype
    for name, parameter in backbone_tensors(model).items():
        tensor = parameter.to(dtype) if cast else parameter
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def backbone_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters outside the MLPs of a dense model or a student, without graphs, in order."""
    named = sorted(backbone_of(model).named_parameters(remove_duplicate=False))
    return {name: parameter.detach() for name, parameter in named if not in_mlp(name)}


def shape_difference(student: TinyOnnForCausalLM, dense: PreTrainedModel) -> str | None:
    """What first tells that a student has other sizes than a dense model, in words; None: nothing.

    Raises:
        UserError: the dense model is not of a kind that can be converted.
    """
    ours, theirs = (
        {name: tuple(tensor.shape) for name, tensor in backbone_tensors(model).items()}
        for model in (student, dense)
    )
    experts = student.banks()[0].experts
    ours["mlp"] = (experts.num_experts * experts.intermediate_dim,)
    theirs["mlp"] = (gated_mlps(dense)[0].gate_proj.out_features,)
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            shapes = (table.get(name, "absent") for table in (ours, theirs))
            return "{}: {}, not {}".format(name, *shapes)
    return None


def same_backbone(student: TinyOnnForCausalLM, dense: PreTrainedModel) -> bool:
    """Whether a student's tensors outside the MLPs are a dense model's of the same shapes.

    Also where they are its values rounded to the student's number format or to bfloat16: a student
    of a bfloat16 run may have been widened since, and its teacher read in float32.
    """
    theirs = backbone_tensors(dense)
    return all(
        any(torch.equal(tensor, theirs[name].to(dtype).to(tensor.dtype)) for dtype in formats)
        for name, tensor in backbone_tensors(student).items()
        for formats in [(tensor.dtype, torch.bfloat16)]
    )


def _nearest_divisor(width: int, wanted: int) -> int:
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))
