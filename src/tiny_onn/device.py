"""Which device a run is on, in which number format it computes there, and that its bits repeat."""

import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch

from tiny_onn.config.checks import check_device
from tiny_onn.config.schema import DType, RunConfig, TeacherDType
from tiny_onn.console import say
from tiny_onn.errors import UserError

# Instruction sets by which oneDNN's environment variable leaves a CPU its bfloat16 products.
_BFLOAT16_ISAS = ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT")
# Side of the square matrices by whose product number formats are compared: some milliseconds.
_COMPARED_DIM = 512


def pick_device(name: str) -> torch.device:
    """The device a setting names; `auto` is the first CUDA device if there is one, else the CPU.

    Raises:
        UserError: The name is no device, or the machine has no such device.
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
    """The name of the GPU, or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = _cpuinfo().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cpuinfo() -> str:
    """What Linux tells about the processor; empty on other systems."""
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8") if file.exists() else ""


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products, rather than emulating them.

    GPUs have them from compute capability 8.0 on. Of CPUs those have them with AVX-512 BF16, AMX or
    Arm's BF16 extension, as far as the environment lets torch use these: the variables
    ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA can take them away.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if not any(name in allowed for name in _BFLOAT16_ISAS):
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        # On macOS it is empty, and torch's products there are emulated whatever the chip has.
        return " bf16" in _cpuinfo()
    return torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AVX10")) and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def number_format(dtype: TeacherDType, device: torch.device) -> DType:
    """The number format that a setting means on this device; `auto` is the faster one."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


def with_number_format(config: RunConfig, device: torch.device) -> RunConfig:
    """The settings with `teacher.dtype` as this device computes fastest, if it is `auto`.

    A line says what was chosen. An explicit bfloat16 stays on a CPU that emulates it, with a
    warning that holds the measured factor.
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
    """The settings of a finished student in float32 where the device would emulate bfloat16.

    Every bfloat16 number is a float32 number, so that nothing is lost; a line says it.
    """
    if config.teacher.dtype == "float32" or multiplies_bfloat16(device):
        return config
    say(f"{device_name(device)} has no bfloat16 instructions: computing in float32")
    return replace(config, teacher=replace(config.teacher, dtype="float32"))


def bfloat16_slowdown(device: torch.device) -> float:
    """Time of a matrix product in bfloat16 over its time in float32, measured now."""
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
    """What every run does first: its device, asked for the same bits, and its number format.

    Raises:
        UserError: The machine has no such device.
    """
    device = pick_device(config.train.device)
    if config.train.deterministic:
        ask_for_same_bits(device)
    return with_number_format(config, device), device


def ask_for_same_bits(device: torch.device) -> None:
    """Have torch and cuBLAS choose kernels whose results repeat, in this process from here on.

    Flash attention's backward pass, above all, adds up in no fixed order unless it is asked to. A
    CPU's results repeat without being asked. Call it before the GPU is first used: cuBLAS reads its
    environment then.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Strict: flash attention ignores the mode that only warns.
    torch.use_deterministic_algorithms(True)
    # Torch would fill what it allocates with NaN, a debugging aid that costs a pass over it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
