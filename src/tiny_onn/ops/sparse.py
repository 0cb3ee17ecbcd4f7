"""The expert layer on a GPU, sparse: Triton kernels that read an expert's tokens where they are.

A tile is some tokens of one expert. Rows of x and of the output's gradient are gathered while they
are read, all elementwise work and the sums of surprise happen before a tile's results leave the
chip, and weights' gradients sum over an expert's own tokens. The sum over a token's experts is
computed in the faster of two ways: at half density the activations are laid out as all pairs of
token and expert, zeros included, so that one dense product does it (`dense_sums`); at low density
each pair gets a row of its own, and a token's rows are then summed.

Cost in floating-point operations, for R active pairs: 18 * R * I * D with rows, and with dense sums
12 * R * I * D + 6 * T * F * D. Memory kept for backward: x, the pre-activations (T * 2F with dense
sums, R * 2I with rows) and lists. With dense sums nothing waits for the device, so the layer can be
captured in a CUDA graph; with rows R must be known, and the device is asked unless the caller says.

No sum depends on the order in which programs run and no size is chosen at run time: results repeat
bit for bit. This path does not know the kinds of surprise that need a Gram matrix (`input` and
`magnitude`), float64, and activations other than `ACTIVATIONS`; the gradient of an inactive
expert's weight is returned as 0.

Legend: T tokens, D hidden, E experts, I expert width, J = 2 * I gate and up rows, F = E * I
neurons, S slots of pairs, C chunks of columns.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn.ops.decode import triton_runs_on
from tiny_onn.ops.layout import joined_down
from tiny_onn.ops.lesson import KINDS, lesson
from tiny_onn.ops.precision import in_autocast_format, without_autocast
from tiny_onn.ops.router_gradient import SmkStep, routing_masks
from tiny_onn.ops.sparse_launches import (
    WIDE_TILES,
    Launches,
    Lists,
    Options,
    Tiles,
    list_tokens,
)

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
DTYPES = (torch.float32, torch.bfloat16)
MAX_EXPERTS = 128
# From this share of active pairs on, one dense product sums faster than rows do, on an H100. It is
# interpolated between the kernels' times at the shares 4 / 32 and 16 / 32.
DENSE_SHARE = 0.17


def obstacle(device_type: str, dtype: torch.dtype, num_experts: int, activation: str) -> str | None:
    """Return why these kernels cannot compute a layer here; None if they can.

    Args:
        device_type: `cuda`, or `cpu`, where only Triton's interpreter runs.
        dtype: number format of the layer's input.
        num_experts: E.
        activation: its name, as in transformers' configurations.
    """
    if not triton_runs_on(device_type):
        return f"its kernels need a GPU and the package triton, and the device is {device_type}"
    if dtype not in DTYPES:
        return f"its kernels compute in float32 and bfloat16, and the layer's input is {dtype}"
    if num_experts > MAX_EXPERTS:
        return f"its kernels know at most {MAX_EXPERTS} experts, and there are {num_experts}"
    if activation not in ACTIVATIONS:
        return f"its kernels know the activations {', '.join(ACTIVATIONS)}, not {activation}"
    return None


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
    smk: SmkStep | None = None,
    compiled: bool = False,
    num_active: int | None = None,
    dense_sums: bool | None = None,
    tiles: Tiles | None = None,
) -> Float[Tensor, "tokens hidden"]:
    """Return the output, `y[t] = sum_e weights[t, e] * expert_e(x[t])` over the active experts.

    Its gradients are those of `grouped.expert_layer`.

    Args:
        x_TD: the layer's input, one of `DTYPES`.
        gate_up_EJD: an expert's gate rows, then its up rows.
        down_EDI: down projections.
        weights_TE: routing weights, 0 where inactive.
        router_logits_TE: the gate's float32 logits.
        activation: one of `ACTIVATIONS`.
        active_TE: active experts; None: where the weights are not 0.
        token_mask_T: tokens that count in SMK targets and statistics; None: all.
        smk: the instructions for the router's gradient; None: it gets none.
        compiled: whether torch.compile fuses the small operations of the router's gradient.
        num_active: the number of experts of each token, if all have as many; without it, the
            device is asked for the number of pairs unless `dense_sums` is True.
        dense_sums: whether one dense product sums over experts; None: `DENSE_SHARE` decides.
        tiles: the kernels' block sizes; None: the fastest ones as measured.

    Raises:
        ValueError: the device, the number format, the number of experts, the activation or the
            kind of surprise is none that these kernels know.
    """
    x_TD = in_autocast_format(x_TD)
    E = len(down_EDI)
    if (reason := obstacle(x_TD.device.type, x_TD.dtype, E, activation)) is not None:
        raise ValueError(f"the sparse path: {reason}; use another path")
    if smk is not None and smk.rule.surprise not in KINDS:
        raise ValueError(f"smk.rule.surprise: got {smk.rule.surprise!r}, expected one of {KINDS}")
    active_TE, token_mask_T = routing_masks(weights_TE, active_TE, token_mask_T)
    T = len(x_TD)
    num_taught: int | None = 0
    listed_TE, lesson_T = active_TE, None
    if smk is not None and smk.rule.candidates == "all":
        lesson_T, num_taught = smk.lesson_mask(T, x_TD.device), smk.num_lesson_tokens(T)
        if lesson_T is None:
            lesson_T = torch.ones_like(token_mask_T)
        listed_TE = active_TE | lesson_T[:, None]
    num_pairs = None
    if not dense_sums:
        if num_active is None or num_taught is None:
            num_pairs = int(listed_TE.sum())
        else:
            num_pairs = T * num_active + num_taught * (E - num_active)
        dense_sums = dense_sums is None and num_pairs >= DENSE_SHARE * T * E
    options = Options(
        activation=activation,
        smk=smk,
        compiled=compiled,
        num_pairs=None if dense_sums else num_pairs,
        tiles=tiles or (WIDE_TILES if x_TD.dtype == torch.float32 else Tiles()),
    )
    weights = (gate_up_EJD, down_EDI, weights_TE, router_logits_TE)
    masks = (active_TE, token_mask_T, lesson_T, listed_TE)
    return _Sparse.apply(x_TD, *weights, *masks, options)  # pyright: ignore[reportReturnType]


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
        options: Options,
    ) -> Tensor:
        x_TD, weights_TE = x_TD.contiguous(), weights_TE.contiguous()
        lists = list_tokens(listed_TE, all_slots=options.num_pairs is None)
        run = Launches(options, x_TD, down_EDI, lists)
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
        options: Options = ctx.options
        pre_SJ, hidden_SI, *lists = saved
        grad_y_TD = grad_y_TD.contiguous()
        need_x, need_gate_up, need_down, need_weights, need_logits = ctx.needs_input_grad[:5]
        grad_x = grad_gate_up = grad_down = grad_weights = grad_logits = None
        run = Launches(options, x_TD, down, Lists(*lists))
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


def _cast(weight: Tensor, like: Tensor) -> Tensor:
    return weight.to(like.dtype).contiguous()
