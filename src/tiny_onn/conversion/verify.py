"""A conversion is verified: with all experts on, the student computes what its teacher does."""

import copy
import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tiny_onn.config.schema import RunConfig
from tiny_onn.conversion.convert import all_experts_on, share_backbone
from tiny_onn.conversion.massive_activations import MassiveActivation, massive_activations
from tiny_onn.errors import UserError
from tiny_onn.model.backbone import backbone_of, gated_mlps, head_of, last_hidden_states
from tiny_onn.model.backbone_mode import in_mlp
from tiny_onn.model.expert_path import PathChoice, choose_path
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.student import TinyOnnConfig, TinyOnnForCausalLM


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


# Tokens on which a conversion is checked.
CHECKED_TOKENS = 128


# Tokens that are searched for massive activations.
SEARCHED_TOKENS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What a conversion was checked to be."""

    logit_gap: float | None
    """Largest difference to the teacher's logits with all experts on, in float32; None for experts
    that do not come from the teacher."""
    head_gap: float
    """Largest difference between the teacher's logits and those our loss computes from its hidden
    states, in its own number format."""
    backbone_sha256: str
    """Of every tensor outside the MLPs, equal in teacher and student."""
    teacher_commit: str | None
    """The commit that a hub id's revision was when it was read; None for a folder."""
    expert_path: PathChoice
    """How the expert layers compute, and why."""
    massive_activations: tuple[MassiveActivation, ...]
    """Of the teacher's MLPs, on the text that the conversion was checked on."""


def check_conversion(
    config: RunConfig,
    student: TinyOnnForCausalLM,
    inputs: MlpInputs,
) -> Conversion:
    """Hold a fresh student against its teacher on a little text.

    Raises:
        UserError: the family's output head is not supported.
    """
    dense = inputs.dense
    sample = inputs.rows[0].input_ids[:, :CHECKED_TOKENS]
    head_gap = verify_head(dense, sample)
    own, theirs = backbone_hash(student), backbone_hash(dense)
    assert own == theirs
    exact = config.experts.init != "random"
    return Conversion(
        logit_gap=identity_gap(student, dense, sample) if exact else None,
        head_gap=head_gap,
        backbone_sha256=own,
        teacher_commit=getattr(dense.config, "_commit_hash", None),
        expert_path=choose_path(config, dense.device, student.banks()[0].activation_name),
        massive_activations=tuple(massive_activations(searched_tokens(config, inputs))),
    )


def searched_tokens(config: RunConfig, inputs: MlpInputs) -> MlpInputs:
    """The inputs that are searched for massive activations."""
    return inputs.head(max(1, SEARCHED_TOKENS // config.data.row_tokens))
