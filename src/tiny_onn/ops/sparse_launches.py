"""The launches of the sparse expert layer's kernels: block sizes, lists of tokens, tables.

Legend: T tokens, D hidden, E experts, I expert width, J = 2 * I gate and up rows, S slots of pairs,
N columns of rows, C chunks of columns.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from tiny_onn.ops.block_sizes import power_of_two
from tiny_onn.ops.router_gradient import SmkStep

# An expert's chunk of columns may have these widths, each the sum of two powers of two or 0.
_CHUNKS = ((128, 0), (64, 32), (64, 0), (32, 16), (32, 0), (16, 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """The block sizes, warps and pipeline stages of one kernel's launch."""

    rows: int
    """Tokens of a program, or features for weights' gradients."""
    depth: int
    """Size of a step along the summed axis."""
    columns: int = 0
    """Features of an output tile of `project`; rows of `slope` that are in registers at once."""
    warps: int = 8
    stages: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """The launches of all kernels; results differ by rounding only."""

    up: Tile = Tile(rows=128, depth=64, stages=4)
    slope: Tile = Tile(rows=64, depth=64, columns=32, warps=4)
    outer_gate_up: Tile = Tile(rows=128, depth=32, stages=4)
    outer_down: Tile = Tile(rows=128, depth=128, stages=2)
    project: Tile = Tile(rows=128, depth=32, columns=128, warps=4)


