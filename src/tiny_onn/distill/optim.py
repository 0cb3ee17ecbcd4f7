"""Optimizers of the two systems: fast experts and slow gates.

The experts' optimizer is a setting. Gates are 0.3 % of the parameters and are always stepped by
AdamW with 32-bit state, and so are the gains of norms where they learn. An expert parameter of a
model with 96 x 1024 experts takes, in bytes for weight + gradient + state:

    name                         float32 masters     bfloat16 with stochastic rounding
    adamw                        4 + 4 + 8           2 + 2 + 8
    adamw8bit, paged_adamw8bit   4 + 4 + 2.03        2 + 2 + 2.03
    adafactor                    4 + 4 + 0.05        2 + 2 + 0.05
    muon                         4 + 4 + 4           2 + 2 + 4

While a bfloat16 tensor is stepped it also needs float32 copies of itself and of its gradient, and 4
bytes of random bits per element; such tensors are stepped one at a time. Muon steps several
float32 tensors together, in copies of up to 0.8 GB on a GPU (`planning/optimizer_state.py`).
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor, nn

from tiny_onn.config.schema import OptimConfig, Shard
from tiny_onn.device import load_bitsandbytes
from tiny_onn.distill.muon import Muon
from tiny_onn.distill.units import STACKED, Units, in_units_, norm_units, out_of_units_, start_units
from tiny_onn.model.expert_weights import KINDS, by_neuron
from tiny_onn.model.full_sharding import local_part, shard_place
from tiny_onn.model.norms import norm_gains
from tiny_onn.model.student import TinyOnnForCausalLM, split_parameters
from tiny_onn.parallel import ALONE, World, balanced
from tiny_onn.planning.optimizer_state import MIN_8BIT_SIZE


def build_optimizer(
    student: TinyOnnForCausalLM,
    config: OptimConfig,
    *,
    seed: int = 0,
    world: World = ALONE,
    shard: Shard = "none",
) -> "SplitOptimizer":
    """Return the optimizer of experts (by Muon two or three groups), gates and the norms' gains.

    Experts are cast to `config.master_dtype` first, in place; gates and gains keep their format.

    Args:
        student: The model, whose parameters that require a gradient learn.
        config: The settings.
        seed: The seed of stochastic rounding.
        world: The processes that step the student.
        shard: The setting `train.shard`, which says what each process holds. No share of the
            weights ends within a block of 8-bit state (`planning.cluster.check_blocks`).

    Raises:
        UserError: The setting needs bitsandbytes, which is not installed.
    """
    named_experts, named_gates = split_parameters(student)
    experts, gates = list(named_experts.values()), list(named_gates.values())
    cast_experts(student, config)
    num_shares = shard_place(experts[0])[1] if experts else 1
    norms = list(norm_gains(student).values())
    steppers = []
    if experts and config.name == "muon":
        steppers.extend(_muon(config, named_experts))
    elif experts:
        group = _group("experts", experts, config.expert_lr, config.weight_decay)
        steppers.append(_stepper(config, group, experts[0].device, num_shares))
    if gates:
        group = _group("gates", gates, config.gate_lr, config.gate_weight_decay)
        steppers.append(_adamw(config, group))
    if norms:
        steppers.append(_adamw(config, _group("norms", norms, config.norm_lr, 0.0)))
    kinds = {}
    if config.name not in ("adamw", "muon"):
        kinds = {p: kind for n, p in named_experts.items() if (kind := n.split(".")[-1]) in KINDS}
    units = {}
    if config.lr_scale == "rms":
        units = start_units(named_experts | named_gates) | norm_units(student)
    owners = owners_of(experts, world.size) if shard == "optimizer" and world.size > 1 else {}
    return SplitOptimizer(steppers, seed, kinds, units, owners=owners, world=world)


def _group(
    system: str, parameters: list[nn.Parameter], lr: float, weight_decay: float
) -> dict[str, Any]:
    """Return a group of an optimizer, whose rate begins at its peak."""
    return {
        "params": parameters,
        "system": system,
        "lr": lr,
        "peak_lr": lr,
        "weight_decay": weight_decay,
    }


def cast_experts(student: TinyOnnForCausalLM, config: OptimConfig) -> None:
    """Cast the experts' weights to the number format of their masters, in place."""
    for parameter in split_parameters(student)[0].values():
        if parameter.dtype != (dtype := getattr(torch, config.master_dtype)):
            parameter.data = parameter.data.to(dtype)


