"""The gains of a frozen backbone's norms, which a student may own and train beside its experts.

A student shares its backbone's tensors with its teacher. Gains that learn are therefore copies of
the student's own, and the teacher keeps those that it came with.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny_onn.errors import UserError
from tiny_onn.model.backbone import backbone_of
from tiny_onn.model.backbone_mode import in_mlp


def norms_of(backbone: nn.Module) -> dict[str, nn.Module]:
    """Return the norms outside the MLPs that have a gain, by the name of the gain in the backbone.

    Norms are known by their class, `LlamaRMSNorm` or `LayerNorm`; the gain is their `weight`.
    """
    return {
        f"{name}.weight": module
        for name, module in backbone.named_modules()
        if "norm" in type(module).__name__.lower()
        and not in_mlp(name)
        and isinstance(module._parameters.get("weight"), nn.Parameter)
    }


def own_norms(student: PreTrainedModel) -> None:
    """Give a student gains of its backbone's norms that learn, copies of those it has.

    A student that has gains of its own keeps them. Its configuration records that it has them.

    Raises:
        UserError: the backbone has no norms with a gain.
    """
    if learned_norms(student):
        return
    backbone = backbone_of(student)
    norms = norms_of(backbone)
    if not norms:
        raise UserError(
            f"optim.norm_lr: got a rate for the norms of {type(backbone).__name__}, which have no"
            " gains, expected 0; set it to 0"
        )
    for norm in norms.values():
        gain = norm.get_parameter("weight")
        norm.register_parameter("weight", nn.Parameter(gain.detach().clone()))
    student.config.norms_learned = True


def learned_norms(student: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the norms whose gains are a student's own, by the gain's name in the backbone."""
    learned = getattr(student.config, "norms_learned", False)
    return norms_of(backbone_of(student)) if learned else {}


def norm_gains(student: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the gains of norms that are a student's own, by name."""
    norms = learned_norms(student).items()
    return {f"backbone.{name}": norm.get_parameter("weight") for name, norm in norms}


@torch.no_grad()
def gain_unit(norm: nn.Module) -> Tensor:
    """Return the root mean square of a norm's factors, 1 if they are all 0; a float32 number.

    Some families store a factor as its difference from 1, so that the factors are measured: a norm
    leaves a vector of 1 and -1 in turns as it is, but for its factors.
    """
    gain = norm.get_parameter("weight")
    signs = torch.ones_like(gain)
    signs[..., 1::2] = -1
    # The call of the module itself may be compiled.
    size = torch.linalg.vector_norm(norm.forward(signs), dtype=torch.float32)
    unit = size / gain.numel() ** 0.5
    return torch.where(unit > 0, unit, 1.0)
