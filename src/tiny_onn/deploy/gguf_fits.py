"""Linear maps fitted to a student's own choices, for engines whose gates have no bias.

A layer's inputs have a large mean, so that a linear map without an intercept can nearly be a
constant, and so nearly any affine map. Two things are fitted on text: a gate that is positive where
the student activates an expert, and a neuron whose activation is 1.

Legend: T tokens, D hidden, E experts, S of them shared, R = E - S routed.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tiny_onn.console import track
from tiny_onn.deploy.exporting import Job, measured_rows, reading_documents
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import last_hidden_states
from tiny_onn.model.experts import ExpertBank

RIDGE = 1e-4
FITTED = 0.8
"""Share of the tokens that are fitted to; the rest measures the fit."""
STEEPNESS = 8.0
"""The value of the constant neuron before its activation; silu(8) is 7.997."""
COVERED = 0.99
"""Share of the tokens, over all layers, whose experts fit into the places that a gate leaves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant:
    """A neuron whose activation `silu(u x) (v x)` is nearly 1 for every input of a layer."""

    u: Float[Tensor, " hidden"]
    v: Float[Tensor, " hidden"]
    error: float
    """Root mean square of its activation minus 1, on text that it was not fitted to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SignGate:
    """A linear gate without a bias whose logits are positive for the experts to activate."""

    weight: Float[Tensor, "routed hidden"]
    agreement: float
    """Share of the pairs of a token and a routed expert about which it agrees with the student's
    router, on text that it was not fitted to."""
    active: Float[Tensor, " tokens"]
    """Number of routed experts that the student activates, for every token."""


def layer_inputs(job: Job, what: str) -> list[Float[Tensor, "tokens hidden"]]:
    """Return the inputs of each layer's experts on text, padding left out.

    Args:
        job: the student.
        what: the quantity to be fitted, for the message where there is no text.

    Raises:
        UserError: there is no text, or it cannot be read.
    """
    rows = measured_rows(job, what)
    inputs: list[list[Tensor]] = [[] for _ in job.banks]

    def keep(kept: list[Tensor], _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        kept.append(arguments[0].flatten(0, -2))

    hooks = [
        bank.register_forward_pre_hook(partial(keep, kept))
        for bank, kept in zip(job.banks, inputs, strict=True)
    ]
    try:
        with torch.no_grad(), reading_documents(job.student):
            for row in track(rows, "inputs of experts, rows"):
                last_hidden_states(job.student, row.input_ids, **packed_kwargs(row))
    finally:
        for hook in hooks:
            hook.remove()
    mask_T = torch.cat([row.loss_mask[0] | row.router_mask[0] for row in rows])
    return [torch.cat(kept)[mask_T] for kept in inputs]


@torch.no_grad()
def fit_constant(x_TD: Float[Tensor, "tokens hidden"]) -> Constant:
    """Return the neuron that is nearly 1 on these inputs.

    Two linear regressions give it: u x on `STEEPNESS`, then v x on 1 / silu(u x).
    """
    fitted_TD, rest_TD = _split(x_TD)
    ones_T = torch.ones(len(fitted_TD))
    u_D = _regression(fitted_TD, STEEPNESS * ones_T)
    v_D = _regression(fitted_TD * F.silu(fitted_TD @ u_D)[:, None], ones_T)
    errors_T = F.silu(rest_TD @ u_D) * (rest_TD @ v_D) - 1
    return Constant(u=u_D, v=v_D, error=errors_T.square().mean().sqrt().item())


@torch.no_grad()
def fit_sign_gate(bank: ExpertBank, x_TD: Float[Tensor, "tokens hidden"]) -> SignGate:
    """Return the regression of `log p_e - log threshold` on these inputs, a row per routed expert.

    p is the router's softmax. It is the normaliser and the biases that make the regression inexact.
    """
    router, num_shared = bank.router, bank.router.rule.num_shared
    fitted_TD, rest_TD = _split(x_TD)

    def targets(part_TD: Tensor) -> Tensor:
        logits_TE = F.linear(part_TD, router.weight.float(), router.bias.float())
        selecting_TR = (logits_TE + router.selection_bias)[:, num_shared:]
        return selecting_TR.log_softmax(-1) - router.settled.float().clamp_min(1e-20).log()

    weight_DR = _regression(fitted_TD, targets(fitted_TD))
    agree_TR = (rest_TD @ weight_DR > 0) == router(rest_TD).active[:, num_shared:]
    active_T = router(x_TD.float()).active[:, num_shared:].sum(-1)
    return SignGate(
        weight=weight_DR.T.contiguous(),
        agreement=agree_TR.float().mean().item(),
        active=active_T.float(),
    )


def places(gates: list[SignGate]) -> int:
    """Return the number of routed experts per token that covers `COVERED` of all tokens' choices.

    Quantiles beyond torch's limit of numbers are read from the sorted counts.
    """
    counts_N = torch.cat([gate.active for gate in gates]).sort().values
    return max(1, int(counts_N[math.ceil(COVERED * len(counts_N)) - 1]))


def _split(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens to fit to and the rest, in float32; one token serves as both."""
    num_fitted = max(1, int(FITTED * len(x_TD)))
    rest_TD = x_TD[num_fitted:] if num_fitted < len(x_TD) else x_TD
    return x_TD[:num_fitted].float(), rest_TD.float()


def _regression(x_TD: Tensor, targets: Tensor) -> Tensor:
    """Return the ridge regression of the targets, (T,) or (T, R), without an intercept."""
    x_TD, targets = x_TD.double(), targets.double()
    gram_DD = x_TD.T @ x_TD
    gram_DD.diagonal().add_(RIDGE * gram_DD.diagonal().mean())
    return torch.linalg.solve(gram_DD, x_TD.T @ targets).float()