def owners_of(parameters: Sequence[nn.Parameter], size: int) -> dict[nn.Parameter, int]:
    """Return the rank of the process that steps each parameter, so that all hold about as much."""
    ranks = balanced([parameter.numel() for parameter in parameters], size)
    return dict(zip(parameters, ranks, strict=True))


def _stepper(
    config: OptimConfig, group: dict[str, Any], device: torch.device, num_shares: int
) -> torch.optim.Optimizer:
    """Return the library's optimizer that the settings name, for shares of weights."""
    if config.name == "adamw":
        return _adamw(config, group)
    if config.name == "adafactor":
        # torch.optim.Adafactor does not fit. Its learning rate is relative to the weights' norm and
        # capped at 1 / sqrt(step), so that it is not comparable with AdamW's; and its eps is larger
        # than the squared gradients of a model of this size, which turns the update into a scaled
        # gradient (torch 2.13).
        # The library's module imports peft and bitsandbytes where they are, which takes seconds.
        from transformers.optimization import Adafactor  # noqa: PLC0415

        return Adafactor([group], scale_parameter=False, relative_step=False)
    bitsandbytes = load_bitsandbytes(f'optim.name = "{config.name}"')
    # Paging moves state to host memory, where a CPU's state is already.
    paged = config.name == "paged_adamw8bit" and device.type == "cuda"
    optimizer = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    # A share's state has the format of the whole weight's.
    least: Any = MIN_8BIT_SIZE / num_shares
    betas = (config.beta1, config.beta2)
    return optimizer([group], betas=betas, eps=config.eps, min_8bit_size=least)


def _muon(
    config: OptimConfig, experts: Mapping[str, nn.Parameter]
) -> Iterator[torch.optim.Optimizer]:
    """Yield the optimizers of gates with ups, of downs, and of vectors, which are no matrices."""
    by_kind: defaultdict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in experts.items():
        kind = name.split(".")[-1]
        by_kind[kind if kind in KINDS else "vectors"].append(parameter)
    for kind, parameters in by_kind.items():
        group = _group("experts", parameters, config.expert_lr, config.weight_decay)
        if kind == "vectors":
            yield _adamw(config, group)
        else:
            yield Muon(group, config.beta1, num_stacked=2 if kind == STACKED else 1)


