"""The names of devices that `plan` knows, which can be checked before torch is loaded."""

import tomllib
from importlib.resources import files
from typing import Any

from tiny_onn.errors import UserError

# A plan measures these on the machine, or asks the machine which they are.
MEASURED = ("auto", "cpu")


def device_rows() -> dict[str, dict[str, Any]]:
    """Return the memory and the rates of each GPU in `devices.toml`, by the GPU's name."""
    return tomllib.loads((files("tiny_onn.planning") / "devices.toml").read_text("utf-8"))


def check_device_name(text: str) -> None:
    """Refuse a text that names no device.

    Raises:
        UserError: the text is neither `auto`, `cpu`, a GPU of `devices.toml` nor three numbers.
    """
    if text.strip().lower() not in MEASURED and gpu_name(text) is None:
        gpu_numbers(text)


def gpu_name(text: str) -> str | None:
    """Return the name in `devices.toml` that a user means, or None if there is no such name."""
    wanted = text.strip().lower()
    for name in device_rows():
        lower = name.lower()
        if wanted in (lower, lower.replace("rtx ", ""), lower.replace(" ", "")):
            return name
    return None


def gpu_numbers(text: str) -> tuple[float, float, float]:
    """Return a GPU's memory in GiB, its TFLOP/s and its GB/s from `MEMORY_GIB,TFLOPS,GB_PER_S`.

    Raises:
        UserError: the text is not three numbers above 0.
    """
    if text.count(",") != 2:
        raise UserError(
            f"--device: got {text}, expected auto, cpu, {', '.join(device_rows())}, or three"
            " numbers MEMORY_GIB,TFLOPS,GB_PER_S; for example --device 48,91,864"
        )
    try:
        memory_gib, tflops, bandwidth = (float(part) for part in text.split(","))
    except ValueError:
        memory_gib = tflops = bandwidth = 0.0
    if not all(0 < number < 1e6 for number in (memory_gib, tflops, bandwidth)):
        raise UserError(
            f"--device: got {text}, expected three numbers > 0, MEMORY_GIB,TFLOPS,GB_PER_S; for "
            "example --device 48,91,864"
        )
    return memory_gib, tflops, bandwidth
