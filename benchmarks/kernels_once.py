"""Every hand-written Triton kernel once, at awkward shapes, for compute-sanitizer.

    seq 0 10 | xargs -P 10 -n 1 python -m benchmarks.kernels_once
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        python -m benchmarks.kernels_once

The first command runs all layers in as many processes, which compile the kernels into Triton's
cache; the second finds them there. `--tool racecheck` is called alike. Sizes are no multiples of
the tiles, one expert has no token, and one has all; with the variable each tensor has an allocation
of its own, so that memcheck sees an access past its end. Every result is compared with the formula
in float64. Prints the kernels that ran, and exits with 1 if a kernel of `tiny_onn.ops` did not. On
a CPU it runs in Triton's interpreter (TRITON_INTERPRET=1), whose bfloat16 is wrong, so that there
all tensors are float32.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import check, relative_gap, seeded
from tiny_onn.config.schema import Weighting
from tiny_onn.ops import decode, dense_masked, sparse
from tiny_onn.ops.router_gradient import SmkStep
from tiny_onn.ops.surprise import SmkRule

MODULES = ("decode_kernels", "lesson_kernels", "row_kernels", "sparse_kernels")
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = torch.bfloat16 if DEVICE == "cuda" else torch.float32
CARD = SmkRule(surprise="parameters", direction="min", candidates="active")
DEFAULT = SmkRule(surprise="gain", direction="max", candidates="all")


class Case(NamedTuple):
    """A sparse layer's sizes (T, E, I, D), number format, rule and way to sum."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    rule: SmkRule
    dense_sums: bool


# Several blocks of tokens; widths of one, two and several chunks; a depth that no step divides.
SPARSE = (
    Case((300, 5, 96, 40), BF16, DEFAULT, dense_sums=True),
    Case((300, 5, 96, 40), BF16, replace(CARD, surprise="relative"), dense_sums=False),
    Case((130, 4, 96, 64), BF16, CARD, dense_sums=True),
    Case((130, 4, 96, 200), BF16, CARD, dense_sums=True),
    Case((65, 33, 48, 16), BF16, replace(DEFAULT, lesson_share=1 / 8), dense_sums=False),
    Case((37, 3, 20, 33), torch.float32, CARD, dense_sums=True),
    Case((20, 3, 200, 24), torch.float32, replace(CARD, surprise="output"), dense_sums=False),
    Case((1, 3, 1, 17), torch.float32, DEFAULT, dense_sums=False),
)
# Sizes (T, E, I, D) of a decoded layer, its format, and how it selects: the numbers of routed
# (0: by threshold) and of shared experts, and the weighting.
Decoded = tuple[tuple[int, int, int, int], torch.dtype, tuple[int, int, Weighting]]
DECODED: tuple[Decoded, ...] = (
    ((1, 5, 12, 40), BF16, (2, 0, "softmax")),
    ((3, 33, 20, 1056), torch.float32, (1, 1, "sigmoid")),
    ((16, 3, 7, 17), BF16, (0, 0, "mean")),
)
# A program per token and block of neurons, and one per block for all tokens.
WAYS = (decode.KernelBlocks(tile_tokens=17), decode.KernelBlocks(tile_tokens=1))


class Counted:
    """A kernel that notes that it was launched."""

    def __init__(self, kernel: Any, name: str, launched: set[str]) -> None:
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        """The launch on a grid."""
        self.launched.add(self.name)
        return self.kernel[grid]


def kernels_of(module: ModuleType) -> dict[str, Any]:
    """The kernels that a module defines: its compiled functions that the host launches."""
    return {
        name: value
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "fn")
    }


@contextmanager
def counted() -> Iterator[tuple[set[str], set[str]]]:
    """Note launches within the context; the names of all kernels, and of those launched."""
    modules = [import_module(f"tiny_onn.ops.{name}") for name in MODULES]
    found = [(module, name, kernel) for module in modules
             for name, kernel in kernels_of(module).items()]  # fmt: skip
    launched: set[str] = set()
    for module, name, kernel in found:
        setattr(module, name, Counted(kernel, name, launched))
    try:
        yield {name for _, name, _ in found}, launched
    finally:
        for module, name, kernel in found:
            setattr(module, name, kernel)


