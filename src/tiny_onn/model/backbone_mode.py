"""The mode of a frozen backbone, which runs without dropout while the experts inside it train.

transformers' models have dropout under many names, and all of it reads the `training` flag of the
module in which it stands, so the flag of a frozen module stays off. Gradient checkpointing of a
whole layer reads the flag too; here it keeps working without the layer's dropout.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn


def in_mlp(name: str) -> bool:
    """Return whether a module or parameter of this name is a layer's MLP or inside it."""
    return ".mlp." in f"{name}."


def set_backbone_mode(
    backbone: nn.Module,
    layers: Sequence[nn.Module],
    training: bool,
    *,
    besides: Collection[str] = (),
) -> None:
    """Turn training mode off outside `layers.*.mlp` if nothing there requires a gradient.

    Args:
        backbone: the decoder, each of its modules in the mode that was asked for.
        layers: the decoder's layers; the module that each holds under `mlp` keeps its mode.
        training: the mode that was asked for.
        besides: the names of parameters that may require a gradient in a frozen backbone.
    """
    own = (p for name, p in backbone.named_parameters() if not in_mlp(name) and name not in besides)
    frozen = training and not any(parameter.requires_grad for parameter in own)
    if frozen:
        for name, module in backbone.named_modules():
            if not in_mlp(name):
                module.training = False
    for layer in layers:
        if getattr(layer, "gradient_checkpointing", False):
            _checkpoint_without_dropout(layer, frozen)


@dataclass(frozen=True, slots=True, eq=False)
class _WithoutDropout:
    """A layer's checkpoint function that runs the layer itself in evaluation mode."""

    layer: nn.Module
    recompute: Callable[..., Any]

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401
        return self.recompute(partial(self._run, function), *args)

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401
        before = self.layer.training
        self.layer.training = False
        try:
            return function(*args)
        finally:
            self.layer.training = before


def _checkpoint_without_dropout(layer: Any, frozen: bool) -> None:  # noqa: ANN401 - transformers' attributes
    """Let transformers checkpoint a frozen layer, which it does in training mode only."""
    recompute = layer._gradient_checkpointing_func
    if isinstance(recompute, _WithoutDropout):
        recompute = recompute.recompute
    layer._gradient_checkpointing_func = _WithoutDropout(layer, recompute) if frozen else recompute
    layer.training = layer.training or frozen