def _adamw(config: OptimConfig, group: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [group], betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


class SplitOptimizer(torch.optim.Optimizer):
    """An optimizer over groups of parameters, each stepped by a library's optimizer of its own.

    This object owns groups and state. The libraries' optimizers are handed both at every step and
    keep neither.

    bfloat16 parameters are stepped through float32 copies, one at a time, and rounded back
    stochastically. The random bits depend on the seed, the parameter's place, and the number of its
    roundings, which is part of its state; a restored state therefore continues bit for bit. Gains
    of norms are so few that their float32 copies are kept, as part of their state, and rounded to
    nearest.

    Some optimizers' state of an element depends on its neighbours. All of these but Muon see the
    experts' weights neuron by neuron, in copies made one at a time. A block of 8-bit state then
    holds weights of one neuron, a factor of Adafactor's belongs to either a gate or an up matrix,
    and checkpoints from before today's stacking of the weights keep their exact state.

    A weight with a unit is divided by it for the time of a step, and its gradient is multiplied by
    it and stays so; Muon multiplies its step instead. The unit is part of the weight's state
    from its first step on, so that a resumed run keeps it.

    In several processes a parameter may have an owner, which alone holds its state, steps it and
    hands it to the others (ZeRO-1: Rajbhandari et al., arXiv 1910.02054, section 5.1).
    `torch.distributed.optim.ZeroRedundancyOptimizer` does not fit, because it builds one class of
    optimizer for all groups from parameters of their own number format, and pickles their state.

    Args:
        steppers: Optimizers of one group each.
        seed: The seed of stochastic rounding.
        kinds: The weights to step neuron by neuron, with their names in `Experts`.
        units: The units of weights (`units.py`); a weight without one has the unit 1.
        owners: The ranks of the processes that own parameters; every process steps the others.
        world: The processes.
    """

    def __init__(
        self,
        steppers: Sequence[torch.optim.Optimizer],
        seed: int,
        kinds: Mapping[nn.Parameter, str] = MappingProxyType({}),
        units: Units = MappingProxyType({}),
        *,
        owners: Mapping[nn.Parameter, int] = MappingProxyType({}),
        world: World = ALONE,
    ) -> None:
        super().__init__([group for stepper in steppers for group in stepper.param_groups], {})
        self._steppers = tuple(steppers)
        self._seed = seed
        self._kinds = kinds
        self.units = dict(units)
        self.owners, self.world = dict(owners), world

    def is_mine(self, p: nn.Parameter) -> bool:
        """Return True if this process holds a weight's state and steps it."""
        return self.owners.get(p, self.world.rank) == self.world.rank

    def unit(self, p: nn.Parameter) -> Tensor | None:
        """Return a weight's unit, the one in its state if there is one; None without a unit."""
        return self.state[p].get("unit", self.units.get(p)) if p in self.units else None

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], Tensor | float] | None = None
    ) -> Tensor | float | None:
        """Update every parameter that has a gradient, and return the closure's loss if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, (group, stepper) in enumerate(
            zip(self.param_groups, self._steppers, strict=True)
        ):
            plain = []
            for number, p in enumerate(group["params"]):
                if p.grad is None or not self.is_mine(p):
                    continue
                if p.dtype == torch.bfloat16 or p in self._kinds:
                    self._step_of_copy(stepper, group, p, f"{self._seed} {index} {number}")
                else:
                    plain.append(p)
            if plain:
                self._step_in_units(stepper, group, plain)
        stepped = [p for p in self.owners if p.grad is not None]
        self.world.broadcast([p.data for p in stepped], [self.owners[p] for p in stepped])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a `state_dict` in its own number formats.

        The method of torch would cast it to the number format of the weights.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, entries in state_dict["state"].items():
            self.state[parameters[number]] = {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in entries.items()
            }
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})

    def _step_in_units(
        self, stepper: torch.optim.Optimizer, group: dict[str, Any], parameters: list[nn.Parameter]
    ) -> None:
        """Step parameters in place; those with a unit as multiples of it."""
        parts, states = [local_part(p) for p in parameters], [self.state[p] for p in parameters]
        _step(stepper, group, parts, states, [self.unit(p) for p in parameters])

    def _step_of_copy(
        self, stepper: torch.optim.Optimizer, group: dict[str, Any], p: nn.Parameter, place: str
    ) -> None:
        kind, part = self._kinds.get(p), local_part(p)
        weight, grad = (t if kind is None else by_neuron(kind, t) for t in (part.data, part.grad))
        state, unit = self.state[p], self.unit(p)
        master = nn.Parameter(state.pop("master", weight).float().contiguous())
        master.grad = grad.float().contiguous()
        num_roundings = int(state.pop("num_roundings", 0))
        _step(stepper, group, [master], [state], [unit])
        keeps_copy = group["system"] == "norms"
        if keeps_copy:
            state["master"] = master.data
        if keeps_copy or p.dtype != torch.bfloat16:
            weight.copy_(master)
            return
        digest = hashlib.blake2b(f"{place} {num_roundings}".encode(), digest_size=7).digest()
        generator = torch.Generator(p.device).manual_seed(int.from_bytes(digest))
        # The experts' dimension is the second one of gates and ups neuron by neuron.
        share = (*shard_place(p), int(master.ndim == 4))
        weight.copy_(stochastic_round(master.data, generator, share))
        state["num_roundings"] = num_roundings + 1


def _step(
    stepper: torch.optim.Optimizer,
    group: dict[str, Any],
    parameters: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    units: Sequence[Tensor | None],
) -> None:
    """Let an optimizer update states and parameters, those with a unit as multiples of it."""
    stepper.param_groups = [{**group, "params": parameters}]
    stepper.state = defaultdict(dict, zip(parameters, states, strict=True))
    measured = {p: unit for p, unit in zip(parameters, units, strict=True) if unit is not None}
    for state in states:
        state.pop("unit", None)
    # Muon's steps do not depend on the scale of weights and gradients, and it multiplies its steps
    # by the units. The libraries' optimizers know no units.
    if isinstance(stepper, Muon):
        for p, unit in measured.items():
            stepper.state[p]["unit"] = unit
        stepper.step()
        return
    gradients = [p.grad for p in measured if p.grad is not None]
    in_units_([*measured], gradients, [*measured.values()])
    for number, state in enumerate(states):
        step = state.get("step", 0)
        # torch's AdamW counts steps in a float32 tensor. The others count in an int, which a
        # checkpoint restores as an integer tensor.
        restored = isinstance(step, Tensor) and not step.is_floating_point()
        if hasattr(stepper, "init_state") and (restored or not state):
            _init_8bit_state(stepper, number)
        elif restored:
            state["step"] = int(step)
    stepper.step()
    out_of_units_([*measured], [*measured.values()])
    for p, unit in measured.items():
        stepper.state[p]["unit"] = unit


def _init_8bit_state(stepper: torch.optim.Optimizer, number: int) -> None:
    """Initialise a bitsandbytes state, then copy the restored values into it.

    The restored state cannot be used directly: only bitsandbytes can allocate paged memory, it
    expects the step as an int, and it lets all parameters share the quantisation maps, which
    safetensors does not write.
    """
    group = stepper.param_groups[0]
    parameter = group["params"][number]
    state = stepper.state[parameter]
    restored = dict(state)
    state.clear()
    stepper.init_state(group, parameter, 0, number)  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("qmap1", "qmap2"):
        if name in state:
            state[name] = state[name].clone()
    for name, value in restored.items():
        if name == "step":
            state[name] = int(value)
        else:
            state[name].copy_(value)


def stochastic_round(
    values: Float32[Tensor, "*shape"],
    generator: torch.Generator,
    place: tuple[int, int, int] = (0, 1, 0),
) -> BFloat16[Tensor, "*shape"]:
    """Return one of the two bfloat16 neighbours of each value, which on average is the value.

    bfloat16 is float32 without its last 16 bits. A sum with 16 random bits carries into the bits
    that stay with a probability proportional to the part that is cut off. An update smaller than
    half a unit in the last place, which rounding to nearest would lose, survives on average. Values
    beyond bfloat16's largest may become infinite; infinities and NaN do not change.

    Args:
        values: The numbers to round.
        generator: A generator on the values' device, which is advanced.
        place: The number of this share of a tensor, the number of its equal shares, and the
            dimension along which it is cut. A share gets the bits that it would get in the whole.

    Source: Gupta et al., arXiv 1502.02551, section 3.
    """
    number, num_shares, dim = place
    shape = list(values.shape)
    shape[dim : dim + 1] = [size * num_shares for size in shape[dim : dim + 1]]
    bits = torch.randint(
        1 << 16, shape, dtype=torch.int32, device=values.device, generator=generator
    )
    bits = bits.chunk(num_shares, dim)[number] if num_shares > 1 else bits
    bits.add_(values.view(torch.int32)).bitwise_and_(-(1 << 16))
    # The sum could turn the bits of a NaN into those of a number.
    return torch.where(values.isfinite(), bits.view(torch.float32), values).bfloat16()
