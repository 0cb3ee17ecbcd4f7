"""The expert layer, dense and masked: every expert computed, the routing weight applied in between.

At half density with narrow experts, gathering tokens costs more than it saves, so training runs two
large matrix products and one elementwise region each way. The backward pass has everything at hand
that surprise is made of, so the same `autograd.Function` returns, as the gradient of the router
logits, the gradient of the SMK loss: both systems learn in one backward pass, and it is an ordinary
gradient for checkpointing, accumulation and data parallelism.

Cost: 6 * T * F * D multiply-adds forward and backward together with 3 matrix products each counted
once (9 in all), as a dense MLP. Memory kept for backward: x and the (T, 2F) pre-activations.

Legend: T tokens, D hidden, E experts, I expert width, F = E * I neurons.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn.config import Surprise
from tiny_onn.surprise import SmkRule, smk_logits_grad, smk_targets

Activation = Callable[[Tensor], Tensor]


@dataclass(kw_only=True, slots=True)
class SurpriseTally:
    """What one layer's backward passes saw, summed on the device. Tensors, read when logging."""

    num_tokens: Tensor
    """Tokens that count (not masked)."""
    num_targets: Tensor
    """Of these, tokens whose surprise gave a target."""
    num_agree: Tensor
    """Of these, tokens whose largest candidate logit is at a target."""
    chance: Tensor
    """Sum over tokens with a target of the agreement expected from a random candidate."""
    surprise_E: Tensor  # noqa: N815
    """Sum over counted tokens of each expert's surprise, in units of the per-token loss."""

    @staticmethod
    def zeros(num_experts: int, device: torch.device) -> "SurpriseTally":
        """An empty tally."""
        return SurpriseTally(
            num_tokens=torch.zeros((), device=device),
            num_targets=torch.zeros((), device=device),
            num_agree=torch.zeros((), device=device),
            chance=torch.zeros((), device=device),
            surprise_E=torch.zeros(num_experts, device=device),
        )


@dataclass(kw_only=True, slots=True)
class SmkStep:
    """What the backward pass needs to teach the gate."""

    rule: SmkRule
    """Which surprise points where."""
    grad_scale: float
    """The gate's gradient is `(softmax - target) * grad_scale`: coefficient / the step's tokens."""
    loss_scale: float = 1.0
    """Surprise is multiplied by it: the divisor of the loss, so that surprise is free of it."""
    tally: SurpriseTally | None = None
    """Where statistics go."""
    capture: list[Tensor] | None = field(default=None, repr=False)
    """Where whole (tokens, experts) surprise tensors go, for probing; None: nowhere."""


