"""The expert layer on a GPU, sparse: Triton kernels that read an expert's tokens where they are.

A tile is some tokens of one expert. Rows of x and of the output's gradient are gathered while they
are read, all elementwise work and the sums of surprise happen before a tile's results leave the
chip, and weights' gradients sum over an expert's own tokens. Where a token's experts are summed up
there are two ways, by what is faster: at half density the activations are laid out as all pairs of
token and expert, zeros included, so that one dense product does it (`dense_sums`); at low density
each pair gets a row of its own, and a token's rows are then summed.

Cost in floating-point operations, for R active pairs: 18 * R * I * D with rows, and with dense sums
12 * R * I * D + 6 * T * F * D. Memory kept for backward: x, the pre-activations (T * 2F with dense
sums, R * 2I with rows) and lists. With dense sums nothing waits for the device, so the layer can be
captured in a CUDA graph; with rows R must be known, and the device is asked unless the caller says.

No sum depends on the order in which programs run and no size is chosen at run time: results repeat
bit for bit. What it does not do: the kinds of surprise that need a Gram matrix (`input` and
`magnitude`), float64, activations other than `ACTIVATIONS`, and the gradient of an inactive
expert's weight, which is returned as 0.

Legend: T tokens, D hidden, E experts, I expert width, J = 2 * I gate and up rows, F = E * I
neurons, S slots of pairs, C chunks of columns.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn.ops.decode import triton_runs_on
from tiny_onn.ops.layout import joined_down
from tiny_onn.ops.lesson import KINDS, lesson
from tiny_onn.ops.precision import in_autocast_format, without_autocast
from tiny_onn.ops.router_gradient import SmkStep

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_EXPERTS = 128
# Share of active pairs from which one dense product sums faster than rows do, on an H100.
DENSE_SHARE = 0.3
# Widths of an expert's chunk of columns, as two powers of two.
_CHUNKS = ((128, 0), (64, 32), (64, 0), (32, 16), (32, 0), (16, 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One kernel's launch: its block sizes, warps and pipeline stages."""

    rows: int
    """Tokens, or features for weights' gradients."""
    depth: int
    """Of a step along the summed axis."""
    columns: int = 0
    """Features of an output tile of `project`; rows of `slope` that are in registers at once."""
    warps: int = 8
    stages: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """How the work is cut into programs; results differ by rounding only."""

    up: Tile = Tile(rows=128, depth=64, stages=4)
    slope: Tile = Tile(rows=64, depth=64, columns=32, warps=4)
    outer_gate_up: Tile = Tile(rows=128, depth=32, stages=4)
    outer_down: Tile = Tile(rows=128, depth=128, stages=2)
    project: Tile = Tile(rows=128, depth=32, columns=128, warps=4)


# Float32 products need twice the shared memory.
WIDE_TILES = Tiles(
    up=Tile(rows=64, depth=32),
    slope=Tile(rows=64, depth=32, columns=32),
    outer_gate_up=Tile(rows=64, depth=32),
    outer_down=Tile(rows=64, depth=32),
    project=Tile(rows=64, depth=32, columns=64),
)


def can_compute(
    x_TD: Float[Tensor, "tokens hidden"], num_experts: int, activation: str, smk: SmkStep | None
) -> bool:
    """Whether this path computes such a layer here: a GPU with triton, and what it knows."""
    return (
        x_TD.dtype in DTYPES
        and num_experts <= MAX_EXPERTS
        and activation in ACTIVATIONS
        and (smk is None or smk.rule.surprise in KINDS)
        and triton_runs_on(x_TD.device.type)
    )


