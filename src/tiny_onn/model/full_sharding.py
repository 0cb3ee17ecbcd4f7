"""Weights of which each process holds a share: `train.shard = "full"`, by torch's FSDP2.

`fully_shard` cuts the experts of each layer, and the MLPs of a teacher that is not quantised, along
their first dimension. A layer's weights are gathered where a pass reads them and given back after
it, and its gradients leave the backward pass as sums over the processes, of which each keeps its
share. A weight is then a `DTensor`, whose local tensor holds this process's experts whole.

Everything else stays whole in every process: attention, embeddings, norms and the head, which
teacher and student share and which hold no gradient, and gates, mean outputs, scales and gains of
norms that learn, which are small. The head is read in many chunks of the loss, and would be
gathered for each of them.

A forward pass of either model waits for all processes, which must make the same passes in the same
order. Modules of torch.distributed are imported where they are used, because that takes a second.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny_onn.model.backbone import backbone_of, decoder_layers
from tiny_onn.model.expert_weights import Experts
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.parallel import World


def is_sharded(tensor: Tensor) -> bool:
    """Return True if each process holds a share of a tensor."""
    # A DTensor is known by its mesh, without importing the class.
    return hasattr(tensor, "device_mesh")


def is_fully_sharded(student: TinyOnnForCausalLM) -> bool:
    """Return True if each process holds a share of the student's experts."""
    return is_sharded(student.banks()[0].experts.down_proj)


def shard_fully(student: TinyOnnForCausalLM, teacher: PreTrainedModel, world: World) -> None:
    """Leave each process its share of the student's experts and of the teacher's MLPs, in place.

    Args:
        student: The converted student, the same one in every process; its experts are in the number
            format of their masters already. Its number of experts is a multiple of the processes'.
        teacher: The dense model. Quantised MLPs, which are small, stay whole.
        world: The processes, all of which make this call.
    """
    if world.size == 1:
        return
    from torch.distributed.device_mesh import DeviceMesh  # noqa: PLC0415
    from torch.distributed.fsdp import FSDPModule, fully_shard  # noqa: PLC0415

    assert world.group is not None
    mesh = DeviceMesh.from_group(world.group, student.device.type)
    cut = partial(fully_shard, mesh=mesh, reshard_after_forward=True)
    experts: list[nn.Module] = [bank.experts for bank in student.banks()]
    mlps = [layer.get_submodule("mlp") for layer in decoder_layers(backbone_of(teacher))]
    plain = [mlp for mlp in mlps if all(p.is_floating_point() for p in mlp.parameters())]
    for model, parts in ((student.backbone, experts), (backbone_of(teacher), plain)):
        if not parts:
            continue
        for part in parts:
            cut(part)
        # The root has no weights of its own; its layers share streams and gather ahead.
        root = model.base_model
        cut(root, ignored_params={p for p in root.parameters() if not is_sharded(p)})
        held: list[Any] = []
        root.register_forward_pre_hook(partial(_hold, held), prepend=True, with_kwargs=True)
        root.register_forward_pre_hook(partial(_give_back, held), with_kwargs=True)
        # The blockwise stage calls layers, of which the first one would become the root.
        fully_shard.state(root)._lazy_init()  # pyright: ignore[reportFunctionMemberAccess]
    for part in experts:
        assert isinstance(part, FSDPModule)
        # The losses are normalised over all rows already, so that gradients are sums.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    if plain:
        backbone_of(teacher).base_model.register_forward_hook(_forget_forward)


# `fully_shard` moves a root's inputs to its device, and these belong on the host.
_ON_HOST = "document_bounds"


