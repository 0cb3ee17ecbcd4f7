"""The tensors that a run changes, by the names that they have in its checkpoints."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tiny_onn.model import full_sharding
from tiny_onn.model.backbone_mode import in_mlp
from tiny_onn.model.student import TinyOnnForCausalLM, split_parameters


def student_tensors(student: TinyOnnForCausalLM) -> dict[str, Tensor]:
    """Return the experts, gates and budget thresholds: all that a run changes in the model."""
    return {
        name: tensor.detach().contiguous()
        for name, tensor in student.state_dict().items()
        if in_mlp(name)
    }


def optimizer_tensors(
    student: TinyOnnForCausalLM, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    """Yield the optimizer's state in this process, by the parameter's name and the entry's.

    Tensors that are cut are gathered one after another, so that all processes exhaust the iterator.
    """
    for group in split_parameters(student):
        for name, parameter in group.items():
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
    for group in split_parameters(student):
        for name, parameter in group.items():
            prefix = f"{name}|"
            state = {
                key.removeprefix(prefix): tensor
                for key, tensor in tensors.items()
                if key.startswith(prefix)
            }
            optimizer.state[parameter] = full_sharding.local_state(parameter, state)