def expert_layer(
    x_TD: Float[Tensor, "tokens hidden"],
    gate_up_EJD: Float[Tensor, "experts rows hidden"],
    down_EDI: Float[Tensor, "experts hidden width"],
    weights_TE: Float[Tensor, "tokens experts"],
    router_logits_TE: Float[Tensor, "tokens experts"],
    *,
    activation: str,
    active_TE: Bool[Tensor, "tokens experts"] | None = None,
    token_mask_T: Bool[Tensor, " tokens"] | None = None,
    lesson_T: Bool[Tensor, " tokens"] | None = None,
    smk: SmkStep | None = None,
    compiled: bool = False,
    num_pairs: int | None = None,
    dense_sums: bool | None = None,
    tiles: Tiles | None = None,
) -> Float[Tensor, "tokens hidden"]:
    """The layer's output, `y[t] = sum_e weights[t, e] * expert_e(x[t])` over the active experts.

    Arguments and gradients are those of `grouped.expert_layer`, and these:

    Args:
        x_TD: the layer's input, one of `DTYPES`.
        gate_up_EJD: an expert's gate rows, then its up rows.
        down_EDI: down projections.
        weights_TE: routing weights, 0 where inactive.
        router_logits_TE: the gate's float32 logits.
        activation: one of `ACTIVATIONS`.
        active_TE: active experts; None: where the weights are not 0.
        token_mask_T: tokens that count in SMK targets and statistics; None: all.
        lesson_T: where all experts are candidates, the tokens for which they are computed; the
            candidates of other tokens are their active experts. None: all tokens.
        smk: how the gate is taught; None: it is not.
        compiled: fuse the small operations of the lesson with torch.compile.
        num_pairs: the number of computed pairs, if the caller knows it; without it, the device is
            asked unless `dense_sums` is True.
        dense_sums: whether one dense product sums over experts; None: by `DENSE_SHARE`.
        tiles: how the work is cut; None: as measured.

    Raises:
        ValueError: an activation or a kind of surprise that these kernels do not know.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {ACTIVATIONS}")
    if smk is not None and smk.rule.surprise not in KINDS:
        raise ValueError(f"smk.rule.surprise: got {smk.rule.surprise!r}, expected one of {KINDS}")
    if active_TE is None:
        active_TE = weights_TE != 0
    if token_mask_T is None:
        token_mask_T = torch.ones(x_TD.shape[0], dtype=torch.bool, device=x_TD.device)
    listed_TE = active_TE
    if smk is not None and smk.rule.candidates == "all":
        if lesson_T is None:
            lesson_T = torch.ones_like(token_mask_T)
        listed_TE = active_TE | lesson_T[:, None]
    x_TD = in_autocast_format(x_TD)
    if dense_sums is None:
        num_pairs = int(listed_TE.sum()) if num_pairs is None else num_pairs
        dense_sums = num_pairs >= DENSE_SHARE * listed_TE.numel()
    if not dense_sums and num_pairs is None:
        num_pairs = int(listed_TE.sum())
    options = _Options(
        activation=activation,
        smk=smk,
        compiled=compiled,
        num_pairs=None if dense_sums else num_pairs,
        tiles=tiles or (WIDE_TILES if x_TD.dtype == torch.float32 else Tiles()),
    )
    return _Sparse.apply(
        x_TD,
        gate_up_EJD,
        down_EDI,
        weights_TE,
        router_logits_TE,
        active_TE,
        token_mask_T,
        lesson_T,
        listed_TE,
        options,
    )  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Options:
    activation: str
    smk: SmkStep | None
    compiled: bool
    num_pairs: int | None
    """None: sums are dense, every pair of token and expert has a slot."""
    tiles: Tiles


class Lists(NamedTuple):
    """Each expert's tokens; see `index_kernel`."""

    order_ET: Tensor
    num_E: Tensor
    starts_E: Tensor
    slots_TE: Tensor
    num_slots_T: Tensor


def list_tokens(listed_TE: Bool[Tensor, "tokens experts"], *, all_slots: bool) -> Lists:
    """The tokens of every expert, those that chose it first, without waiting for the device."""
    T, E = listed_TE.shape
    block = 256
    num_blocks = -(-T // block)
    listed = listed_TE.contiguous().view(torch.uint8)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=listed.device)

    counts_BE = empty(num_blocks, E)
    few = all_slots
    lists = Lists(empty(E, T), empty(E), empty(E), empty(*(0, 0) if few else (T, E)),
                  empty(0 if few else T))  # fmt: skip
    sizes: dict[str, Any] = {"E": E, "BLOCK_T": block, "BLOCK_E": _power_of_two(E)}
    kernels = _kernels()
    with torch.cuda.device_of(listed):
        kernels.count_kernel[num_blocks,](listed, counts_BE, T, **sizes)
        kernels.index_kernel[num_blocks,](
            listed, counts_BE, *lists, T, num_blocks, BLOCK_B=64, ALL=all_slots, **sizes
        )
    return lists