def activation_and_slope(
    activation: Activation, gate: Float[Tensor, "..."]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """`act(gate)` and `act'(gate)`, by differentiating any elementwise activation."""
    # Not torch.func.jvp: torch.compile cannot trace it with a symbolic number of tokens (2.13).
    value, pull_back = torch.func.vjp(activation, gate)  # pyright: ignore[reportAssignmentType]
    return value, pull_back(torch.ones_like(value))[0]


def hidden_region(
    gate_up_T2EI: Float[Tensor, "tokens 2 experts width"],
    weights_TE: Float[Tensor, "tokens experts"],
    activation: Activation,
) -> Float[Tensor, "tokens experts width"]:
    """Routed hidden activations: `weights * act(gate) * up`, in the inputs' number format."""
    gate, up = _wide(gate_up_T2EI[:, 0]), _wide(gate_up_T2EI[:, 1])
    hidden = activation(gate) * up * weights_TE[..., None].to(gate.dtype)
    return hidden.to(gate_up_T2EI.dtype)


def gradient_region(
    gate_up_T2EI: Float[Tensor, "tokens 2 experts width"],
    grad_hidden_TEI: Float[Tensor, "tokens experts width"],
    weights_TE: Float[Tensor, "tokens experts"],
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything elementwise in the backward pass, from the gradient at the unrouted hidden.

    Returns:
        Routed hidden (T, E, I); routed gradient of gate and up (T, 2, E, I); and, in float32, the
        sums over the width (T, E) of: the squared unrouted gradients of gate and up, the squared
        unrouted hidden, and hidden times its gradient (`<grad_y, expert_e(x)>`).
    """
    gate, up = _wide(gate_up_T2EI[:, 0]), _wide(gate_up_T2EI[:, 1])
    grad_hidden = _wide(grad_hidden_TEI)
    value, slope = activation_and_slope(activation, gate)
    hidden = value * up
    grad_gate = grad_hidden * up * slope
    grad_up = grad_hidden * value
    weights_TE1 = weights_TE[..., None].to(gate.dtype)
    dtype = gate_up_T2EI.dtype
    return (
        (hidden * weights_TE1).to(dtype),
        torch.stack((grad_gate * weights_TE1, grad_up * weights_TE1), dim=1).to(dtype),
        (grad_gate.square() + grad_up.square()).sum(-1),
        hidden.square().sum(-1),
        (hidden * grad_hidden).sum(-1),
    )


@functools.cache
def _compiled(region: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(region, fullgraph=True)


def expert_layer(
    x_TD: Float[Tensor, "tokens hidden"],
    gate_up_2EID: Float[Tensor, "2 experts width hidden"],
    down_EID: Float[Tensor, "experts width hidden"],
    weights_TE: Float[Tensor, "tokens experts"],
    router_logits_TE: Float[Tensor, "tokens experts"],
    *,
    activation: Activation,
    active_TE: Bool[Tensor, "tokens experts"] | None = None,
    token_mask_T: Bool[Tensor, " tokens"] | None = None,
    smk: SmkStep | None = None,
    compiled: bool = False,
) -> Float[Tensor, "tokens hidden"]:
    """The layer's output, `y[t] = sum_e weights[t, e] * expert_e(x[t])`.

    Defined by `reference.expert_layer`. The gradient of x, of the experts and of the routing
    weights (inactive ones too) is the loss'. The gradient of `router_logits_TE` is that of the SMK
    loss when `smk` is given and None otherwise.

    Args:
        x_TD: the layer's input, in the compute format.
        gate_up_2EID: gate and up projections, any format; cast to x's.
        down_EID: down projections, transposed (a row per neuron); cast to x's.
        weights_TE: routing weights, 0 where inactive.
        router_logits_TE: the gate's float32 logits.
        activation: elementwise.
        active_TE: active experts, the candidates of SMK; None: where the weights are not 0.
        token_mask_T: tokens that count in SMK targets and statistics; None: all.
        smk: how the gate is taught; None: it is not.
        compiled: fuse the elementwise regions with torch.compile.
    """
    if active_TE is None:
        active_TE = weights_TE != 0
    if token_mask_T is None:
        token_mask_T = torch.ones(x_TD.shape[0], dtype=torch.bool, device=x_TD.device)
    options = _Options(activation, smk, compiled)
    return _DenseMasked.apply(
        x_TD, gate_up_2EID, down_EID, weights_TE, router_logits_TE, active_TE, token_mask_T, options
    )  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, slots=True)
class _Options:
    activation: Activation
    smk: SmkStep | None
    compiled: bool

    def region(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return _compiled(function) if self.compiled else function


class _DenseMasked(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401 - torch names no type with these attributes
        x_TD: Tensor,
        gate_up_2EID: Tensor,
        down_EID: Tensor,
        weights_TE: Tensor,
        router_logits_TE: Tensor,
        active_TE: Tensor,
        token_mask_T: Tensor,
        options: _Options,
    ) -> Tensor:
        _, E, I, D = gate_up_2EID.shape
        gate_up_FD = gate_up_2EID.to(x_TD.dtype).view(2 * E * I, D)
        gate_up_T2EI = F.linear(x_TD, gate_up_FD).view(-1, 2, E, I)
        hidden_TEI = options.region(hidden_region)(gate_up_T2EI, weights_TE, options.activation)
        ctx.save_for_backward(
            x_TD,
            gate_up_2EID,
            down_EID,
            weights_TE,
            router_logits_TE,
            active_TE,
            token_mask_T,
            gate_up_T2EI,
        )
        ctx.options = options
        return hidden_TEI.view(-1, E * I) @ down_EID.to(x_TD.dtype).view(E * I, D)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401 - torch names no type with these attributes
        grad_y_TD: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x_TD, gate_up, down, weights_TE, logits_TE, active_TE, token_mask_T, pre = ctx.saved_tensors
        options: _Options = ctx.options
        _, E, I, D = gate_up.shape
        grad_y_TD = grad_y_TD.contiguous()
        grad_hidden_TEI = F.linear(grad_y_TD, down.to(x_TD.dtype).view(E * I, D)).view(-1, E, I)
        hidden, grad_pre, pre_sq_TE, hidden_sq_TE, dot_TE = options.region(gradient_region)(
            pre, grad_hidden_TEI, weights_TE, options.activation
        )
        grad_pre = grad_pre.view(-1, 2 * E * I)
        need_x, need_gate_up, need_down, need_weights, need_logits = ctx.needs_input_grad[:5]
        grad_x = grad_gate_up = grad_down = grad_weights = grad_logits = None
        if need_x:
            grad_x = grad_pre @ gate_up.to(x_TD.dtype).view(2 * E * I, D)
        if need_gate_up:
            grad_gate_up = (grad_pre.T @ x_TD).view_as(gate_up).to(gate_up.dtype)
        if need_down:
            grad_down = (hidden.view(-1, E * I).T @ grad_y_TD).view_as(down).to(down.dtype)
        if need_weights:
            grad_weights = dot_TE.to(weights_TE.dtype)
        if need_logits and options.smk is not None:
            smk = options.smk
            sums = _Sums(
                x_sq_T1=_wide(x_TD).square().sum(-1, keepdim=True),
                grad_y_sq_T1=_wide(grad_y_TD).square().sum(-1, keepdim=True),
                pre_sq_TE=pre_sq_TE,
                hidden_sq_TE=hidden_sq_TE,
                dot_TE=dot_TE,
            )
            surprise_TE = _surprise(
                smk.rule.surprise, sums, pre, grad_hidden_TEI, gate_up, down, options.activation
            )
            if smk.rule.surprise != "magnitude":
                surprise_TE = surprise_TE * smk.loss_scale
            if smk.rule.candidates == "active":
                surprise_TE = surprise_TE * weights_TE
            grad_logits = _teach(smk, surprise_TE, logits_TE, active_TE, token_mask_T)
        return grad_x, grad_gate_up, grad_down, grad_weights, grad_logits, None, None, None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sums:
    x_sq_T1: Tensor  # noqa: N815
    grad_y_sq_T1: Tensor  # noqa: N815
    pre_sq_TE: Tensor  # noqa: N815
    hidden_sq_TE: Tensor  # noqa: N815
    dot_TE: Tensor  # noqa: N815


def _surprise(  # noqa: PLR0917
    kind: Surprise,
    sums: _Sums,
    pre_T2EI: Tensor,
    grad_hidden_TEI: Tensor,
    gate_up_2EID: Tensor,
    down_EID: Tensor,
    activation: Activation,
) -> Float[Tensor, "tokens experts"]:
    """`reference.surprise` for all tokens at once.

    A token's gradient of a linear map is an outer product, whose norm is the product of two vector
    norms. Source: Goodfellow, "Efficient Per-Example Gradient Computations", arXiv 1510.01799.
    """
    if kind == "gain":
        return -sums.dot_TE
    if kind == "output":
        return sums.grad_y_sq_T1.sqrt().expand_as(sums.dot_TE)
    gate, up = _wide(pre_T2EI[:, 0]), _wide(pre_T2EI[:, 1])
    if kind == "magnitude":
        return gram_norm(activation(gate) * up, down_EID)
    if kind == "input":
        value, slope = activation_and_slope(activation, gate)
        grad_hidden = _wide(grad_hidden_TEI)
        grads_TEJ = torch.cat((grad_hidden * up * slope, grad_hidden * value), dim=-1)
        return gram_norm(grads_TEJ, torch.cat((gate_up_2EID[0], gate_up_2EID[1]), dim=1))
    squared_TE = sums.x_sq_T1 * sums.pre_sq_TE + sums.hidden_sq_TE * sums.grad_y_sq_T1
    if kind == "relative":
        ratio_TE = squared_TE / sums.hidden_sq_TE
        return torch.where(sums.hidden_sq_TE > 0, ratio_TE, 0).sqrt()
    return squared_TE.sqrt()


def gram_norm(
    coefficients_TEJ: Float[Tensor, "tokens experts rows"],
    rows_EJD: Float[Tensor, "experts rows hidden"],
) -> Float[Tensor, "tokens experts"]:
    """`|sum_j c[t, e, j] rows[e, j]|` through the rows' Gram matrix: nothing of size T * E * D."""
    rows_EJD = rows_EJD.to(coefficients_TEJ.dtype)
    gram_EJJ = rows_EJD @ rows_EJD.mT
    coefficients_ETJ = coefficients_TEJ.transpose(0, 1)
    squared_ET = ((coefficients_ETJ @ gram_EJJ) * coefficients_ETJ).sum(-1)
    return squared_ET.clamp_min(0).sqrt().T


def _teach(
    smk: SmkStep, surprise_TE: Tensor, logits_TE: Tensor, active_TE: Tensor, token_mask_T: Tensor
) -> Float[Tensor, "tokens experts"]:
    targets_TE = smk_targets(surprise_TE, active_TE, token_mask_T, smk.rule)
    if smk.capture is not None:
        smk.capture.append(surprise_TE)
    if (tally := smk.tally) is not None:
        candidates_TE = active_TE if smk.rule.candidates == "active" else torch.ones_like(active_TE)
        pick_T1 = logits_TE.masked_fill(~candidates_TE, float("-inf")).argmax(-1, keepdim=True)
        hits_T = targets_TE.gather(-1, pick_T1).squeeze(-1) > 0
        chosen_T, choices_T = (targets_TE > 0).sum(-1), candidates_TE.sum(-1).clamp_min(1)
        tally.num_tokens += token_mask_T.sum()
        tally.num_targets += (chosen_T > 0).sum()
        tally.num_agree += hits_T.sum()
        tally.chance += (chosen_T / choices_T).sum()
        tally.surprise_E += torch.where(token_mask_T[:, None], surprise_TE, 0).sum(0)
    return (smk_logits_grad(logits_TE, targets_TE) * smk.grad_scale).to(logits_TE.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
