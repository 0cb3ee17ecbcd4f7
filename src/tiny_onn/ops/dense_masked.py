"""The expert layer, dense and masked: it computes every expert on every token.

The routing weight is applied between the two matrix products of the forward pass. At half density
with narrow experts, gathering tokens costs more than it saves, so training runs two large matrix
products and one elementwise region each way. The backward pass has everything at hand that surprise
is made of, so the same `autograd.Function` returns the gradient of the SMK loss as the gradient of
the router's logits: both systems learn in one backward pass, and checkpointing, accumulation and
data parallelism meet an ordinary gradient.

Cost: forward and backward pass together take 9 * T * F * D multiply-adds, as in a dense MLP: 3 in
the forward pass (gate, up and down), 6 in the backward pass. Memory kept for backward: x and the
(T, 2F) pre-activations. With chunks of C tokens only x is kept: the working set is that of C
tokens, and the backward pass computes the pre-activations again (11 * T * F * D in all).

Legend: T tokens, D hidden, E experts, I expert width, J = 2 * I gate and up rows,
F = E * I neurons.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn.config.schema import Surprise
from tiny_onn.ops.layout import ExpertWeights, joined_down, parted_down
from tiny_onn.ops.precision import in_autocast_format, without_autocast
from tiny_onn.ops.regions import (
    Activation,
    NeuronState,
    gradient_region,
    gram_coefficients,
    hidden_region,
    region_of,
    to_math_dtype,
)
from tiny_onn.ops.router_gradient import (
    GRAM_KINDS,
    RoutingTables,
    SmkStep,
    SurpriseTerms,
    closed_form_surprise,
    router_gradient,
    routing_masks,
    squared_norms,
)


def expert_layer(
    x_TD: Float[Tensor, "tokens hidden"],
    gate_up_EJD: Float[Tensor, "experts rows hidden"],
    down_EDI: Float[Tensor, "experts hidden width"],
    weights_TE: Float[Tensor, "tokens experts"],
    router_logits_TE: Float[Tensor, "tokens experts"],
    *,
    activation: Activation,
    active_TE: Bool[Tensor, "tokens experts"] | None = None,
    token_mask_T: Bool[Tensor, " tokens"] | None = None,
    smk: SmkStep | None = None,
    compiled: bool = False,
    chunk_tokens: int = 0,
) -> Float[Tensor, "tokens hidden"]:
    """Return the layer's output, `y[t] = sum_e weights[t, e] * expert_e(x[t])`.

    `reference.expert_layer` defines it. The gradients of x, of the experts and of the routing
    weights (inactive ones too) are those of the loss. The gradient of `router_logits_TE` is that of
    the SMK loss when `smk` is given, and None otherwise.

    Args:
        x_TD: the layer's input, in the compute format; under autocast it is cast to autocast's.
        gate_up_EJD: an expert's gate rows, then its up rows, any format; cast to x's.
        down_EDI: down projections, any format; cast to x's.
        weights_TE: routing weights, 0 where inactive.
        router_logits_TE: the gate's float32 logits.
        activation: the experts' activation, an elementwise function.
        active_TE: active experts, the candidates of SMK; None: where the weights are not 0.
        token_mask_T: tokens that count in SMK targets and statistics; None: all.
        smk: the instructions for the router's gradient; None: it gets none.
        compiled: whether torch.compile fuses the elementwise regions.
        chunk_tokens: number of tokens that both passes process at once; 0: all. With several chunks
            the experts' gradients are summed in float32.
    """
    active_TE, token_mask_T = routing_masks(weights_TE, active_TE, token_mask_T)
    options = _Options(activation, smk, compiled, chunk_tokens)
    return _DenseMasked.apply(
        in_autocast_format(x_TD),
        gate_up_EJD,
        down_EDI,
        weights_TE,
        router_logits_TE,
        active_TE,
        token_mask_T,
        options,
    )  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, slots=True)
class _Options:
    activation: Activation
    smk: SmkStep | None
    compiled: bool
    chunk_tokens: int

    def region(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return region_of(function, compiled=self.compiled)

    def chunks(self, num_tokens: int) -> list[slice]:
        size = self.chunk_tokens or max(1, num_tokens)
        return [slice(start, start + size) for start in range(0, max(1, num_tokens), size)]


class _DenseMasked(torch.autograd.Function):
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
        options: _Options,
    ) -> Tensor:
        E, _, I = down_EDI.shape
        gate_up_FD = gate_up_EJD.to(x_TD.dtype).flatten(0, 1)
        down_DF = joined_down(down_EDI, x_TD.dtype)
        region, y_TD, pre = options.region(hidden_region), x_TD.new_empty(x_TD.shape), None
        for rows in options.chunks(len(x_TD)):
            pre = F.linear(x_TD[rows], gate_up_FD).view(-1, E, 2, I)
            hidden = region(pre, weights_TE[rows], options.activation)
            torch.mm(hidden.view(-1, E * I), down_DF.T, out=y_TD[rows])
        ctx.save_for_backward(
            x_TD,
            gate_up_EJD,
            down_EDI,
            weights_TE,
            router_logits_TE,
            active_TE,
            token_mask_T,
            None if options.chunk_tokens else pre,
        )
        ctx.options = options
        return y_TD

    @staticmethod
    @without_autocast
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401 - torch names no type with these attributes
        grad_y_TD: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x_TD, gate_up, down, weights_TE, logits_TE, active_TE, token_mask_T, saved = (
            ctx.saved_tensors
        )
        options: _Options = ctx.options
        need_x, need_gate_up, need_down, need_weights, need_logits = ctx.needs_input_grad[:5]
        smk = options.smk if need_logits else None
        E, _, I = down.shape
        gate_up_FD = gate_up.to(x_TD.dtype).flatten(0, 1)
        down_DF = joined_down(down, x_TD.dtype)
        chunks = options.chunks(len(x_TD))
        grad_y_TD = grad_y_TD.contiguous()
        grad_x = x_TD.new_empty(x_TD.shape) if need_x else None
        grad_gate_up, grad_down = (_Product(len(chunks)) for _ in range(2))
        dots, surprises = [], []
        for rows in chunks:
            x, grad_y, weights = x_TD[rows], grad_y_TD[rows], weights_TE[rows]
            pre = F.linear(x, gate_up_FD).view(-1, E, 2, I) if saved is None else saved
            grad_hidden = (grad_y @ down_DF).view(-1, E, I)
            hidden, grad_pre, pre_sq, hidden_sq, dot = options.region(gradient_region)(
                pre, grad_hidden, weights, options.activation
            )
            grad_pre = grad_pre.view(-1, 2 * E * I)
            if grad_x is not None:
                torch.mm(grad_pre, gate_up_FD, out=grad_x[rows])
            if need_gate_up:
                grad_gate_up.add(grad_pre, x)
            if need_down:
                grad_down.add(grad_y, hidden.view(-1, E * I))
            del hidden, grad_pre
            dots.append(dot)
            if smk is not None:
                kind = smk.rule.surprise
                x_sq, grad_y_sq = squared_norms(kind, x, grad_y, compiled=options.compiled)
                if smk.mean_outputs_ED is not None:
                    dot_TE = dot - to_math_dtype(grad_y @ smk.mean_outputs_ED.to(grad_y.dtype).T)
                else:
                    dot_TE = dot
                terms = SurpriseTerms(
                    x_sq_T1=x_sq,
                    grad_y_sq_T1=grad_y_sq,
                    pre_sq_TE=pre_sq,
                    hidden_sq_TE=hidden_sq,
                    dot_TE=dot_TE,
                )
                neurons = NeuronState(pre, grad_hidden, options.activation)
                surprises.append(_surprise(kind, terms, neurons, ExpertWeights(gate_up, down)))
        del gate_up_FD, down_DF
        grad_weights = _joined(dots).to(weights_TE.dtype) if need_weights else None
        grad_logits = None
        if smk is not None:
            routing = RoutingTables(weights_TE, logits_TE, active_TE, token_mask_T)
            surprise_TE = _joined(surprises)
            grad_logits = router_gradient(smk, surprise_TE, routing, compiled=options.compiled)
        return (
            grad_x,
            grad_gate_up.take().view_as(gate_up).to(gate_up.dtype) if need_gate_up else None,
            parted_down(grad_down.take(), down) if need_down else None,
            grad_weights,
            grad_logits,
            None,
            None,
            None,
        )


class _Product:
    """The sum over chunks of `left.T @ right`, in float32 if there is more than one chunk."""

    def __init__(self, num_chunks: int) -> None:
        self.num_chunks = num_chunks
        self.total: Tensor | None = None

    def add(self, left_TF: Tensor, right_TD: Tensor) -> None:
        if self.total is None:
            product_FD = left_TF.T @ right_TD
            self.total = to_math_dtype(product_FD) if self.num_chunks > 1 else product_FD
        elif self.total.dtype == right_TD.dtype:
            self.total.addmm_(left_TF.T, right_TD)
        else:
            self.total += left_TF.T @ right_TD

    def take(self) -> Tensor:
        total, self.total = self.total, None
        assert total is not None
        return total


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _surprise(
    kind: Surprise, terms: SurpriseTerms, neurons: NeuronState, weights: ExpertWeights
) -> Float[Tensor, "tokens experts"]:
    """Return `reference.surprise` of all tokens at once."""
    if kind not in GRAM_KINDS:
        return closed_form_surprise(kind, terms)
    matrix = weights.down_EDI.mT if kind == "magnitude" else weights.gate_up_EJD
    return gram_norm(gram_coefficients(kind, neurons), matrix)


def gram_norm(
    coefficients_TEJ: Float[Tensor, "tokens experts rows"],
    rows_EJD: Float[Tensor, "experts rows hidden"],
) -> Float[Tensor, "tokens experts"]:
    """Return `|sum_j c[t, e, j] rows[e, j]|` without a tensor of size T * E * D.

    The squared norm is a quadratic form of the coefficients in the rows' Gram matrix.
    """
    rows_EJD = rows_EJD.to(coefficients_TEJ.dtype)
    gram_EJJ = rows_EJD @ rows_EJD.mT
    coefficients_ETJ = coefficients_TEJ.transpose(0, 1)
    squared_ET = ((coefficients_ETJ @ gram_EJJ) * coefficients_ETJ).sum(-1)
    return squared_ET.clamp_min(0).sqrt().T
