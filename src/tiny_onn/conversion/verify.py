"""Checks of a conversion: with all experts on, the student computes what its teacher computes."""

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
from tiny_onn.model.norms import learned_norms
from tiny_onn.model.student import TinyOnnConfig, TinyOnnForCausalLM


@torch.no_grad()
def identity_gap(
    student: TinyOnnForCausalLM, dense: PreTrainedModel, input_ids: Int[Tensor, "batch tokens"]
) -> float:
    """Return the largest absolute difference of dense logits and the student's, all experts on.

    Both are computed in float32, whatever they are stored in: in bfloat16 the two ways of adding up
    the same MLP differ by rounding alone, which says nothing about the conversion. The call holds
    the dense model once more in float32.
    """
    dense_float32 = copy.deepcopy(dense).float()
    assert isinstance(student.config, TinyOnnConfig)
    twin = share_backbone(dense_float32, student.config)
    for bank, own in zip(twin.banks(), student.banks(), strict=True):
        bank.load_state_dict(own.state_dict(), assign=True)
    expected = dense_float32(input_ids=input_ids, use_cache=False).logits
    with all_experts_on(twin.banks()):
        got = twin(input_ids=input_ids, use_cache=False).logits
    return (got - expected).abs().max().item()


@torch.no_grad()
def verify_head(dense: PreTrainedModel, input_ids: Int[Tensor, "batch tokens"]) -> float:
    """Return the largest difference of the model's logits and `head_of` on its hidden states.

    Raises:
        UserError: the logits differ by more than rounding, so the family's head computes more.
    """
    expected = dense(input_ids=input_ids, use_cache=False).logits.float()
    got: Float[Tensor, "..."] = head_of(dense).logits(last_hidden_states(dense, input_ids)[0])
    error, size = (got - expected[0]).abs().max().item(), expected.abs().max().item()
    if not error <= (0.02 if dense.dtype == torch.bfloat16 else 1e-4) * size:
        raise UserError(
            f"architecture {type(dense).__name__}: its logits differ from softcap(scale * W h) by "
            f"{error:.3g} (logits up to {size:.3g}), expected equality to rounding; this family's "
            "output head is not supported"
        )
    return error


def backbone_hash(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """Return the SHA-256 of all tensors outside the MLPs: names, formats, shapes and bytes.

    Args:
        model: a dense model or a student.
        dtype: the number format that tensors are cast to first; None keeps the model's own.
    """
    digest = hashlib.sha256()
    cast = dtype is not None and dtype != model.dtype
    for name, parameter in backbone_tensors(model).items():
        tensor = parameter.to(dtype) if cast else parameter
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def backbone_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the parameters outside the MLPs of a model, detached and sorted by name."""
    named = sorted(backbone_of(model).named_parameters(remove_duplicate=False))
    return {name: parameter.detach() for name, parameter in named if not in_mlp(name)}


def shape_difference(student: TinyOnnForCausalLM, dense: PreTrainedModel) -> str | None:
    """Describe the first tensor by which a student's sizes differ from a dense model's, or None.

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
    """Return True if a student's tensors outside the MLPs hold a dense model's values.

    Values that were rounded to the student's number format or to bfloat16 count as equal, because a
    student of a bfloat16 run may have been widened since, and its teacher may be read in float32.
    Gains of norms that learned with the student's experts do not count. The shapes must be the
    same.
    """
    theirs, learned = backbone_tensors(dense), learned_norms(student)
    return all(
        any(torch.equal(tensor, theirs[name].to(dtype).to(tensor.dtype)) for dtype in formats)
        for name, tensor in backbone_tensors(student).items()
        if name not in learned
        for formats in [(tensor.dtype, torch.bfloat16)]
    )


CHECKED_TOKENS = 128
SEARCHED_TOKENS = 4096
"""Tokens that are searched for massive activations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """The results of the checks of one conversion."""

    logit_gap: float | None
    """Largest difference to the teacher's logits with all experts on, in float32; None for experts
    that do not come from the teacher."""
    head_gap: float
    """Largest difference between the teacher's logits and those our loss computes from its hidden
    states, in its own number format."""
    backbone_sha256: str
    """SHA-256 of every tensor outside the MLPs, equal in teacher and student."""
    teacher_commit: str | None
    """The commit that a hub id's revision was when it was read; None for a folder."""
    expert_path: PathChoice
    """The code path of the expert layers, and the reason for it."""
    massive_activations: tuple[MassiveActivation, ...]
    """Massive activations of the teacher's MLPs on the first `SEARCHED_TOKENS` calibration tokens,
    or on held-out ones if the conversion reads no text."""


def check_conversion(
    config: RunConfig,
    student: TinyOnnForCausalLM,
    inputs: MlpInputs,
) -> Conversion:
    """Compare a fresh student with its teacher on `CHECKED_TOKENS` tokens.

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
    """Return the inputs that are searched for massive activations, in whole rows."""
    return inputs.head(max(1, SEARCHED_TOKENS // config.data.row_tokens))
