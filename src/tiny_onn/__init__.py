"""Tiny-ONN turns dense language models into banks of ultra-light experts by online distillation.

The model's classes are imported when they are first asked for, which registers the architecture
with transformers; importing the package alone loads neither torch nor transformers.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiny_onn.model.student import TinyOnnConfig, TinyOnnForCausalLM, TinyOnnModel

__all__ = ["TinyOnnConfig", "TinyOnnForCausalLM", "TinyOnnModel"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'tiny_onn' has no attribute {name!r}")
    from tiny_onn.model import student as modeling  # noqa: PLC0415 (5 s of imports)

    return getattr(modeling, name)
