"""Expert weights under the names and in the shapes of files from before checkpoint format 4.

A bank held `mlp.gate_up_proj` (2, E, I, D), all gates first, and `mlp.down_proj` (E, I, D), a row
per neuron. It holds `mlp.experts.gate_up_proj` (E, 2 I, D) and `mlp.experts.down_proj` (E, D, I)
today. Numbers are moved and never changed. No other module knows the old names.

Legend: D hidden, E experts, I expert width.
"""

import re
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from tiny_onn.model.expert_weights import KINDS, stacked

_OLD_NAME = re.compile(rf"(.*\.mlp)\.({'|'.join(KINDS)})")
# What torch's AdamW keeps for each weight. Other optimizers' entries that have an order
# have the one that `SplitOptimizer` keeps.
_MOVED_ENTRIES = ("exp_avg", "exp_avg_sq")


def today_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A student's tensors by name, old ones under the names and in the shapes of today."""
    found = {}
    for name, tensor in tensors.items():
        kind, today = _kind_and_name(name)
        found[today] = stacked(kind, tensor) if kind else tensor
    return found


def today_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An optimizer's state by `parameter|entry`, that of old weights as it is kept today."""
    found = {}
    for key, tensor in tensors.items():
        name, _, entry = key.partition("|")
        kind, today = _kind_and_name(name)
        moved = kind and entry in _MOVED_ENTRIES
        found[f"{today}|{entry}"] = stacked(kind, tensor) if moved else tensor
    return found


def _kind_and_name(name: str) -> tuple[str, str]:
    """Which weight an old name means and its name of today; nothing and the name for others."""
    old = _OLD_NAME.fullmatch(name)
    return (old[2], f"{old[1]}.experts.{old[2]}") if old else ("", name)


class _Stack(ConversionOps):
    """`stacked` as transformers' loader calls it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    @torch.no_grad()
    def convert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_dict: dict[str, Any], *, target_patterns: list[str], **_: object
    ) -> dict[str, Any]:
        """The one old weight that `input_dict` holds, under its name of today."""
        (found,) = input_dict.values()
        old = found[0] if isinstance(found, list) else found
        return {target_patterns[0]: stacked(self.kind, old)}


def register_old_layout(model_type: str) -> None:
    """Let `from_pretrained` read models of this type that were saved in the old layout."""
    converters = [
        WeightConverter(rf"mlp\.{kind}$", f"mlp.experts.{kind}", [_Stack(kind)]) for kind in KINDS
    ]
    register_checkpoint_conversion_mapping(model_type, [*converters], overwrite=True)
