"""The conversion that all processes of a run share, whatever their hardware would make of it."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from tiny_onn.config.schema import RunConfig
from tiny_onn.conversion.pipeline import FindOrder, partition
from tiny_onn.model.backbone_mode import in_mlp
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.parallel import World


def order_of_first(world: World) -> FindOrder | None:
    """Return the function by which the first process finds the neurons' order for all of them.

    In one process it is None: `prepare` then finds the order itself.
    """

    def find(config: RunConfig, inputs: MlpInputs) -> Sequence[Int[Tensor, " neurons"]] | None:
        orders = partition(config, inputs) if world.first else None
        if not world.any_true(orders is not None):
            return None
        shape = torch.tensor([0, 0] if orders is None else [len(orders), len(orders[0])])
        world.broadcast([shape])
        table = torch.empty(shape.tolist(), dtype=torch.int64)
        if orders is not None:
            table.copy_(torch.stack(list(orders)))
        world.broadcast([table])
        return list(table.unbind())

    return find if world.size > 1 else None


def share_student(student: TinyOnnForCausalLM, world: World) -> None:
    """Give every process the experts, gates and buffers of the first one."""
    if world.size > 1:
        tensors = [tensor for name, tensor in student.state_dict().items() if in_mlp(name)]
        world.broadcast(tensors)
