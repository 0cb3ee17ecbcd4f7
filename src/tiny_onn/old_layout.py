"""Expert weights as files held them before checkpoint format 4, brought to today's layout.

A bank held `mlp.gate_up_proj` (2, E, I, D), all gates first, and `mlp.down_proj` (E, I, D), a row
per neuron. Today it holds `mlp.experts.gate_up_proj` (E, 2 I, D) and `mlp.experts.down_proj`
(E, D, I). Numbers are moved and never changed. This module is the only one that knows the old names.

Legend: D hidden, E experts, I expert width.
"""

import re
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from tiny_onn.errors import UserError

KINDS = ("gate_up_proj", "down_proj")
_OLD_NAME = re.compile(rf"(.*\.mlp)\.({'|'.join(KINDS)})")


def today_weight(kind: str, old: Tensor) -> Tensor:
    """An old `gate_up_proj` or `down_proj`, contiguous in its shape of today."""
    if kind == "down_proj":
        return old.mT.contiguous()
    _, E, I, D = old.shape
    return old.transpose(0, 1).reshape(E, 2 * I, D)


def today_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A student's tensors by name, old ones under the names and in the shapes of today."""
    found = {}
    for name, tensor in tensors.items():
        if old := _OLD_NAME.fullmatch(name):
            bank, kind = old.groups()
            found[f"{bank}.experts.{kind}"] = today_weight(kind, tensor)
        else:
            found[name] = tensor
    return found


def today_state(where: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An optimizer's state by `parameter|entry`, that of old weights as today's optimizers keep it.

    Args:
        where: the checkpoint's name, for the message.
        tensors: the state.

    Raises:
        UserError: the state of old weights is quantised in blocks. A block holds neighbours of the
            old order, so it could only be moved by rounding it again.
    """
    found = {}
    for key, tensor in tensors.items():
        name, _, entry = key.partition("|")
        if old := _OLD_NAME.fullmatch(name):
            if tensor.dtype == torch.uint8:
                raise UserError(
                    f"{where}: got an 8-bit optimizer's state in the order of format 3, expected"
                    " one of format 4, because it cannot be moved without loss; go on with the"
                    " version of tiny-onn in environment.json, or start a new run"
                )
            bank, kind = old.groups()
            entry, tensor = _today_entry(kind, entry, tensor)
            key = f"{bank}.experts.{kind}|{entry}"
        found[key] = tensor
    return found


def _today_entry(kind: str, entry: str, tensor: Tensor) -> tuple[str, Tensor]:
    """An entry of an optimizer's state for one old weight, and its name."""
    if tensor.ndim == (4 if kind == "gate_up_proj" else 3):
        return entry, today_weight(kind, tensor)
    if tensor.ndim < 2:
        return entry, tensor
    # Adafactor's factors: gates and ups keep one each, and down's rows are columns now.
    if kind == "gate_up_proj":
        return entry, tensor.transpose(0, 1).contiguous()
    other = {"exp_avg_sq_row": "exp_avg_sq_col", "exp_avg_sq_col": "exp_avg_sq_row"}
    return other[entry], tensor


class _ToToday(ConversionOps):
    """`today_weight` as transformers' loader calls it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **_: object,
    ) -> dict[str, Any]:
        """The one old weight that `input_dict` holds, under its name of today."""
        (found,) = input_dict.values()
        old = found[0] if isinstance(found, list) else found
        return {target_patterns[0]: today_weight(self.kind, old)}


def register_old_layout(model_type: str) -> None:
    """Let `from_pretrained` read models of this type that were saved in the old layout."""
    converters = [
        WeightConverter(rf"mlp\.{kind}$", f"mlp.experts.{kind}", [_ToToday(kind)]) for kind in KINDS
    ]
    register_checkpoint_conversion_mapping(model_type, [*converters], overwrite=True)
