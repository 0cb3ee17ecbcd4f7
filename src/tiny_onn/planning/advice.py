"""Advice on the settings to lower when memory runs out, with the bytes that the plan counts."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from tiny_onn.config.changes import CHANGEABLE
from tiny_onn.config.checks import to_toml, validate
from tiny_onn.config.schema import RunConfig
from tiny_onn.errors import UserError
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.planning.costs import count_parameters, meta_models, sizes_of
from tiny_onn.planning.memory import moments
from tiny_onn.planning.optimizer_state import DeviceType

MAX_REMEDIES = 4
MIN_SAVED_SHARE = 0.01
"""The smallest share of the peak that a remedy must save to be named."""


@contextmanager
def explain_out_of_memory(
    config: RunConfig,
    student: TinyOnnForCausalLM,
    teacher: PreTrainedConfig,
    how_to_continue: Callable[[], str],
) -> Iterator[None]:
    """Turn running out of memory into one line that names the settings to lower.

    Args:
        config: the run's settings.
        student: the model in training.
        teacher: the dense model's own settings.
        how_to_continue: the function that returns how the run can go on, for example from its
            newest checkpoint; it is called when memory has run out.

    Raises:
        UserError: memory ran out inside.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(_message(config, teacher, student.device, how_to_continue())) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an exception says that memory ran out, on a GPU or in the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def remedies(
    config: RunConfig, teacher: PreTrainedConfig, device: DeviceType, memory_bytes: int
) -> tuple[int, list[tuple[str, object, int]]]:
    """Return a step's peak in bytes, and changes that lower it, the most effective first.

    Each change is a setting, its new value and the bytes that it saves at the peak.
    """

    def peak(settings: RunConfig) -> int:
        dense, student = meta_models(settings, teacher)
        student.requires_grad_(True)
        parts = moments(
            settings,
            sizes_of(student),
            count_parameters(dense, student),
            device,
            memory_bytes,
        )
        return max(moment.total for moment in parts)

    current = peak(config)
    effective = []
    for name, value in _candidates(config, device):
        section, key = name.split(".")
        change: dict[str, Any] = {key: value}
        changes: dict[str, Any] = {section: replace(getattr(config, section), **change)}
        changed = replace(config, **changes)
        try:
            validate(changed)
        except UserError:
            # The changed value contradicts another setting of this run.
            continue
        saved = current - peak(changed)
        if saved >= MIN_SAVED_SHARE * current:
            effective.append((name, value, saved))
    return current, sorted(effective, key=lambda remedy: -remedy[2])[:MAX_REMEDIES]


def _candidates(config: RunConfig, device: DeviceType) -> Iterator[tuple[str, object]]:
    """Yield settings that may save memory, with the values to try."""
    row_tokens, train = config.data.row_tokens, config.train
    if row_tokens >= 512:
        yield "data.row_tokens", row_tokens // 2
    if train.checkpointing in ("none", "selective"):
        yield "train.checkpointing", "layer"
    elif train.checkpointing == "layer" and device == "cuda":
        yield "train.checkpointing", "offload"
    chunk = train.ffn_chunk_tokens or row_tokens
    if chunk >= 512:
        yield "train.ffn_chunk_tokens", chunk // (2 if train.ffn_chunk_tokens else 8)
    if config.loss.chunk_tokens >= 128:
        yield "loss.chunk_tokens", config.loss.chunk_tokens // 2
    if train.rows_per_step > 1:
        yield "train.rows_per_step", 1
    if config.optim.name in ("adamw", "muon"):
        yield "optim.name", "adamw8bit"
    elif config.optim.name == "adamw8bit" and device == "cuda":
        yield "optim.name", "paged_adamw8bit"
    if config.optim.master_dtype == "float32":
        yield "optim.master_dtype", "bfloat16"
    if config.teacher.quantization == "none" and device == "cuda":
        yield "teacher.quantization", "nf4"


def _message(
    config: RunConfig, teacher: PreTrainedConfig, device: torch.device, how_to_continue: str
) -> str:
    kind: DeviceType = "cuda" if device.type == "cuda" else "cpu"
    memory = (
        torch.cuda.get_device_properties(device).total_memory
        if kind == "cuda"
        else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    peak, effective = remedies(config, teacher, kind, memory)
    changes = [
        f"{name} {to_toml(_value(config, name))} -> {to_toml(value)} saves {_with_unit(saved)}"
        + ("" if name in CHANGEABLE else " (new run)")
        for name, value, saved in effective
    ]
    too_little = "nothing here saves much: take a larger device or a smaller teacher"
    return (
        f"train.device: out of memory on {device}, which has {_with_unit(memory)}, expected room"
        f" for the {_with_unit(peak)} that `plan` counts at the peak of a step, and the libraries;"
        f" lower one of: {'; '.join(changes) or too_little}; {how_to_continue}"
    )


def _value(config: RunConfig, name: str) -> object:
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def _with_unit(num_bytes: int) -> str:
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
    return f"{num_bytes / unit:,.2f} {name}"
