"""The expert bank that takes the place of one dense MLP.

Legend: B batch, T tokens, D hidden, E experts, I expert width, F = E * I neurons.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiny_onn.model.expert_weights import Experts
from tiny_onn.model.exploration import Exploration
from tiny_onn.model.router import TIE_BREAK, Router, Routing, RoutingRule
from tiny_onn.ops import (
    active_experts,
    decode,
    decode_operators,
    dense_masked,
    grouped,
    sparse,
)
from tiny_onn.ops.dense_masked import gram_norm
from tiny_onn.ops.precision import in_autocast_format, without_autocast
from tiny_onn.ops.router_gradient import SmkStep
from tiny_onn.ops.surprise import log_norm


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """The way a bank computes; all but `coupled` change results by rounding only."""

    path: Literal["dense", "grouped", "sparse"] = "dense"
    """`dense` computes every expert on every token and masks the inactive ones, `grouped` computes
    each expert on its own tokens, `sparse` does so by Triton kernels, which need a GPU. While
    torch.compile traces a bank, `dense` stands in for `sparse`. In evaluation mode and without
    gradients, whatever the path, all tokens on a CPU take `ops/active_experts.py` and a few tokens
    on a GPU with triton take `ops/decode.py`."""
    compiled: bool = False
    """True if the elementwise regions are compiled."""
    chunk_tokens: int = 0
    """Number of tokens that the dense path processes at once; 0: all."""
    coupled: bool = False
    """True if the main loss' gradient reaches the router: its weights, and its input too unless the
    gradient is that of an estimator, which is meant for the router alone."""
    decode_blocks: decode.KernelBlocks | None = None
    """The sizes of the decoding kernels' programs; None: the default ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowState:
    """The training row that a bank is processing; outside of training the default holds."""

    token_mask: Bool[Tensor, " tokens"] | None = None
    """The row's tokens that count in SMK targets and statistics, (B * T,); None: all."""
    smk: SmkStep | None = None
    """The instructions for the router's gradient in the backward pass; None: it gets none."""
    exploration: Exploration | None = None
    """The tokens that try an expert which they did not choose; None: no token does."""
    fills_window: bool = False
    """True if recorded calls add to the window of a `top_any` router, which needs `token_mask`."""