def tensors(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Input, both weights, routing weights and logits; expert 1 has no token, expert 2 has all."""
    T, E, I, D = shape
    weights = torch.rand(T, E) + 0.1
    active = torch.rand(T, E) < 0.5
    active[:, 1], active[:, 2] = False, True
    sized = (torch.randn(T, D), torch.randn(E, 2 * I, D) / D**0.5,
             torch.randn(E, D, I) / (E * I) ** 0.5)  # fmt: skip
    return [*(t.to(DEVICE, dtype) for t in sized), (weights * active).to(DEVICE),
            torch.randn(T, E).to(DEVICE)]  # fmt: skip


def train_once(case: Case) -> None:
    """One forward and backward pass of the sparse layer against the formula in float64.

    Raises:
        SystemExit: an output or gradient is off.
    """
    leaves = [t.requires_grad_() for t in tensors(case.shape, case.dtype)]
    T = case.shape[0]
    grad_y = torch.randn(T, case.shape[3]).to(DEVICE, case.dtype)
    active = leaves[3].detach() != 0
    smk = SmkStep(rule=case.rule, grad_scale=1 / T, loss_scale=float(T))
    y = sparse.expert_layer(
        *leaves, activation="silu", active_TE=active, smk=smk, dense_sums=case.dense_sums
    )
    got = [y, *torch.autograd.grad(y, leaves, grad_y)]
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    y = dense_masked.expert_layer(*exact, activation=F.silu, active_TE=active.cpu(), smk=smk)
    right = [y, *torch.autograd.grad(y, exact, grad_y.cpu().double())]
    # The paths differ in what they return for the weights of inactive experts; targets of the gate
    # tie within bfloat16's rounding, so that its gradient is only looked at in float32.
    right[4] = right[4] * active.cpu()
    for number, (g, e) in enumerate(zip(got, right, strict=True)):
        limit = LIMITS[case.dtype] if number < 5 or case.dtype == torch.float32 else 1.0
        check(f"{case}, result {number}", relative_gap(g, e), limit)


@torch.no_grad()
def decode_once(case: Decoded) -> None:
    """The decoding kernels with a routing that is given and with their own, against the formula.

    Raises:
        SystemExit: an output is off.
    """
    shape, dtype, (num_active, num_shared, weighting) = case
    _, E, _, D = shape
    x, gate_up, down, weights, _ = tensors(shape, dtype)
    scale, means = torch.rand(E).to(DEVICE), torch.randn(E, D).to(DEVICE, dtype)
    # Stored neuron after neuron, as banks store them.
    down = down.mT.contiguous().mT
    active = weights != 0
    given = defined(x, gate_up, down, weights * scale)
    given += (~active).double().cpu() @ means.double().cpu()
    gate = decode.Gate(
        (torch.randn(E, D) / D**0.5).to(DEVICE, dtype), torch.randn(E).to(DEVICE, dtype),
        torch.zeros(E, device=DEVICE), torch.full((), 0.1, device=DEVICE),
    )  # fmt: skip
    rule = decode.Selecting(
        num_active=num_active, num_shared=num_shared, weighting=weighting, tie_break=1e-6
    )
    for blocks in WAYS:
        y = decode.expert_layer(
            x, gate_up, down, weights, active, activation="silu", expert_scale_E=scale,
            mean_outputs_ED=means, blocks=blocks,
        )  # fmt: skip
        check(f"decode, {case}, {blocks}, given", relative_gap(y, given), LIMITS[dtype])
        done = decode.routed_expert_layer(
            x, gate_up, down, gate, rule=rule, activation="gelu", blocks=blocks
        )
        routed = defined(x, gate_up, down, done.weights_TE * done.active_TE, F.gelu)
        check(f"decode, {case}, {blocks}, routed", relative_gap(done.y_TD, routed), LIMITS[dtype])


def defined(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, activation: Any = F.silu
) -> Tensor:
    """The layer's output by the formula, in float64 on the CPU."""
    x, gate_up, down, weights = (t.double().cpu() for t in (x, gate_up, down, weights))
    gate, up = torch.einsum("td,ejd->tej", x, gate_up).chunk(2, dim=-1)
    return torch.einsum("tei,edi->td", activation(gate) * up * weights[..., None], down)


def main(numbers: Sequence[str] = ()) -> int:
    """Run the layers of these numbers, or all; 1 if all ran and a kernel was left out."""
    layers: list[tuple[Callable[[Any], None], Any]] = [(train_once, case) for case in SPARSE]
    layers += [(decode_once, case) for case in DECODED]
    with seeded(0), counted() as (known, launched):
        for number in map(int, numbers or range(len(layers))):
            once, layer = layers[number]
            once(layer)
    print(f"ran: {', '.join(sorted(launched))}")
    missing = set() if numbers else known - launched
    if missing:
        print(f"did not run: {', '.join(sorted(missing))}")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