class _Launches:
    """The kernels on one layer's tensors."""

    def __init__(self, options: _Options, x_TD: Tensor, down_EDI: Tensor, lists: Lists) -> None:
        self.options, self.tiles, self.lists = options, options.tiles, lists
        self.T, self.D = x_TD.shape
        self.E, _, self.I = down_EDI.shape
        self.all_slots = options.num_pairs is None
        self.num_slots = self.T * self.E if options.num_pairs is None else options.num_pairs
        self.x_TD = x_TD
        self.lists = lists
        chunk = min(_CHUNKS, key=lambda chunk: -(-self.I // sum(chunk)) * sum(chunk))
        self.chunk = {"W0": chunk[0], "W1": chunk[1]}
        self.num_chunks = -(-self.I // sum(chunk))
        self.common: dict[str, Any] = {
            "ALL": self.all_slots,
            "PRECISION": "ieee" if x_TD.dtype == torch.float32 else "tf32",
        }

    def new(self, *shape: int) -> Tensor:
        return self.x_TD.new_empty(shape)

    def grid(self, tile: Tile) -> int:
        return self.E * -(-self.T // tile.rows)

    def up(self, gate_up_EJD: Tensor, weights_TE: Tensor) -> tuple[Tensor, Tensor]:
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
        """The gradient at the pre-activations, and the sums (3, T, E) of `Sums`."""
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
            W=_power_of_two(sum(self.chunk.values())),
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
        _kernels().outer_kernel[self.E * -(-self.D // tile.rows), num_chunks](
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
        """Each token's sum of its rows times their experts' weights."""
        N, tile = rows_SN.shape[1], self.tiles.project
        out_SD = self.new(self.num_slots, self.D)
        blocks = -(-self.D // tile.columns)
        _kernels().project_kernel[self.grid(tile) * blocks,](
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
        block = min(1024, _power_of_two(self.D))
        _kernels().reduce_kernel[self.T, -(-self.D // block)](
            out_SD,
            self.lists.slots_TE,
            self.lists.num_slots_T,
            out_TD,
            D=self.D,
            E=self.E,
            BLOCK_D=block,
        )
        return out_TD


class _Sparse(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(  # noqa: PLR0917 # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401 - torch names no type with these attributes
        x_TD: Tensor,
        gate_up_EJD: Tensor,
        down_EDI: Tensor,
        weights_TE: Tensor,
        router_logits_TE: Tensor,
        active_TE: Tensor,
        token_mask_T: Tensor,
        lesson_T: Tensor | None,
        listed_TE: Tensor,
        options: _Options,
    ) -> Tensor:
        x_TD, weights_TE = x_TD.contiguous(), weights_TE.contiguous()
        lists = list_tokens(listed_TE, all_slots=options.num_pairs is None)
        run = _Launches(options, x_TD, down_EDI, lists)
        with torch.cuda.device_of(x_TD):
            pre_SJ, hidden_SI = run.up(_cast(gate_up_EJD, x_TD), weights_TE)
            if run.all_slots:
                y_TD = hidden_SI.view(run.T, -1) @ joined_down(down_EDI, x_TD.dtype).T
            else:
                y_TD = run.sum_rows(hidden_SI, down_EDI.to(x_TD.dtype), "EDN")
        ctx.save_for_backward(
            x_TD,
            gate_up_EJD,
            down_EDI,
            weights_TE,
            router_logits_TE,
            active_TE,
            token_mask_T,
            lesson_T,
            pre_SJ,
            hidden_SI,
            *lists,
        )
        ctx.options = options
        return y_TD

    @staticmethod
    @without_autocast
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401 - torch names no type with these attributes
        grad_y_TD: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x_TD, gate_up, down, weights_TE, logits_TE, active_TE, token_mask_T, lesson_T, *saved = (
            ctx.saved_tensors
        )
        options: _Options = ctx.options
        pre_SJ, hidden_SI, *lists = saved
        grad_y_TD = grad_y_TD.contiguous()
        need_x, need_gate_up, need_down, need_weights, need_logits = ctx.needs_input_grad[:5]
        grad_x = grad_gate_up = grad_down = grad_weights = grad_logits = None
        run = _Launches(options, x_TD, down, Lists(*lists))
        with torch.cuda.device_of(x_TD):
            grad_pre_SJ, sums_3TE = run.slope(grad_y_TD, down.to(x_TD.dtype), weights_TE, pre_SJ)
            if need_x and run.all_slots:
                grad_x = grad_pre_SJ.view(run.T, -1) @ _cast(gate_up, x_TD).flatten(0, 1)
            elif need_x:
                grad_x = run.sum_rows(grad_pre_SJ, _cast(gate_up, x_TD), "END")
            if need_gate_up:
                tile, empty = run.tiles.outer_gate_up, torch.empty_like(gate_up)
                grad_gate_up = run.outer(grad_pre_SJ, x_TD, empty, "END", tile)
            if need_down:
                tile, empty = run.tiles.outer_down, torch.empty_like(down)
                grad_down = run.outer(hidden_SI, grad_y_TD, empty, "EDN", tile)
        if need_weights:
            grad_weights = torch.where(active_TE, sums_3TE[2], 0).to(weights_TE.dtype)
        if need_logits and options.smk is not None:
            routing = (weights_TE, logits_TE, active_TE, token_mask_T)
            grad_logits = lesson(
                options.smk, x_TD, grad_y_TD, sums_3TE, *routing, lesson_T, options.compiled
            )
        return grad_x, grad_gate_up, grad_down, grad_weights, grad_logits, *(None,) * 5


def _kernels() -> Any:  # noqa: ANN401 - a module of kernels
    """Their module: triton is imported by whoever launches one."""
    from tiny_onn.ops import sparse_kernels  # noqa: PLC0415

    return sparse_kernels


def _cast(weight: Tensor, like: Tensor) -> Tensor:
    return weight.to(like.dtype).contiguous()


def _strides(tensor: Tensor, axes: str) -> dict[str, int]:
    return {f"STRIDE_{axis}": tensor.stride(i) for i, axis in enumerate(axes)}


def _depth(tile: Tile, size: int) -> int:
    """The tile's depth, or less for a shorter sum; Triton's products need 16."""
    return max(16, min(tile.depth, _power_of_two(size)))


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
