"""The tensors that a run changes, by the names that they have in its checkpoints."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tiny_onn.model import full_sharding
from tiny_onn.model.backbone_mode import in_mlp
from tiny_onn.model.norms import norm_gains
from tiny_onn.model.student import TinyOnnForCausalLM, learning_parameters


def student_tensors(student: TinyOnnForCausalLM) -> dict[str, Tensor]:
    """Return all that a run changes: experts, gates, budget thresholds, the norms' own gains."""
    norms = norm_gains(student)
    return {
        name: tensor.detach().contiguous()
        for name, tensor in student.state_dict().items()
        if in_mlp(name) or name in norms
    }


def optimizer_tensors(
    student: TinyOnnForCausalLM, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    """Yield the optimizer's state in this process, by the parameter's name and the entry's.

    Tensors that are cut are gathered one after another, so that all processes exhaust the iterator.
    """
    for name, parameter in learning_parameters(student).items():
        state = optimizer.state.get(parameter, {}).items()
        held = {e: torch.as_tensor(value).detach().contiguous() for e, value in state}
        for entry, value in full_sharding.full_state(parameter, held):
            yield f"{name}|{entry}", value


@torch.no_grad()
def copy_to_student(student: TinyOnnForCausalLM, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors, named as by `student_tensors`, into the student or its shares."""
    for name, tensor in student_tensors(student).items():
        full_sharding.local_part(tensor).copy_(full_sharding.shard_of(tensors[name], tensor))


def copy_to_optimizer(
    student: TinyOnnForCausalLM, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Replace the optimizer's state by whole tensors, named as by `optimizer_tensors`."""
    for name, parameter in learning_parameters(student).items():
        prefix = f"{name}|"
        state = {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
        optimizer.state[parameter] = full_sharding.local_state(parameter, state)