class ExpertBank(nn.Module):
    """E experts of width I and their router.

    The output is `y = sum_e weight[e] * down_e (act(gate_e x) * up_e x)`, where `weight[e]` is the
    routing weight and `experts` holds gate, up and down. Three parameters are optional, and change
    nothing while all experts are active and scales are 1: `mean_outputs` (E, D), added for inactive
    experts, `expert_scale` (E,), a factor of the experts' routing weights, and `token_scale`
    (E, D), which makes a factor of the input, `1 + tanh(token_scale x / |x|)`.

    Beside parameters, buffers, the router's rule and the training mode, a call depends on two
    attributes, which this file alone assigns:
        execution: The way to compute; `set_execution` sets it once.
        row: The current training row; `row_context` sets it for a forward and backward pass.
    `recorded_routings` collects the routing of calls.
    """

    mean_outputs: nn.Parameter | None
    expert_scale: nn.Parameter | None
    token_scale: nn.Parameter | None

    def __init__(
        self,
        hidden_dim: int,
        num_experts: int,
        expert_dim: int,
        activation: str,
        rule: RoutingRule,
        *,
        compensated: bool = False,
        scaled: bool = False,
        token_scaled: bool = False,
    ) -> None:
        super().__init__()
        self.experts = Experts(hidden_dim, num_experts, expert_dim, activation)
        mean_outputs = nn.Parameter(torch.zeros(num_experts, hidden_dim)) if compensated else None
        expert_scale = nn.Parameter(torch.ones(num_experts)) if scaled else None
        self.register_parameter("mean_outputs", mean_outputs)
        self.register_parameter("expert_scale", expert_scale)
        token_scale = nn.Parameter(torch.zeros(num_experts, hidden_dim)) if token_scaled else None
        self.register_parameter("token_scale", token_scale)
        self.router = Router(hidden_dim, num_experts, rule)
        self.activation = self.experts.act_fn
        self.activation_name = activation
        self.execution, self.row = Execution(), RowState()
        # torch.compile takes a tuple of empty lists for a constant, and appends to none of them.
        self._recordings: list[list[Routing]] = []

    def set_execution(self, execution: Execution) -> None:
        """Set the way in which all later calls are computed."""
        self.execution = execution

    def route(self, x_TD: Float[Tensor, "tokens hidden"]) -> Routing:
        """Return the routing of these inputs; the oracle's logits are the outputs' log norms."""
        exploration = self.row.exploration
        if self.router.rule.selection != "oracle":
            return self.router(x_TD, exploration=exploration)
        with torch.no_grad():
            log_norms_TE = log_norm(expert_norms(self, x_TD))
            return self.router(x_TD, log_norms_TE, exploration=exploration)

    @torch.no_grad()
    def reset_corrections(self) -> None:
        """Set the mean outputs to 0 and every scale to 1, so that none changes the output."""
        if self.mean_outputs is not None:
            self.mean_outputs.zero_()
        if self.expert_scale is not None:
            self.expert_scale.fill_(1)
        if self.token_scale is not None:
            self.token_scale.zero_()

    def forward(
        self, hidden_states: Float[Tensor, "*batch hidden"]
    ) -> Float[Tensor, "*batch hidden"]:
        """Return the routed sum of the active experts' outputs.

        Under autocast the sum is in autocast's number format, like a linear layer's output. The
        router reads the uncast input, so that autocast does not change the routing.
        """
        # Quantised weights that are read twice in a call are then dequantised once.
        once = self._is_quantized() and not torch.compiler.is_compiling()
        with parametrize.cached() if once else nullcontext():
            return self._forward(hidden_states)

    def _forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        evaluating = not (self.training or torch.is_grad_enabled())
        if evaluating and self._can_decode(x_TD):
            return in_autocast_format(self._decode(x_TD)).view_as(hidden_states)
        execution, row = self.execution, self.row
        routing = self.route(x_TD if self._reaches_input() else x_TD.detach())
        self._record(x_TD, routing)
        weights_TE = routing.weights if execution.coupled else routing.weights.detach()
        routed = {"weights_TE": self.scaled(weights_TE, x_TD), "active_TE": routing.active}
        used_U = None
        if evaluating and active_experts.can_compute(x_TD):
            used_U = self._used(routing)
            if used_U is not None:
                routed = {name: table_TE[:, used_U] for name, table_TE in routed.items()}
            layer = partial(active_experts.expert_layer, activation=self.activation, **routed)
        else:
            layer = partial(
                self._layer(),
                router_logits_TE=routing.router_logits,
                token_mask_T=row.token_mask,
                smk=row.smk,
                compiled=execution.compiled,
                **routed,
            )
        y_TD = self.experts(x_TD, layer=layer, used=used_U)
        if self.mean_outputs is not None:
            missing_TE = self.missing(routing).to(y_TD.dtype)
            y_TD = y_TD + missing_TE @ self.mean_outputs.to(y_TD.dtype)
        return y_TD.view_as(hidden_states)

    @without_autocast
    def scaled(
        self, weights_TE: Float[Tensor, "tokens experts"], x_TD: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens experts"]:
        """Return routing weights times the learned scales."""
        if self.expert_scale is not None:
            weights_TE = weights_TE * self.expert_scale
        if self.token_scale is not None:
            direction_TD = F.normalize(x_TD.float(), dim=-1)
            scale_TE = F.linear(direction_TD, self.token_scale.float()).tanh()
            weights_TE = weights_TE * (1 + scale_TE)
        return weights_TE

    def missing(self, routing: Routing) -> Float[Tensor, "tokens experts"]:
        """Return how much of each expert its mean output stands in for: 1 where it is inactive.

        With `ramp` weights it is what the weight lacks to 1, so that an expert comes and goes
        without a jump. Where unit weights carry an estimator's gradient, the gate also learns what
        an expert takes away, its mean output.
        """
        rule, coupled = self.router.rule, self.execution.coupled
        if rule.weighting == "ramp":
            return 1 - (routing.weights if coupled else routing.weights.detach())
        if coupled and rule.weighting == "unit" and _estimates(rule):
            return 1 - routing.weights
        return (~routing.active).float()

    def _reaches_input(self) -> bool:
        """Return whether the main loss' gradient at the routing weights flows on to the input."""
        return self.execution.coupled and not _estimates(self.router.rule)

    def _is_quantized(self) -> bool:
        # A wrapper around the experts, such as PEFT's, has no such attribute.
        return getattr(self.experts, "stored_as", None) is not None

    def _used(self, routing: Routing) -> Tensor | None:
        """Return the experts that any token activates, if others need not be dequantised."""
        if not self._is_quantized():
            return None
        used_U = routing.active.any(0).nonzero()[:, 0]
        return used_U if 0 < len(used_U) < self.experts.num_experts else None

    def _can_decode(self, x_TD: Tensor) -> bool:
        # The weights are read last, because that costs a CPU a share of the time of a token,
        # dequantises weights that are quantised, and gathers those that are cut.
        if (
            self.router.rule.weighting == "ramp"
            or len(x_TD) > decode.MAX_TOKENS
            or not decode.triton_runs_on(x_TD.device.type)
        ):
            return False
        return self.experts(x_TD, layer=partial(decode.can_decode, activation=self.activation_name))

    def _layer(self) -> Callable[..., Tensor]:
        path = self.execution.path
        if path == "grouped":
            return partial(grouped.expert_layer, activation=self.activation)
        # The compiler cannot trace the kernels' launches.
        if path == "sparse" and not torch.compiler.is_compiling():
            num_active = self.router.rule.num_active
            # Where the number of pairs varies, dense sums spare waiting for the device.
            dense_sums = True if num_active is None else None
            options = {"num_active": num_active, "dense_sums": dense_sums}
            return partial(sparse.expert_layer, activation=self.activation_name, **options)
        chunk_tokens = self.execution.chunk_tokens
        layer = dense_masked.expert_layer
        return partial(layer, activation=self.activation, chunk_tokens=chunk_tokens)

    def _decode(self, x_TD: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        options: dict[str, Any] = {
            "activation": self.activation_name,
            "expert_scale_E": self.expert_scale,
            "mean_outputs_ED": self.mean_outputs,
            "blocks": self.execution.decode_blocks,
        }
        ways = decode_operators if torch.compiler.is_compiling() else decode
        router = self.router
        rule = selecting(router.rule)
        if rule is None or router.follows is not None or self.token_scale is not None:
            routing = self.route(x_TD)
            weights_TE = self.scaled(routing.weights, x_TD)
            options |= {"weights_TE": weights_TE, "active_TE": routing.active}
            options["expert_scale_E"] = None
            y_TD = self.experts(x_TD, layer=partial(ways.expert_layer, **options))
        else:
            gate = decode.Gate(router.weight, router.bias, router.selection_bias, router.settled)
            options |= {"gate": gate, "rule": rule}
            layer = partial(ways.routed_expert_layer, **options)
            y_TD, *routed = self.experts(x_TD, layer=layer)
            logits_TE, scores_TE, active_TE, weights_TE = routed
            routing = Routing(
                router_logits=logits_TE, scores=scores_TE, active=active_TE, weights=weights_TE
            )
        self._record(x_TD, routing)
        return y_TD

    def _record(self, x_TD: Float[Tensor, "tokens hidden"], routing: Routing) -> None:
        if not self._recordings:
            return
        routing = routing if self.execution.coupled else routing.detach()
        for recording in self._recordings:
            recording.append(routing)
        if self.row.fills_window and self.row.token_mask is not None:
            self.router.record(x_TD.detach(), routing, self.row.token_mask)


@contextmanager
def row_context(banks: Sequence[ExpertBank], states: Sequence[RowState]) -> Iterator[None]:
    """Set each bank's training row within the context, and its previous row again afterwards.

    The context belongs around forward and backward pass: the backward pass reads the state, and
    layers that are computed again read all of it again.

    Args:
        banks: The layers' banks.
        states: The state of the row for each bank.
    """
    # The state is an attribute, since autograd computes layers again in its own threads, which do
    # not see context variables.
    before = [bank.row for bank in banks]
    try:
        for bank, state in zip(banks, states, strict=True):
            bank.row = state
        yield
    finally:
        for bank, state in zip(banks, before, strict=True):
            bank.row = state


@contextmanager
def recorded_routings(banks: Sequence[ExpertBank]) -> Iterator[list[Routing]]:
    """Yield a list that receives the routing of every call of the banks, in call order.

    A routing has its graph only if the bank is coupled. The context belongs around the forward pass
    alone: a call that a backward pass repeats would be recorded, and counted, twice, and its graph
    would keep the layer's activations alive. Several recordings of one bank all receive its calls.
    """
    routings: list[Routing] = []
    before = [bank._recordings for bank in banks]
    try:
        for bank in banks:
            bank._recordings = [*bank._recordings, routings]
        yield routings
    finally:
        for bank, recordings in zip(banks, before, strict=True):
            bank._recordings = recordings


def _estimates(rule: RoutingRule) -> bool:
    """Return whether the gradient at the logits is an estimator's, and no derivative of the layer.

    Its way on to the layer's input would add, to every expert of the layers below, a gradient
    hundreds of times larger than the loss'. `top_any` keeps the way, as its paper has it.
    """
    if rule.selection == "top_any" or rule.straight_through == "coupled":
        return False
    return rule.weighting in ("unit", "mean")


def selecting(rule: RoutingRule) -> decode.Selecting | None:
    """Return the rule as the decoding kernels know it; None where the router has to select."""
    if rule.selection in ("top_any", "oracle") or rule.weighting == "ramp":
        return None
    if rule.selection == "budget" and rule.budget_form != "threshold":
        return None
    return decode.Selecting(
        num_active=0 if rule.has_budget else round(rule.target_k) - rule.num_shared,
        num_shared=rule.num_shared,
        weighting=rule.weighting,
        tie_break=TIE_BREAK,
    )


@without_autocast
def expert_norms(
    bank: ExpertBank, x_TD: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "tokens experts"]:
    """Return `|expert_e(x)|` of every expert, active or not, in float32."""

    def norms(x_TD: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor) -> Tensor:
        E, _, I = down_EDI.shape
        gate_up_FD = gate_up_EJD.to(x_TD.dtype).flatten(0, 1)
        pre_TE2I = F.linear(x_TD, gate_up_FD).view(-1, E, 2, I).float()
        hidden_TEI = bank.activation(pre_TE2I[:, :, 0]) * pre_TE2I[:, :, 1]
        return gram_norm(hidden_TEI, down_EDI.mT)

    return bank.experts(x_TD, layer=norms)
