"""Expert weights that are held in 4 or 8 bits and dequantised where a layer computes with them.

transformers' loaders quantise linear layers and leave stacked tensors alone. bitsandbytes has
`nn.parametrize.replace_parameter_4bit` for these. On a CPU its version 0.50 gives wrong scales,
without an error, to a weight whose rows are no whole number of blocks, such as `down_proj` in
SmolLM2-135M (rows of 48 numbers). So the experts are quantised here by the functions beneath it,
each expert as one row. They are attached by torch's parametrisations as there: reading
`experts.gate_up_proj` dequantises it, and nothing keeps what was read.

Legend: E experts, U experts that are read, N numbers of an expert, M rows and K columns of an
expert's weight, B blocks of an expert.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from tiny_onn.device import load_bitsandbytes
from tiny_onn.errors import UserError
from tiny_onn.model.expert_weights import KINDS, Experts

StoredAs = Literal["nf4", "fp4", "int8"]
QuantizeTo = StoredAs | Literal["none"]
"""The choice of a number format; `none` leaves experts as they are loaded."""
BLOCK_SIZE = 64


class Quantized(nn.Module):
    """A parametrisation that turns stored integers and their scales into a stacked weight.

    The integers are (E, bytes), an expert in a row.

    Args:
        scale: the scales of all experts, float32, (E, ...).
        shape: the weight's shape.
        transposed: whether the weight lies in memory column by column.
        dtype: the number format of the dequantised weight.
    """

    scale: Tensor

    def __init__(
        self, scale: Tensor, shape: torch.Size, transposed: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.register_buffer("scale", scale, persistent=False)
        self.shape, self.transposed, self.dtype = shape, transposed, dtype

    def forward(self, stored: Tensor) -> Float[Tensor, "experts rows columns"]:
        """Return the weight of all experts."""
        return self._weight(stored, self.scale)

    def of(
        self, stored: Tensor, used_U: Int[Tensor, " used"]
    ) -> Float[Tensor, "used rows columns"]:
        """Return the weights of some experts; those of the others are not dequantised."""
        return self._weight(stored.index_select(0, used_U), self.scale.index_select(0, used_U))

    def _weight(self, stored: UInt8[Tensor, "used bytes"], scale: Tensor) -> Tensor:
        _, M, K = self.shape
        numbers = self._dequantize(stored, scale)
        return numbers.view(-1, K, M).mT if self.transposed else numbers.view(-1, M, K)

    @abstractmethod
    def _dequantize(self, stored: UInt8[Tensor, "used bytes"], scale: Tensor) -> Tensor:
        """Return the numbers in the order in which they lie in memory."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Quantized":
        # A cast of the model is one of the dequantised weights; the scales stay as they are.
        probe = fn(self.scale.new_empty(0, dtype=self.dtype))
        self.dtype, self.scale = probe.dtype, self.scale.to(probe.device)
        return self


class FourBit(Quantized):
    """The 4-bit formats of bitsandbytes: 16 levels times the largest magnitude of 64 numbers."""

    def __init__(self, quant_type: str, *args: Any) -> None:  # noqa: ANN401 - of `Quantized`
        super().__init__(*args)
        self.quant_type = quant_type

    def _dequantize(self, stored: UInt8[Tensor, "used bytes"], scale: Tensor) -> Tensor:
        # The import stands here because bitsandbytes is an extra.
        from bitsandbytes.functional import QuantState, dequantize_4bit  # noqa: PLC0415

        U, half = stored.shape
        state = QuantState(
            absmax=scale.view(-1),
            shape=torch.Size((U, 2 * half)),
            dtype=self.dtype,
            blocksize=BLOCK_SIZE,
            quant_type=self.quant_type,
        )
        return dequantize_4bit(stored.view(-1, 1), state)


class Int8PerRow(Quantized):
    """Symmetric 8-bit integers, a scale for each row of an expert's weight: its maximum / 127.

    The dequantised weight is `integer * scale` in float32, rounded to the number format.
    """

    def _dequantize(self, stored: UInt8[Tensor, "used bytes"], scale: Tensor) -> Tensor:
        _, M, K = self.shape
        shape = (-1, K, M) if self.transposed else (-1, M, K)
        return stored.view(torch.int8).view(shape).float().mul_(scale).to(self.dtype)


