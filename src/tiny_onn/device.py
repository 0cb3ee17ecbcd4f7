"""The choice of a device, a number format and kernels whose bits repeat; and bitsandbytes."""

import importlib
import logging
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from tiny_onn.config.checks import check_device
from tiny_onn.config.schema import DType, RunConfig, TeacherDType
from tiny_onn.console import say
from tiny_onn.errors import UserError

# ONEDNN_MAX_CPU_ISA leaves a CPU its bfloat16 products if it names one of these instruction sets.
_BFLOAT16_ISAS = ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT")
# Number formats are compared by the product of square matrices of this size, in milliseconds.
_COMPARED_DIM = 512

# bitsandbytes 0.50 warns on import, on CPUs with AVX-512 BF16, that an optional kernel is missing.
# Nothing here takes the path that the kernel is for.
_KERNEL_LOGGER = "bitsandbytes.backends.cpu.ops"
_KERNEL_NOTICE = "Failed to load CPU gemm_4bit_forward"


def pick_device(name: str) -> torch.device:
    """Return the device that a setting names; `auto` is the first CUDA device, else the CPU.

    Raises:
        UserError: the name is no device, or the machine has no such device.
    """
    check_device(name, "train.device")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"train.device: got {name}, expected a device of this machine, which has "
            f"{torch.cuda.device_count()} CUDA devices; use auto or cpu"
        )
    return device


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = _cpuinfo().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cpuinfo() -> str:
    """Return Linux's description of the processor; empty on other systems."""
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8") if file.exists() else ""


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return True if the device has instructions for bfloat16 products and does not emulate them.

    GPUs have such instructions from compute capability 8.0 on. CPUs have them with AVX-512 BF16,
    AMX or Arm's BF16 extension, unless the environment variables ATEN_CPU_CAPABILITY or
    ONEDNN_MAX_CPU_ISA keep torch from using them.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if not any(name in allowed for name in _BFLOAT16_ISAS):
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        # On macOS there is no cpuinfo, and torch emulates the products there on every chip.
        return " bf16" in _cpuinfo()
    return torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AVX10")) and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def number_format(dtype: TeacherDType, device: torch.device) -> DType:
    """Return the number format that a setting means on this device; `auto` is the faster one."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


def with_number_format(config: RunConfig, device: torch.device) -> RunConfig:
    """Return the settings with a `teacher.dtype` of `auto` replaced by this device's faster format.

    A printed line names the choice. An explicit bfloat16 stays even on a CPU that emulates it; a
    warning then gives the measured factor.
    """
    dtype = number_format(config.teacher.dtype, device)
    if config.teacher.dtype == "auto":
        has = "has bfloat16 instructions" if dtype == "bfloat16" else "has no bfloat16 instructions"
        say(f'teacher.dtype = "{dtype}": {device_name(device)} {has}')
        return replace(config, teacher=replace(config.teacher, dtype=dtype))
    if dtype == "bfloat16" and not multiplies_bfloat16(device):
        say(
            f"teacher.dtype: a product in bfloat16 takes {bfloat16_slowdown(device):.1f} times as "
            f"long as one in float32 on this {device_name(device)}, which has no bfloat16 "
            'instructions; teacher.dtype = "auto" would take float32'
        )
    return config


def without_emulation(config: RunConfig, device: torch.device) -> RunConfig:
    """Return a finished student's settings in float32 if the device would emulate bfloat16.

    Nothing is lost, because every bfloat16 number is a float32 number. A printed line tells of the
    change.
    """
    if config.teacher.dtype == "float32" or multiplies_bfloat16(device):
        return config
    say(f"{device_name(device)} has no bfloat16 instructions: computing in float32")
    return replace(config, teacher=replace(config.teacher, dtype="float32"))


def bfloat16_slowdown(device: torch.device) -> float:
    """Measure the time of a matrix product in bfloat16 over its time in float32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(_COMPARED_DIM, _COMPARED_DIM, dtype=dtype, device=device)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            # Reading one number waits for a GPU.
            torch.mm(matrix, matrix)[0, 0].item()
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] / seconds[torch.float32]


def prepare_device(config: RunConfig) -> tuple[RunConfig, torch.device]:
    """Choose a run's device and number format, and have the device repeat its bits if asked to.

    Raises:
        UserError: the machine has no such device.
    """
    device = pick_device(config.train.device)
    if config.train.deterministic:
        ask_for_same_bits(device)
    return with_number_format(config, device), device


def ask_for_same_bits(device: torch.device) -> None:
    """Make torch and cuBLAS choose kernels whose results repeat, in this process from here on.

    Without this call, the backward pass of the flash kernel, among others, adds up in no fixed
    order. The results of a CPU repeat in any case. Call this function before the GPU is first used,
    because cuBLAS reads its environment then.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Flash attention ignores the mode that only warns.
    torch.use_deterministic_algorithms(True)
    # In this mode torch fills new memory with NaN, a debugging aid that takes a pass over it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def load_bitsandbytes(setting: str) -> ModuleType:
    """Import bitsandbytes and return it.

    Args:
        setting: the setting that needs it, `section.key = value`, for the message.

    Raises:
        UserError: bitsandbytes is not installed or cannot be imported.
    """
    logger = logging.getLogger(_KERNEL_LOGGER)
    logger.addFilter(_is_not_kernel_notice)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(
            f"{setting}: got no bitsandbytes ({error}), expected the package that does it; run "
            "pip install bitsandbytes"
        ) from error
    finally:
        logger.removeFilter(_is_not_kernel_notice)


def _is_not_kernel_notice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_KERNEL_NOTICE)
