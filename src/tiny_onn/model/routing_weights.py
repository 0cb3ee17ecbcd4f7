"""The weights of a token's active experts, and the gradient by which they teach the gate.

Legend: T tokens, E experts, k active experts of a token, theta the threshold of a budget.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn.config.schema import StraightThrough, Weighting

# The width, in nats of an expert's log probability, over which the weighting `ramp` rises and over
# which the estimator `threshold` smooths the step from inactive to active.
WIDTH = 0.25


def margins(
    logits_TE: Float[Tensor, "tokens experts"],
    threshold: Float[Tensor, ""] | Float[Tensor, "tokens 1"],
) -> Float[Tensor, "tokens experts"]:
    """Return `(log p - log theta) / WIDTH`, positive where a budget's threshold form activates.

    A threshold of 0 or below, which activates every expert, gives large margins.
    """
    smallest = torch.finfo(threshold.dtype).tiny
    return (logits_TE.log_softmax(-1) - threshold.clamp_min(smallest).log()) / WIDTH


def routing_weights(
    logits_TE: Float[Tensor, "tokens experts"],
    active_TE: Bool[Tensor, "tokens experts"],
    weighting: Weighting,
    straight_through: StraightThrough = "softmax",
    margin_TE: Float[Tensor, "tokens experts"] | None = None,
) -> Float[Tensor, "tokens experts"]:
    """Return the active experts' weights: 1, softmax, sigmoid, 1 / k, or a ramp from 0 to 1.

    `softmax` is renormalised over the active experts, and `sigmoid` is that of the logit. `ramp` is
    the hyperbolic tangent of the margin. It is 0 at the threshold, so that an expert comes and goes
    without a jump, and its gradient is that of the layer: ReLU routing (ReMoE, arXiv 2412.14711)
    that saturates at 1, the weight at which the experts of a dense model add up to it.

    Weights that do not depend on the logits (`unit`, `mean`) have no gradient of their own, and
    pass one straight through, for active and inactive experts alike. By `softmax` it is that of
    `E * p`: an expert's logit rises by what the expert would gain beyond the softmax-weighted mean.
    By `threshold` it is that of the sigmoid of the margin, which is largest for the experts next to
    the threshold, whose choice can change (Learn-To-be-Efficient, arXiv 2402.06126).

    Args:
        logits_TE: the gate's logits.
        active_TE: the active experts.
        weighting: the kind of weight.
        straight_through: the estimator for weights without a gradient of their own.
        margin_TE: what `margins` returns, for `ramp` and `threshold`.
    """
    if weighting == "softmax":
        active_probs_TE = logits_TE.softmax(-1) * active_TE
        return active_probs_TE / active_probs_TE.sum(-1, keepdim=True)
    if weighting == "sigmoid":
        return logits_TE.sigmoid() * active_TE
    if weighting == "ramp":
        assert margin_TE is not None
        return margin_TE.relu().tanh() * active_TE
    weights_TE = active_TE.to(logits_TE.dtype)
    # An estimator adds a gradient to the weights and 0 to their values.
    if torch.is_grad_enabled():
        if straight_through == "threshold":
            assert margin_TE is not None
            soft_TE = margin_TE.sigmoid()
        else:
            soft_TE = logits_TE.shape[-1] * logits_TE.softmax(-1)
        weights_TE = weights_TE + (soft_TE - soft_TE.detach())
    if weighting == "mean":
        weights_TE = weights_TE / active_TE.sum(-1, keepdim=True).clamp_min(1)
    return weights_TE
