"""Expert weights under the names and in the shapes of files from before checkpoint format 4.

In these files a bank holds `mlp.gate_up_proj` (2, E, I, D), all gates first, and `mlp.down_proj`
(E, I, D), a row per neuron. Today it holds `mlp.experts.gate_up_proj` (E, 2 I, D) and
`mlp.experts.down_proj` (E, D, I). Numbers are moved and never changed. No other module knows the
old names.

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
# torch's AdamW keeps these entries in the order of the weight's numbers. Other optimizers' entries
# need no move: `SplitOptimizer` shows them weights neuron by neuron, as the old layout stored them.
_MOVED_ENTRIES = ("exp_avg", "exp_avg_sq")


def today_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a student's tensors by name, old ones under the names and in the shapes of today."""
    renamed = {}
    for name, tensor in tensors.items():
        kind, today = _kind_and_name(name)
        renamed[today] = stacked(kind, tensor) if kind else tensor
    return renamed


def today_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an optimizer's state by `parameter|entry`, with old weights' state in today's form."""
    renamed = {}
    for key, tensor in tensors.items():
        name, _, entry = key.partition("|")
        kind, today = _kind_and_name(name)
        moved = kind and entry in _MOVED_ENTRIES
        renamed[f"{today}|{entry}"] = stacked(kind, tensor) if moved else tensor
    return renamed


def _kind_and_name(name: str) -> tuple[str, str]:
    """Return an old name's kind of weight and its name of today; "" and the name for others."""
    old = _OLD_NAME.fullmatch(name)
    return (old[2], f"{old[1]}.experts.{old[2]}") if old else ("", name)


class _Stack(ConversionOps):
    """The function `stacked` in the form that transformers' loader calls."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    @torch.no_grad()
    def convert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_dict: dict[str, Any], *, target_patterns: list[str], **_: object
    ) -> dict[str, Any]:
        """Return the one old weight that `input_dict` holds, under its name of today."""
        (value,) = input_dict.values()
        old = value[0] if isinstance(value, list) else value
        return {target_patterns[0]: stacked(self.kind, old)}


def register_old_layout(model_type: str) -> None:
    """Let `from_pretrained` read models of this type that were saved in the old layout."""
    converters = [
        WeightConverter(rf"mlp\.{kind}$", f"mlp.experts.{kind}", [_Stack(kind)]) for kind in KINDS
    ]
    register_checkpoint_conversion_mapping(model_type, [*converters], overwrite=True)
