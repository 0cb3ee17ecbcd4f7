"""The expert layer, grouped: it computes each expert on the tokens that chose it, and no others.

Every active pair of token and expert has one row, sorted by expert (and by token within it). The
rows go through six ragged matrix products, the dense path's two elementwise regions, and the same
surprise and SMK gradient. Work falls with the share of active experts, so this path wins at low k.

Cost: 9 * R * 2I * D floating-point operations for R rows, k / E of the dense path's. Memory kept
for backward: x, the (R, 2I) pre-activations and row indices. The loop over experts (CPU, and GPUs
whose grouped product is itself a loop) gathers one expert's tokens at a time; the grouped kernel
(compute capability 9 and 10, bf16) gathers (R, D).

Sums over a token's rows run in a fixed order, so that results repeat bit for bit: the loop adds
expert after expert, in float32; the kernel's rows are summed by `embedding_bag`, one thread per
token and feature over the token's rows, in float32. This path says nothing about inactive experts:
it returns 0 as the gradient of their weights, and computes their surprise only where the rule
samples its lesson, for the sampled tokens, which have a row for every expert.

Legend: T tokens, R rows (active pairs), D hidden, E experts, I expert width, J rows of an expert's
matrix (gate and up: 2 * I, down: I, a row per neuron).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn.config.schema import Surprise
from tiny_onn.ops.layout import ExpertWeights
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

# On a CPU, an expert's number of rows is rounded up to a multiple of this, see `_bounds`.
ROUND_ROWS = 64


class Groups(NamedTuple):
    """Each row's token and expert, and the bounds of experts and tokens among the rows."""

    token_R: Tensor
    expert_R: Tensor
    ends_E: Tensor
    """The row after each expert's last one, int32."""
    order_R: Tensor | None
    """Rows by token, for the kernel; None: the loop runs."""
    starts_T: Tensor | None
    """The place in `order_R` at which each token's rows begin."""


def group_rows(active_TE: Bool[Tensor, "tokens experts"], *, kernel: bool) -> Groups:
    """Return the active pairs, sorted by expert, then by token.

    `nonzero` of the transposed mask lists them in that order. On a GPU it waits for the device once
    to learn their number.
    """
    expert_R, token_R = (index.contiguous() for index in active_TE.T.nonzero().unbind(1))
    ends_E = active_TE.sum(0).cumsum(0).int()
    if not kernel or token_R.numel() == 0:
        return Groups(token_R, expert_R, ends_E, None, None)
    num_T = active_TE.sum(1)
    order_R = token_R.argsort(stable=True)
    return Groups(token_R, expert_R, ends_E, order_R, num_T.cumsum(0) - num_T)


def has_kernel(device: torch.device, dtype: torch.dtype, *dims: int) -> bool:
    """Return whether torch's grouped product is a single kernel for these inputs.

    It is one for bf16 on Hopper and data-centre Blackwell, if the rows of every operand start at
    multiples of 16 bytes. Elsewhere torch copies the offsets to the host and loops; the loop here
    does the same without torch's (R, D) copies.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10) and all(n % 8 == 0 for n in dims)


def gather_mm(
    x_TD: Float[Tensor, "tokens hidden"],
    weight_EJD: Float[Tensor, "experts neurons hidden"],
    groups: Groups,
) -> Float[Tensor, "rows neurons"]:
    """Return `weight[expert of r] @ x[token of r]` of every row r, in x's number format."""
    if groups.order_R is not None:
        rows_RD = x_TD.index_select(0, groups.token_R)
        return F.grouped_mm(rows_RD, weight_EJD.to(x_TD.dtype).mT, offs=groups.ends_E)
    out_RJ = x_TD.new_empty(len(groups.token_R), weight_EJD.shape[1])
    for e, begin, _, stop in _bounds(groups, x_TD):
        rows_ND = x_TD.index_select(0, groups.token_R[begin:stop])
        weight_JD = weight_EJD[e].to(x_TD.dtype)
        # Rows beyond the expert's own belong to later experts, which overwrite them.
        torch.mm(rows_ND, weight_JD.T, out=out_RJ[begin:stop])
    return out_RJ


def scatter_mm(
    rows_RJ: Float[Tensor, "rows neurons"],
    weight_EJD: Float[Tensor, "experts neurons hidden"],
    groups: Groups,
    num_tokens: int,
) -> Float[Tensor, "tokens hidden"]:
    """Return `sum of weight[expert of r]^T @ rows[r]` over each token's rows, summed in float32."""
    if groups.order_R is not None:
        out_RD = F.grouped_mm(rows_RJ, weight_EJD.to(rows_RJ.dtype), offs=groups.ends_E)
        return F.embedding_bag(groups.order_R, out_RD, groups.starts_T, mode="sum")
    y_TD = to_math_dtype(rows_RJ.new_zeros(num_tokens, weight_EJD.shape[2]))
    for e, begin, end, stop in _bounds(groups, rows_RJ):
        weight_JD = weight_EJD[e].to(rows_RJ.dtype)
        rows_ND = (rows_RJ[begin:stop] @ weight_JD)[: end - begin]
        # A token occurs once per expert, so that no two additions of a call go to one place.
        y_TD.index_add_(0, groups.token_R[begin:end], to_math_dtype(rows_ND))
    return y_TD.to(rows_RJ.dtype)