def _hold(held: list[Any], _: object, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:  # noqa: ANN401
    """Take the input that stays on the host out of a forward pass, before `fully_shard` sees it."""
    held[:] = [kwargs[_ON_HOST]] if _ON_HOST in kwargs else []
    return args, {name: value for name, value in kwargs.items() if name != _ON_HOST}


def _give_back(held: list[Any], _: object, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:  # noqa: ANN401
    """Give a forward pass the input that was held."""
    return args, kwargs | ({_ON_HOST: held[0]} if held else {})


def _forget_forward(root: Any, *_: object) -> None:  # noqa: ANN401 - an FSDPModule
    """Drop the record of a teacher's forward pass, which no backward pass would clear."""
    # Up to torch 2.12 there is no such call, and a row leaves some hundred bytes.
    if hasattr(root, "reset_iter_state"):
        root.reset_iter_state()


def local_part(parameter: Any) -> Any:  # noqa: ANN401 - a Tensor, or a parameter with its gradient
    """Return a weight as this process holds it: itself, or its share with the gradient's share.

    The share is no copy: what changes it changes the weight.
    """
    if not is_sharded(parameter):
        return parameter
    share: Any = parameter.detach()
    part, gradient = nn.Parameter(share.to_local(), requires_grad=False), parameter.grad
    if gradient is not None:
        part.grad = gradient.to_local()  # pyright: ignore[reportAttributeAccessIssue]
    return part


def shard_place(parameter: Tensor) -> tuple[int, int]:
    """Return the number of this process among those that hold a weight's shares, and theirs."""
    if not is_sharded(parameter):
        return 0, 1
    mesh: Any = parameter.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
    return mesh.get_local_rank(), mesh.size()


def full_tensor(tensor: Any) -> Tensor:  # noqa: ANN401 - a Tensor or DTensor
    """Return a tensor whole; of one that is cut all processes make this call."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_of(tensor: Tensor, parameter: Tensor, dim: int = 0) -> Tensor:
    """Return this process's share of a whole tensor that belongs to a weight, a view of it."""
    rank, size = shard_place(parameter)
    return tensor.chunk(size, dim)[rank] if size > 1 else tensor


# Entries of an optimizer's state that do not belong to single numbers of a weight.
_SAME_EVERYWHERE = frozenset(("step", "unit", "num_roundings", "qmap1", "qmap2"))


def _first_dim(state: dict[str, Tensor]) -> int:
    """Return the dimension of the experts in a weight's optimizer state.

    It is 1 where the weight is stepped with all its gates before all its ups, (2, E, I, D).
    """
    return int(any(value.ndim == 4 for value in state.values()))


def full_state(parameter: Tensor, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the entries of a weight's optimizer state, each gathered where it is cut.

    All processes exhaust the iterator together.
    """
    dim = _first_dim(state)
    for entry, value in state.items():
        if not is_sharded(parameter) or entry in _SAME_EVERYWHERE:
            yield entry, value
            continue
        from torch.distributed.tensor import DTensor, Shard  # noqa: PLC0415

        mesh: Any = parameter.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
        # Scales of blocks are one row of numbers, first those of all gates.
        row = value.ndim == 1 and dim == 1
        part = value.view(2, -1) if row else value
        gathered = full_tensor(
            DTensor.from_local(part.contiguous(), mesh, [Shard(dim)], run_check=False)
        )
        yield entry, gathered.reshape(-1) if row else gathered


def local_state(parameter: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return this process's share of a weight's whole optimizer state, on the weight's device."""
    if not is_sharded(parameter):
        return {entry: value.to(parameter.device) for entry, value in state.items()}
    dim, shares = _first_dim(state), {}
    for entry, value in state.items():
        share = value
        if entry not in _SAME_EVERYWHERE:
            row = value.ndim == 1 and dim == 1
            share = shard_of(value.view(2, -1) if row else value, parameter, dim)
            share = share.reshape(-1) if row else share
        shares[entry] = share.to(parameter.device, copy=True).contiguous()
    return shares


@contextmanager
def full_experts(student: TinyOnnForCausalLM, *, keep: bool) -> Iterator[None]:
    """Give the student whole experts within the context, in host memory, if they are cut.

    Args:
        student: The student, which must not run within the context.
        keep: Whether this process is one that needs them; all processes gather them.
    """
    banks = student.banks()
    before = [bank.experts for bank in banks]
    cut = is_fully_sharded(student)
    for bank in banks if cut else ():
        weights = {}
        for name, parameter in bank.experts.named_parameters():
            gathered = full_tensor(parameter.detach())
            if keep:
                weights[name] = gathered.cpu()
        if keep:
            E, D, I = bank.experts.down_proj.shape
            with torch.device("meta"):
                experts = Experts(D, E, I, bank.activation_name)
            experts.load_state_dict(weights, assign=True)
            bank.add_module("experts", experts)
    try:
        yield
    finally:
        for bank, experts in zip(banks, before, strict=True):
            bank.add_module("experts", experts)
