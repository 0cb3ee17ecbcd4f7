"""Optimizers and schedules of the two systems: experts are fast, gates are slow."""

import torch
from torch import nn

from tiny_onn.config import OptimConfig
from tiny_onn.modeling import TinyOnnForCausalLM


def split_parameters(
    student: TinyOnnForCausalLM,
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The parameters that learn, by name: experts, gates."""
    learning = {name: p for name, p in student.trainable().items() if p.requires_grad}
    experts = {name: p for name, p in learning.items() if ".router." not in name}
    gates = {name: p for name, p in learning.items() if ".router." in name}
    return experts, gates


def build_optimizer(student: TinyOnnForCausalLM, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over experts and gates, in that order of groups, float32 state beside float32 masters."""
    experts, gates = split_parameters(student)
    groups = [
        {"params": list(experts.values()), "lr": config.expert_lr, "peak_lr": config.expert_lr,
         "weight_decay": config.weight_decay},
        {"params": list(gates.values()), "lr": config.gate_lr, "peak_lr": config.gate_lr,
         "weight_decay": 0.0},
    ]  # fmt: skip
    assert config.name == "adamw"
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def lr_factor(progress: float, config: OptimConfig) -> float:
    """Share of the peak learning rate at `progress` in [0, 1]: linear rise, constant, linear fall."""
    rising = progress / config.warmup_fraction if config.warmup_fraction else 1.0
    falling = (1 - progress) / config.decay_fraction if config.decay_fraction else 1.0
    return max(0.0, min(1.0, rising, falling))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def clip_gradients(student: TinyOnnForCausalLM, clip_norm: float) -> tuple[float, float]:
    """Clip experts' and gates' gradients apart, by global L2 norm; their norms before clipping."""
    norms = []
    for parameters in split_parameters(student):
        if parameters:
            norms.append(nn.utils.clip_grad_norm_(parameters.values(), clip_norm, foreach=True))
        else:
            norms.append(0.0)
    return norms[0], norms[1]