@torch.no_grad()
def quantize_experts(
    student: PreTrainedModel, stored_as: StoredAs, skipped: Sequence[str] = ()
) -> None:
    """Quantise the experts of every layer in place, one weight after the other.

    `gate_up_proj` and `down_proj` become frozen integers, and dequantise to the backbone's number
    format. A CPU dequantises the experts that a text activates, a GPU all of a layer.

    Args:
        student: the student.
        stored_as: `nf4` or `fp4`: 4 bits and a scale for 64 numbers. `int8`: 8 bits and a scale
            for each row of an expert's weight.
        skipped: names of modules that stay, as in `BitsAndBytesConfig.llm_int8_skip_modules`.

    Raises:
        UserError: the experts are quantised already or not on a device, bitsandbytes is not
            installed, or an expert's weight is no whole number of blocks. No weight is changed.
    """
    modules = [
        module
        for name, module in student.named_modules()
        if isinstance(module, Experts) and should_convert_module(name, [*skipped])
    ]
    refuse_quantized(modules, f'quantize_experts("{stored_as}")', "load the student anew")
    sizes = {weight[0].numel() for experts in modules for weight in experts.parameters()}
    if any(weight.is_meta for experts in modules for weight in experts.parameters()):
        raise UserError(
            f'quantize_experts("{stored_as}"): got experts that are offloaded, expected them in'
            " memory; leave device_map out, or give one without cpu and disk"
        )
    if stored_as != "int8":
        load_bitsandbytes(f"experts in {stored_as}")
        if any(size % BLOCK_SIZE for size in sizes):
            raise UserError(
                f"experts in {stored_as}: got weights of {' and '.join(map(str, sorted(sizes)))}"
                f" numbers an expert, expected multiples of {BLOCK_SIZE}, the block that shares a"
                " scale; use int8"
            )
    for experts in modules:
        experts.store_for_generation()
        for kind in KINDS:
            _quantize(experts, kind, stored_as, student.dtype)
        experts.stored_as = stored_as


def _quantize(experts: Experts, kind: str, stored_as: StoredAs, dtype: torch.dtype) -> None:
    weight_EMK = experts.get_parameter(kind).data
    E, shape = len(weight_EMK), weight_EMK.shape
    if stored_as == "int8":
        stored, scale = int8_per_row(weight_EMK)
        # The integers lie in memory as the weight did, which generation reads fastest.
        transposed = not weight_EMK.is_contiguous()
        if transposed:
            stored, scale = stored.mT, scale.mT
        stored = stored.reshape(E, -1).view(torch.uint8)
        back: Quantized = Int8PerRow(scale.contiguous(), shape, transposed, dtype)
    else:
        from bitsandbytes.functional import quantize_4bit  # noqa: PLC0415

        # Blocks run along rows on every device, so that one student has one result.
        numbers_EN = weight_EMK.reshape(E, -1)
        options = {"blocksize": BLOCK_SIZE, "quant_type": stored_as}
        packed, state = quantize_4bit(numbers_EN, **options)
        stored = packed.view(E, -1)
        back = FourBit(stored_as, state.absmax.view(E, -1), shape, False, dtype)
    setattr(experts, kind, nn.Parameter(stored.contiguous(), requires_grad=False))
    parametrize.register_parametrization(experts, kind, back, unsafe=True)


def int8_per_row(
    weight_EMK: Float[Tensor, "experts rows columns"],
) -> tuple[Int8[Tensor, "experts rows columns"], Float[Tensor, "experts rows 1"]]:
    """Return `round(weight / scale)` and the scales: the rows' largest magnitudes / 127.

    A row of zeros has scale 0.
    """
    scale_EM1 = weight_EMK.float().abs().amax(-1, keepdim=True) / 127
    divisor_EM1 = scale_EM1.where(scale_EM1 > 0, 1)
    return (weight_EMK / divisor_EM1).round_().clamp_(-127, 127).to(torch.int8), scale_EM1


def stored_bytes(student: nn.Module) -> int:
    """Return the bytes that the experts' weights take, with the scales of quantised ones."""
    modules = [module for module in student.modules() if isinstance(module, Experts)]
    tensors = [t for experts in modules for t in (*experts.parameters(), *experts.buffers())]
    return sum(tensor.nbytes for tensor in tensors)


def asked_by(settings: object) -> tuple[StoredAs, list[str]] | None:
    """Return how a transformers quantisation config stores experts, and what it skips.

    Returns:
        None if the config is not that of bitsandbytes: another one leaves the experts as they are.
    """
    if not isinstance(settings, BitsAndBytesConfig):
        return None
    skipped = settings.llm_int8_skip_modules or []
    if settings.load_in_8bit:
        return "int8", skipped
    return ("nf4" if settings.bnb_4bit_quant_type == "nf4" else "fp4"), skipped


def refuse_quantized(modules: Sequence[nn.Module], what: str, remedy: str) -> None:
    """Refuse to do something with experts that are quantised.

    Args:
        modules: the layers' `experts`, or modules that hold them.
        what: the method that was called.
        remedy: the advice at the end of the message.

    Raises:
        UserError: there are quantised experts.
    """
    parts = (part for module in modules for part in module.modules())
    found = {part.stored_as for part in parts if isinstance(part, Experts)} - {None}
    if found:
        raise UserError(
            f"{what}: got experts that are held in {', '.join(sorted(map(str, found)))}, expected"
            f" ones that are not quantised; {remedy}"
        )
