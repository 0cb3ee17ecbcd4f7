"""The sources of a plan's numbers: a model's config.json and a device's memory and rates."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from transformers import AutoConfig, PreTrainedConfig

from tiny_onn.config.schema import DType, TeacherConfig, TeacherDType
from tiny_onn.device import number_format
from tiny_onn.errors import UserError, load_errors, printable, reason_line, reason_of
from tiny_onn.planning.device_names import device_rows, gpu_name, gpu_numbers
from tiny_onn.teacher.model_files import check_config_table, check_model_config, read_object
from tiny_onn.teacher.model_paths import find_model

GIB = 2**30
# The bundled shape of the embedded teacher saves its conversion.
_EMBEDDED = "SmolLM2-135M"


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A device that steps run on, with its memory and rates."""

    name: str
    type: Literal["cpu", "cuda"] = "cuda"
    memory_bytes: int
    bf16_tflops: float
    """Peak rate of dense matrix products, TFLOP/s, in bfloat16; a CPU's in the run's format."""
    bandwidth_gb_s: float
    """Peak rate of reading memory."""
    auto_dtype: DType = "bfloat16"
    """The number format that `teacher.dtype = "auto"` means on the device."""
    source: str = "given"
    """The source of the numbers."""


def load_shape(name: str | Path, teacher: TeacherConfig) -> tuple[str, PreTrainedConfig]:
    """Return a model's name and configuration.

    Args:
        name: a folder or file with a config.json, `embedded`, a bundled name or its hub id, or
            another hub id.
        teacher: the settings with revision and trust of a hub id.

    Raises:
        UserError: there is no such model, or transformers does not know its configuration.
    """
    path, text = Path(name), str(name)
    if os.path.isfile(path):  # noqa: PTH113 - no error for what is no path
        return text, _read_shape(path, text)
    if text and os.path.isdir(path):  # noqa: PTH112
        return text, _from_pretrained(text, {"trust_remote_code": teacher.trust_remote_code})
    for entry in sorted(
        (files("tiny_onn.planning") / "shapes").iterdir(), key=lambda entry: entry.name
    ):
        raw = entry.read_text("utf-8")
        stem = entry.name.removesuffix(".json")
        known = {stem.lower(), str(json.loads(raw)["_name_or_path"]).lower()}
        if text.lower() in known or (text == "embedded" and stem == _EMBEDDED):
            return stem, _for_model(json.loads(raw), stem)
    source = find_model(text, "teacher.path", teacher.revision)
    hub = {} if Path(source).is_dir() else {"revision": teacher.revision}
    return text, _from_pretrained(source, {**hub, "trust_remote_code": teacher.trust_remote_code})


def find_device(text: str, dtype: TeacherDType) -> Device:
    """Return the device that a user names.

    Args:
        text: `auto` (this machine's GPU if it has one, else its CPU), `cpu`, a name of
            `devices.toml`, or `MEMORY_GIB,TFLOPS,GB_PER_S` of a GPU.
        dtype: number format in which a CPU is measured; `auto` takes its faster one.

    Raises:
        UserError: there is no such device.
    """
    table = _device_table()
    wanted = text.strip().lower()
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return measure_cpu(getattr(torch, number_format(dtype, torch.device("cpu"))))
    if wanted == "auto":
        return _own_gpu(table)
    name = gpu_name(text)
    return _custom_device(text) if name is None else table[name]


def measure_cpu(dtype: torch.dtype) -> Device:
    """Return this machine's memory and its rates, measured in a third of a second or so."""
    a, b = (torch.ones(1024, 1024, dtype=dtype) for _ in range(2))
    source, target = (torch.ones(1 << 24) for _ in range(2))
    product_s = _best_seconds(lambda: torch.mm(a, b))
    copy_s = _best_seconds(lambda: target.copy_(source))
    return Device(
        name=f"CPU, {torch.get_num_threads()} threads",
        type="cpu",
        memory_bytes=psutil.virtual_memory().total,
        bf16_tflops=2 * 1024**3 / product_s / 1e12,
        bandwidth_gb_s=2 * source.nbytes / copy_s / 1e9,
        auto_dtype=number_format("auto", torch.device("cpu")),
        source=f"measured now: a 1024 x 1024 x 1024 product in {dtype}, a copy of 64 MiB",
    )


def _best_seconds(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _device_table() -> dict[str, Device]:
    return {
        name: Device(
            name=name,
            memory_bytes=row["memory_gib"] * GIB,
            bf16_tflops=float(row["bf16_tflops"]),
            bandwidth_gb_s=float(row["bandwidth_gb_s"]),
            source=row["source"],
        )
        for name, row in device_rows().items()
    }


def _own_gpu(table: dict[str, Device]) -> Device:
    """Return this machine's first GPU with its own memory and the table's rates."""
    properties = torch.cuda.get_device_properties(0)
    for name, device in table.items():
        if f" {name} " in f" {properties.name.replace('-', ' ')} ":
            return Device(
                name=properties.name,
                memory_bytes=properties.total_memory,
                bf16_tflops=device.bf16_tflops,
                bandwidth_gb_s=device.bandwidth_gb_s,
                auto_dtype=number_format("auto", torch.device("cuda")),
                source=device.source,
            )
    raise UserError(
        f"--device: got auto, a {properties.name}, expected one of {', '.join(table)}; give its "
        "numbers as --device MEMORY_GIB,TFLOPS,GB_PER_S"
    )


def _custom_device(text: str) -> Device:
    memory_gib, tflops, bandwidth = gpu_numbers(text)
    return Device(
        name=f"GPU of {memory_gib:g} GiB, {tflops:g} TFLOP/s, {bandwidth:g} GB/s",
        memory_bytes=round(memory_gib * GIB),
        bf16_tflops=tflops,
        bandwidth_gb_s=bandwidth,
    )


def _read_shape(path: Path, name: str) -> PreTrainedConfig:
    try:
        table = read_object(path)
        check_config_table(table, path.name)
    except (UserError, OSError) as error:
        raise _no_shape(name, reason_line(error)) from error
    return _for_model(table, name)


def _for_model(table: dict[str, Any], name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(table.pop("model_type"), **table)
    except load_errors() as error:
        raise _no_shape(name, reason_of(error)) from error


def _from_pretrained(name: str, options: dict[str, Any]) -> PreTrainedConfig:
    try:
        check_model_config(name, options.get("revision"))
        return AutoConfig.from_pretrained(name, **options)
    except UserError as error:
        raise _no_shape(name, reason_line(error)) from error
    except load_errors() as error:
        raise _no_shape(name, str(error)) from error


def _no_shape(name: str, reason: str) -> UserError:
    first = printable((reason.strip().splitlines() or ["no reason given"])[0])[:240]
    stems = sorted(
        entry.name.removesuffix(".json")
        for entry in (files("tiny_onn.planning") / "shapes").iterdir()
    )
    return UserError(
        f"teacher.path: got {name}, expected {', '.join(stems)}, embedded, a folder with a "
        f"config.json, or a hub id ({first}); a hub id needs a network or a local cache"
    )
