"""The worth of each expert to a token: the token's own loss with and without it, and its surprise.

Leave-one-out changes one expert at one token at a time, which would take T * E forward passes. Here
E passes through the probed layer and those above it give exactly the same numbers. Copy 0 of a
batch is the unchanged model. In every other copy each token flips one expert of one layer, and
attends to the keys and values of earlier tokens in copy 0 and to its own changed ones
(`counterfactual_attention.py`). So no token sees the change of another token. A flip leaves an
active expert out, while the others keep their weights, or adds an inactive expert with the weight
that it would have had.

Cost per document and probed layer: (E + 1) forward passes of its tokens through the layers from the
probed one up, and the head.

Legend: C copies, T tokens, D hidden, E experts, I expert width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tiny_onn.config.schema import Surprise
from tiny_onn.errors import UserError
from tiny_onn.model.backbone import decoder_layers, head_of, last_hidden_states
from tiny_onn.model.experts import ExpertBank, RowState, recorded_routings, row_context
from tiny_onn.model.router import Routing, routing_weights
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.ops.router_gradient import SmkStep
from tiny_onn.ops.shared_experts import routed, with_shared
from tiny_onn.ops.surprise import SmkRule

SURPRISES: tuple[Surprise, ...] = get_args(Surprise)
# The number of tokens in all copies of one batch together.
BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """The arguments of a decoder layer's call."""

    hidden: Tensor
    rest: tuple[Any, ...]
    named: dict[str, Any]