def outer_mm(
    rows_RJ: Float[Tensor, "rows neurons"],
    x_TD: Float[Tensor, "tokens hidden"],
    groups: Groups,
    weight_EJD: Float[Tensor, "experts neurons hidden"],
) -> Float[Tensor, "experts neurons hidden"]:
    """Return the weight's gradient, `sum of rows[r] x[token of r]^T` by expert, in its format."""
    if groups.order_R is not None:
        rows_RD = x_TD.index_select(0, groups.token_R)
        grad_EJD = F.grouped_mm(rows_RJ.mT, rows_RD, offs=groups.ends_E)
        return torch.empty_like(weight_EJD).copy_(grad_EJD)
    grad_EJD = torch.zeros_like(weight_EJD)
    for e, begin, end, stop in _bounds(groups, x_TD):
        rows_ND = x_TD.index_select(0, groups.token_R[begin:stop])
        rows_NJ = rows_RJ[begin:stop]
        if end < stop:
            rows_NJ = rows_NJ.clone()
            rows_NJ[end - begin :] = 0
        grad_EJD[e] = rows_NJ.mT @ rows_ND
    return grad_EJD


def _bounds(groups: Groups, like: Tensor) -> list[tuple[int, int, int, int]]:
    """Return (expert, begin, end, stop) of each expert that has rows.

    Its rows are `begin` to `end`, and its products are computed for `begin` to `stop`. On a CPU
    oneDNN compiles its bfloat16 products for every number of rows it meets, which takes longer than
    the product itself; there `stop` rounds the number up to a multiple of `ROUND_ROWS`, as far as
    there are rows.
    """
    ends = groups.ends_E.tolist()
    size = ROUND_ROWS if like.device.type == "cpu" and like.dtype == torch.bfloat16 else 1
    return [
        (e, begin, end, min(begin + -(-(end - begin) // size) * size, ends[-1]))
        for e, (begin, end) in enumerate(pairwise([0, *ends]))
        if begin < end
    ]


def row_hidden(
    pre_R2I: Float[Tensor, "rows 2 width"], weights_R: Float[Tensor, " rows"], act: Activation
) -> Float[Tensor, "rows width"]:
    """Return `hidden_region` of rows, taken as tokens of a layer of one expert."""
    return hidden_region(pre_R2I[:, None], weights_R[:, None], act)[:, 0]


def row_gradients(
    pre_R2I: Float[Tensor, "rows 2 width"],
    grad_hidden_RI: Float[Tensor, "rows width"],
    weights_R: Float[Tensor, " rows"],
    act: Activation,
) -> tuple[Tensor, ...]:
    """Return `gradient_region` of rows, taken as tokens of a layer of one expert."""
    hidden, grad_pre, *sums = gradient_region(
        pre_R2I[:, None], grad_hidden_RI[:, None], weights_R[:, None], act
    )
    return hidden[:, 0], grad_pre[:, 0], *(sum_R1[:, 0] for sum_R1 in sums)


@dataclass(frozen=True, slots=True)
class _Options:
    activation: Activation
    smk: SmkStep | None
    compiled: bool


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
) -> Float[Tensor, "tokens hidden"]:
    """Return the output, `y[t] = sum_e weights[t, e] * expert_e(x[t])` over the active experts.

    Arguments and gradients are those of `dense_masked.expert_layer`, except that the gradient of an
    inactive expert's weight is 0.

    Raises:
        ValueError: `smk` takes all experts as candidates, inactive ones too, at every token.
    """
    active_TE, token_mask_T = routing_masks(weights_TE, active_TE, token_mask_T)
    listed_TE = active_TE
    if smk is not None and smk.rule.candidates == "all":
        lesson_T = smk.lesson_mask(len(x_TD), x_TD.device)
        if lesson_T is None:
            raise ValueError(
                "smk.rule.candidates: got 'all', expected 'active' or a lesson_share below 1: the "
                "grouped path computes no inactive expert; use dense_masked.expert_layer"
            )
        listed_TE = active_TE | lesson_T[:, None]
    options = _Options(activation, smk, compiled)
    return _Grouped.apply(
        in_autocast_format(x_TD),
        gate_up_EJD,
        down_EDI,
        weights_TE,
        router_logits_TE,
        active_TE,
        listed_TE,
        token_mask_T,
        options,
    )  # pyright: ignore[reportReturnType]


class _Grouped(torch.autograd.Function):
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
        listed_TE: Tensor,
        token_mask_T: Tensor,
        options: _Options,
    ) -> Tensor:
        _, D, I = down_EDI.shape
        groups = group_rows(listed_TE, kernel=has_kernel(x_TD.device, x_TD.dtype, I, D))
        pre_R2I = gather_mm(x_TD, gate_up_EJD, groups).view(-1, 2, I)
        weights_R = weights_TE[groups.token_R, groups.expert_R]
        region = region_of(row_hidden, compiled=options.compiled)
        hidden_RI = region(pre_R2I, weights_R, options.activation)
        ctx.save_for_backward(
            x_TD,
            gate_up_EJD,
            down_EDI,
            weights_TE,
            router_logits_TE,
            active_TE,
            token_mask_T,
            pre_R2I,
            *groups,
        )
        ctx.options = options
        return scatter_mm(hidden_RI, down_EDI.mT, groups, len(x_TD))

    @staticmethod
    @without_autocast
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401 - torch names no type with these attributes
        grad_y_TD: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x_TD, gate_up, down, weights_TE, logits_TE, active_TE, token_mask_T, pre_R2I, *indices = (
            ctx.saved_tensors
        )
        groups = Groups(*indices)
        options: _Options = ctx.options
        grad_y_TD = grad_y_TD.contiguous()
        weights_R = weights_TE[groups.token_R, groups.expert_R]
        grad_hidden_RI = gather_mm(grad_y_TD, down.mT, groups)
        region = region_of(row_gradients, compiled=options.compiled)
        hidden_RI, grad_pre, pre_sq_R, hidden_sq_R, dot_R = region(
            pre_R2I, grad_hidden_RI, weights_R, options.activation
        )
        grad_pre_RJ = grad_pre.flatten(1)
        need_x, need_gate_up, need_down, need_weights, need_logits = ctx.needs_input_grad[:5]
        grad_x = grad_gate_up = grad_down = grad_weights = grad_logits = None
        if need_x:
            grad_x = scatter_mm(grad_pre_RJ, gate_up, groups, len(x_TD))
        if need_gate_up:
            grad_gate_up = outer_mm(grad_pre_RJ, x_TD, groups, gate_up)
        if need_down:
            grad_down = outer_mm(hidden_RI, grad_y_TD, groups, down.mT).mT
        if need_weights:
            dot_TE = _spread(dot_R, groups, active_TE)
            grad_weights = torch.where(active_TE, dot_TE, 0).to(weights_TE.dtype)
        if need_logits and (smk := options.smk) is not None:
            kind = smk.rule.surprise
            x_sq, grad_y_sq = squared_norms(kind, x_TD, grad_y_TD, compiled=options.compiled)
            terms = SurpriseTerms(
                x_sq_T1=x_sq[groups.token_R],
                grad_y_sq_T1=grad_y_sq[groups.token_R],
                pre_sq_TE=pre_sq_R[:, None],
                hidden_sq_TE=hidden_sq_R[:, None],
                dot_TE=dot_R[:, None],
            )
            neurons = NeuronState(pre_R2I, grad_hidden_RI, options.activation)
            weights = ExpertWeights(gate_up, down)
            surprise_R = _row_surprise(kind, terms, neurons, weights, groups)
            surprise_TE = _spread(surprise_R, groups, active_TE)
            routing = RoutingTables(weights_TE, logits_TE, active_TE, token_mask_T)
            grad_logits = router_gradient(smk, surprise_TE, routing, compiled=options.compiled)
        return grad_x, grad_gate_up, grad_down, grad_weights, grad_logits, *(None,) * 4


def _row_surprise(
    kind: Surprise,
    terms: SurpriseTerms,
    neurons: NeuronState,
    weights: ExpertWeights,
    groups: Groups,
) -> Float[Tensor, " rows"]:
    """Return the surprise of every row at unit weight: `reference.surprise` of active pairs."""
    if kind not in GRAM_KINDS:
        return closed_form_surprise(kind, terms)[:, 0]
    matrix = weights.down_EDI.mT if kind == "magnitude" else weights.gate_up_EJD
    return _gram_norm(gram_coefficients(kind, neurons), matrix, groups)


def _gram_norm(rows_RJ: Tensor, weight_EJD: Tensor, groups: Groups) -> Float[Tensor, " rows"]:
    """Return `|sum_j rows[r, j] weight[j of r's expert]|` through each expert's Gram matrix."""
    squared_R = rows_RJ.new_empty(len(rows_RJ))
    for e, begin, end, _ in _bounds(groups, rows_RJ):
        weight_JD = weight_EJD[e].to(rows_RJ.dtype)
        rows_NJ = rows_RJ[begin:end]
        squared_R[begin:end] = ((rows_NJ @ (weight_JD @ weight_JD.T)) * rows_NJ).sum(-1)
    return squared_R.clamp_min(0).sqrt()


def _spread(values_R: Tensor, groups: Groups, active_TE: Tensor) -> Tensor:
    """Return the rows' values as a (T, E) table, 0 where there is no row."""
    table_TE = values_R.new_zeros(active_TE.shape)
    table_TE[groups.token_R, groups.expert_R] = values_R
    return table_TE