# Float32 products need twice the shared memory, so their tiles are smaller.
WIDE_TILES = Tiles(
    up=Tile(rows=64, depth=32),
    slope=Tile(rows=64, depth=32, columns=32),
    outer_gate_up=Tile(rows=64, depth=32),
    outer_down=Tile(rows=64, depth=32),
    project=Tile(rows=64, depth=32, columns=64),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The options of a layer's call, from its forward pass to its backward pass."""

    activation: str
    smk: SmkStep | None
    compiled: bool
    num_pairs: int | None
    """Number of computed pairs; None: sums are dense, and every pair of token and expert has a
    slot."""
    tiles: Tiles


class Lists(NamedTuple):
    """Each expert's tokens; see `index_kernel`."""

    order_ET: Tensor
    num_E: Tensor
    starts_E: Tensor
    slots_TE: Tensor
    num_slots_T: Tensor


def list_tokens(listed_TE: Bool[Tensor, "tokens experts"], *, all_slots: bool) -> Lists:
    """List every expert's tokens, first those that chose it, without waiting for the device."""
    T, E = listed_TE.shape
    block = 256
    num_blocks = -(-T // block)
    listed = listed_TE.contiguous().view(torch.uint8)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=listed.device)

    counts_BE = empty(num_blocks, E)
    by_token = (empty(0, 0), empty(0)) if all_slots else (empty(T, E), empty(T))
    lists = Lists(empty(E, T), empty(E), empty(E), *by_token)
    sizes: dict[str, Any] = {"E": E, "BLOCK_T": block, "BLOCK_E": power_of_two(E)}
    kernels = _kernels("row_kernels")
    with torch.cuda.device_of(listed):
        kernels.count_kernel[num_blocks,](listed, counts_BE, T, **sizes)
        kernels.index_kernel[num_blocks,](
            listed, counts_BE, *lists, T, num_blocks, BLOCK_B=64, ALL=all_slots, **sizes
        )
    return lists


class Launches:
    """The kernels on one layer's tensors."""

    def __init__(self, options: Options, x_TD: Tensor, down_EDI: Tensor, lists: Lists) -> None:
        self.options, self.tiles, self.lists = options, options.tiles, lists
        self.T, self.D = x_TD.shape
        self.E, _, self.I = down_EDI.shape
        self.all_slots = options.num_pairs is None
        self.num_slots = self.T * self.E if options.num_pairs is None else options.num_pairs
        self.x_TD = x_TD
        # Where one step covers the sum over D, both products of a chunk of two parts would stand
        # outside of a loop, and ptxas 12.8 then makes the second one read at a wrong address.
        one_step = max(options.tiles.up.depth, options.tiles.slope.depth) >= self.D
        chunks = [chunk for chunk in _CHUNKS if not (one_step and chunk[1])]
        chunk = min(chunks, key=lambda chunk: -(-self.I // sum(chunk)) * sum(chunk))
        self.chunk = {"W0": chunk[0], "W1": chunk[1]}
        self.num_chunks = -(-self.I // sum(chunk))
        self.common: dict[str, Any] = {
            "ALL": self.all_slots,
            "PRECISION": "ieee" if x_TD.dtype == torch.float32 else "tf32",
        }

    def new(self, *shape: int) -> Tensor:
        """Return an empty table in the input's number format."""
        return self.x_TD.new_empty(shape)

    def grid(self, tile: Tile) -> int:
        """Return the number of tiles of all experts; programs without tokens end at once."""
        return self.E * -(-self.T // tile.rows)

    def up(self, gate_up_EJD: Tensor, weights_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Compute pre-activations (S, J) and routed hidden activations (S, I)."""
        pre_SJ = self.new(self.num_slots, 2 * self.I)
        hidden_SI = self.new(self.num_slots, self.I)
        tile = self.tiles.up
        _kernels().up_kernel[self.grid(tile), self.num_chunks](
            self.x_TD,
            gate_up_EJD,
            weights_TE,
            *self.lists[:3],
            pre_SJ,
            hidden_SI,
            self.T,
            D=self.D,
            E=self.E,
            I=self.I,
            BLOCK_M=tile.rows,
            BLOCK_K=_depth(tile, self.D),
            ACTIVATION=self.options.activation,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **self.chunk,
            **self.common,
        )
        return pre_SJ, hidden_SI

    def slope(
        self, grad_y_TD: Tensor, down_EDI: Tensor, weights_TE: Tensor, pre_SJ: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradient at the pre-activations and (3, T, E) sums for `SurpriseTerms`."""
        grad_pre_SJ, tile = torch.empty_like(pre_SJ), self.tiles.slope
        shape = (self.num_chunks, 3, self.E, self.T)
        new = weights_TE.new_empty if self.all_slots else weights_TE.new_zeros
        sums_C3ET = new(shape, dtype=torch.float32)
        _kernels().slope_kernel[self.grid(tile), self.num_chunks](
            grad_y_TD,
            down_EDI,
            weights_TE,
            *self.lists[:3],
            pre_SJ,
            grad_pre_SJ,
            sums_C3ET,
            self.T,
            D=self.D,
            E=self.E,
            I=self.I,
            **_strides(down_EDI, "EDI"),
            BLOCK_M=tile.rows,
            BLOCK_K=_depth(tile, self.D),
            BLOCK_R=min(tile.columns, tile.rows),
            W=power_of_two(sum(self.chunk.values())),
            ACTIVATION=self.options.activation,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **self.chunk,
            **self.common,
        )
        sums_3ET = sums_C3ET[0] if self.num_chunks == 1 else sums_C3ET.sum(0)
        return grad_pre_SJ, sums_3ET.mT

    def outer(self, rows_SN: Tensor, x_TD: Tensor, grad: Tensor, axes: str, tile: Tile) -> Tensor:
        """Fill the weight's gradient, whose axes are named: E, N (columns of the rows) and D."""
        N = rows_SN.shape[1]
        chunk = self.chunk
        if N == 2 * self.I:
            chunk = {name: 2 * width for name, width in chunk.items()}
        num_chunks = -(-N // sum(chunk.values()))
        _kernels("row_kernels").outer_kernel[self.E * -(-self.D // tile.rows), num_chunks](
            rows_SN,
            x_TD,
            *self.lists[:3],
            grad,
            self.T,
            D=self.D,
            E=self.E,
            N=N,
            **_strides(grad, axes),
            BLOCK_D=tile.rows,
            BLOCK_K=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **chunk,
            **self.common,
        )
        return grad

    def sum_rows(self, rows_SN: Tensor, weight: Tensor, axes: str) -> Tensor:
        """Return each token's sum of its rows, each times its expert's weight."""
        N, tile = rows_SN.shape[1], self.tiles.project
        out_SD = self.new(self.num_slots, self.D)
        blocks = -(-self.D // tile.columns)
        _kernels("row_kernels").project_kernel[self.grid(tile) * blocks,](
            rows_SN,
            weight,
            self.lists.num_E,
            self.lists.starts_E,
            out_SD,
            self.T,
            D=self.D,
            E=self.E,
            N=N,
            **_strides(weight, axes),
            BLOCK_M=tile.rows,
            BLOCK_D=tile.columns,
            BLOCK_K=_depth(tile, N),
            PRECISION=self.common["PRECISION"],
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        out_TD = self.new(self.T, self.D)
        block = min(1024, power_of_two(self.D))
        _kernels("row_kernels").reduce_kernel[self.T, -(-self.D // block)](
            out_SD,
            self.lists.slots_TE,
            self.lists.num_slots_T,
            out_TD,
            D=self.D,
            E=self.E,
            BLOCK_D=block,
        )
        return out_TD


def _kernels(name: str = "sparse_kernels") -> Any:  # noqa: ANN401 - a module of kernels
    """Return a module of kernels, importing it (and triton) at the first launch."""
    return import_module(f"tiny_onn.ops.{name}")


def _strides(tensor: Tensor, axes: str) -> dict[str, int]:
    return {f"STRIDE_{axis}": tensor.stride(i) for i, axis in enumerate(axes)}


def _depth(tile: Tile, size: int) -> int:
    """Return the tile's depth, less for a shorter sum, and at least 16, as Triton needs."""
    return max(16, min(tile.depth, power_of_two(size)))