class ProbedDocument:
    """The losses, leave-one-out truth and surprise of one document, to use within `own_keys`.

    Args:
        student: the student, frozen and in float32.
        input_ids: the document.
        teacher_logits_TV: the teacher's logits for the document, if the loss of a token is its KL
            to the teacher; None: it is its next-token loss.

    Raises:
        UserError: the decoder consists of more than its layers and a final norm.
    """

    def __init__(
        self,
        student: TinyOnnForCausalLM,
        input_ids: Int[Tensor, "1 tokens"],
        teacher_logits_TV: Float[Tensor, "tokens vocab"] | None,
    ) -> None:
        self.student = student
        self.layers = decoder_layers(student.backbone)
        self.head = head_of(student)
        # The last token has no label, and its divergence is not measured either.
        self.has_loss_T = torch.arange(input_ids.shape[1], device=input_ids.device) < (
            input_ids.shape[1] - 1
        )
        # The target is a class index or a distribution, which torch's cross-entropy both accepts.
        # The KL is the cross-entropy to the distribution, less its entropy, which is constant.
        self.target, self.entropy_T = input_ids[0].roll(-1), 0.0
        if teacher_logits_TV is not None:
            self.target = teacher_logits_TV.softmax(-1)
            self.entropy_T = torch.special.entr(self.target).sum(-1)
        if not isinstance(getattr(student.backbone.base_model, "norm", None), nn.Module):
            raise _unknown_family(student, "its decoder has no final norm named 'norm'")
        with torch.no_grad():
            self.calls, final_TD = _layer_calls(student, self.layers, input_ids)
            repeated_TD = self._run(len(self.layers) - 1, self.calls[-1].hidden)[0]
            self.losses_T = self.own_losses(final_TD)
        error, size = (repeated_TD - final_TD).abs().max().item(), final_TD.abs().max().item()
        if not error <= 1e-3 * size:
            raise _unknown_family(
                student, f"its final hidden states differ from norm(layers) by {error:.3g}"
            )

    def own_losses(self, hidden_TD: Float[Tensor, "tokens hidden"]) -> Float[Tensor, " tokens"]:
        """Return each token's own loss from final hidden states; 0 for the last token."""
        cross_entropy_T = F.cross_entropy(
            self.head.logits(hidden_TD), self.target, reduction="none"
        )
        return (cross_entropy_T - self.entropy_T).masked_fill(~self.has_loss_T, 0)

    def truth(
        self, layer: int, advance: Callable[[int], None] = lambda _: None
    ) -> Float[Tensor, "tokens experts"]:
        """Return each expert's worth to each token: the token's loss without it less that with it.

        The worth is in nats and positive if the expert helps; it is 0 for the last token.

        Args:
            layer: the probed layer.
            advance: a function called with the number of experts done since its last call.
        """
        bank = self._bank(layer)
        num_tokens, num_experts = len(self.has_loss_T), bank.experts.num_experts
        size = max(1, BATCH_TOKENS // num_tokens - 1)
        columns, active_TE = [], None
        for experts in torch.arange(num_experts).split(size):
            hidden = self.calls[layer].hidden.expand(len(experts) + 1, -1, -1)
            with (
                torch.no_grad(),
                recorded_routings([bank]) as routings,
                bank.register_forward_hook(
                    flip := _Flip(experts.to(self.has_loss_T.device), routings)
                ),
            ):
                base_TD, *others = self._run(layer, hidden)
                base_T = self.own_losses(base_TD)
                columns += [self.own_losses(other_TD) - base_T for other_TD in others]
            active_TE = flip.active_TE
            advance(len(experts))
        assert active_TE is not None
        rise_TE = torch.stack(columns, dim=1)
        return torch.where(active_TE, rise_TE, -rise_TE)

    def surprise(
        self, layers: Sequence[int], kinds: Sequence[Surprise] = SURPRISES, *, own: bool = False
    ) -> dict[int, dict[str, Float[Tensor, "tokens experts"]]]:
        """Return the surprise that training measures, by layer and kind, at each expert's weight.

        An inactive expert has the weight that it would have if it were active. The cost is one
        forward pass and one backward pass per kind, through the code of the expert layer.

        Args:
            layers: the layers to measure.
            kinds: the kinds of surprise to measure.
            own: true for the surprise of each token's own loss alone; false for that of the sum of
                all tokens' losses, as in training, which includes the losses of later tokens that
                attend to this one.
        """
        # Routings are recorded in the order in which the layers are called.
        layers = sorted(layers)
        banks = [self._bank(layer) for layer in layers]
        num_tokens = len(self.has_loss_T)
        # As in training, the surprise of every candidate is captured at unit weight.
        rule = SmkRule(candidates="all")
        steps = [SmkStep(rule=rule, grad_scale=1.0, capture=[]) for _ in banks]
        first = layers[0]
        hidden = self.calls[first].hidden.expand(2 if own else 1, -1, -1)
        surprises: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
        with _capturing_surprise(banks, steps), torch.enable_grad():
            with recorded_routings(banks) as routings:
                final_TD = self._run(first, hidden, detach_past=own)[-1]
            grad_TD = self._loss_gradient(final_TD)
            for kind in kinds:
                for step in steps:
                    step.rule = replace(rule, surprise=kind)
                final_TD.backward(grad_TD, retain_graph=True)
                for layer, bank, step, routing in zip(layers, banks, steps, routings, strict=True):
                    assert step.capture is not None
                    last_TE = step.capture.pop()[-num_tokens:]
                    weights_TE = would_be_weights(routing, bank)[-num_tokens:]
                    surprises[layer][kind] = last_TE.detach() * weights_TE
        return surprises

    def mlp_input(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the MLP's input (T, D) and the active experts (T, E) of a layer."""
        mlp_inputs: list[Tensor] = []
        bank = self._bank(layer)
        hook = bank.register_forward_pre_hook(lambda _, inputs: mlp_inputs.append(inputs[0]))
        with hook, torch.no_grad(), recorded_routings([bank]) as routings:
            self._layer(layer, self.calls[layer].hidden)
        return mlp_inputs[0][0], routings[0].active

    def _bank(self, layer: int) -> ExpertBank:
        return self.student.banks()[layer]

    def _run(self, first: int, hidden: Tensor, *, detach_past: bool = False) -> Tensor:
        """Return the final hidden states (C, T, D) from the input of layer `first`."""
        for layer in range(first, len(self.layers)):
            if detach_past:
                # The other copies attend to copy 0, which is constant here, so that a token's loss
                # has no gradient with respect to other tokens.
                hidden = torch.cat((hidden[:1].detach(), hidden[1:]))
            hidden = self._layer(layer, hidden)
        return self.student.backbone.base_model.norm(hidden)  # pyright: ignore[reportCallIssue]

    def _layer(self, layer: int, hidden: Tensor) -> Tensor:
        call = self.calls[layer]
        output = self.layers[layer](hidden, *call.rest, **call.named)
        return output[0] if isinstance(output, tuple) else output

    def _loss_gradient(self, hidden_TD: Tensor) -> Tensor:
        """Return the gradient of the sum of own losses, with respect to the final hidden states."""
        leaf_TD = hidden_TD.detach().requires_grad_()
        self.own_losses(leaf_TD).sum().backward()
        assert leaf_TD.grad is not None
        return leaf_TD.grad


class _Flip:
    """A bank's forward hook that flips expert `experts[c]` for every token of copy c + 1.

    Args:
        experts: the experts to flip, one for each copy but the first.
        routings: the recorded routings of the bank's calls.
    """

    def __init__(self, experts: Tensor, routings: list[Routing]) -> None:
        self.experts, self.routings = experts, routings
        self.active_TE: Tensor | None = None

    def __call__(self, bank: ExpertBank, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        routing = self.routings[-1]
        num_tokens = inputs[0].shape[1]
        weights_TE = would_be_weights(routing, bank)[:num_tokens]
        self.active_TE = routing.active[:num_tokens]
        x_TD = inputs[0][0]
        changes = [torch.zeros_like(output[0])]
        for e in self.experts:
            gate_ID, up_ID = bank.experts.gate_up_proj[e].to(x_TD.dtype).chunk(2)
            hidden_TI = bank.activation(x_TD @ gate_ID.T) * (x_TD @ up_ID.T)
            signed_T1 = torch.where(self.active_TE[:, e], -weights_TE[:, e], weights_TE[:, e])
            change_TD = hidden_TI @ bank.experts.down_proj[e].to(x_TD.dtype).T * signed_T1[:, None]
            if bank.mean_outputs is not None:
                # The expert's mean output stands in for it while it is inactive.
                added_T1 = torch.where(self.active_TE[:, e, None], 1.0, -1.0)
                change_TD = change_TD + added_T1 * bank.mean_outputs[e].to(x_TD.dtype)
            changes.append(change_TD)
        return output[:1] + torch.stack(changes)


def would_be_weights(routing: Routing, bank: ExpertBank) -> Float[Tensor, "tokens experts"]:
    """Return the weight of each active expert, and of each inactive one if it were active too."""
    S = bank.router.rule.num_shared
    logits_TE = routed(routing.router_logits.detach(), S)
    columns = []
    for e in range(logits_TE.shape[1]):
        joined_TE = routed(routing.active, S).clone()
        joined_TE[:, e] = True
        weights_TE = routing_weights(logits_TE, joined_TE, bank.router.rule.weighting)
        columns.append(weights_TE[:, e])
    weights_TE = with_shared(torch.stack(columns, dim=1), S, 1.0)
    return weights_TE if bank.expert_scale is None else weights_TE * bank.expert_scale


def _layer_calls(
    student: TinyOnnForCausalLM, layers: Sequence[nn.Module], input_ids: Tensor
) -> tuple[list[_Call], Tensor]:
    """Record the arguments of each layer on a document, and return its final states (T, D) too."""
    calls: list[_Call] = []

    def note(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        rest, named = inputs[1:], dict(named)
        hidden = inputs[0] if inputs else named.pop("hidden_states")
        calls.append(_Call(hidden=hidden, rest=rest, named=named))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
        final = last_hidden_states(student, input_ids)
    return calls, final[0]


def _unknown_family(student: TinyOnnForCausalLM, reason: str) -> UserError:
    return UserError(
        f"architecture {type(student.backbone).__name__}: {reason}, expected layers and a final "
        "norm alone; probe does not know this family"
    )


@contextmanager
def _capturing_surprise(banks: Sequence[ExpertBank], steps: Sequence[SmkStep]) -> Iterator[None]:
    """Capture surprise in the banks' backward passes, by the dense path, within the context."""
    before = [(bank.execution, bank.router.weight.requires_grad) for bank in banks]
    for bank in banks:
        bank.set_execution(replace(bank.execution, path="dense"))
        bank.router.requires_grad_(True)
    try:
        with row_context(banks, [RowState(smk=step) for step in steps]):
            yield
    finally:
        for bank, (execution, needed) in zip(banks, before, strict=True):
            bank.set_execution(execution)
            bank.router.requires_grad_(needed)
            bank.router.zero_grad(set_to_none=True)
