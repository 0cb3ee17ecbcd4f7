"""DynMoE's top-any gate: every token activates the experts whose own threshold it passes.

With unit vectors for the token and the experts' prototypes, temperature tau and thresholds G,

    s_e = <x, w_e> / (|x| |w_e|)        g_e = sign(relu(sigmoid(tau s_e) - sigmoid(tau G_e)))
    k = sum_e g_e                        y = (1 / max(k, 1)) sum_e g_e E_e(x)

The sign passes its gradient straight through to the active experts' differences, and k has no
gradient. A token that passes no threshold gets no expert in training, and the expert of the largest
s at evaluation.

Source: Guo et al., "Dynamic Mixture of Experts", arXiv 2405.14297, section 3.1 (gate and its loss)
and 3.2 (adaptive number of experts). Three details that the paper leaves open come from the
authors' code, github.com/LINs-lab/DynMoE: the temperature, the gradient of active experts only, and
normalised prototypes in the diversity loss.

Legend: T tokens, D hidden, E experts.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

# The authors' code starts language models at a temperature of 1 / 0.1, and bounds it by 100.
START_LOG_TEMPERATURE = math.log(10.0)
MAX_LOG_TEMPERATURE = math.log(100.0)


def similarity(
    x_TD: Float[Tensor, "tokens hidden"], prototypes_ED: Float[Tensor, "experts hidden"]
) -> Float[Tensor, "tokens experts"]:
    """Return the cosine of every token and every prototype."""
    return F.linear(F.normalize(x_TD, dim=-1), F.normalize(prototypes_ED, dim=-1))


def temperature(log_temperature: Float[Tensor, " one"]) -> Float[Tensor, " one"]:
    """Return tau, at most 100."""
    return log_temperature.clamp(max=MAX_LOG_TEMPERATURE).exp()


def activate(
    similarity_TE: Float[Tensor, "tokens experts"],
    logits_TE: Float[Tensor, "tokens experts"],
    *,
    at_least_one: bool,
) -> Bool[Tensor, "tokens experts"]:
    """Activate the experts whose logit `tau (s - G)`, selection bias included, is positive.

    That means `sigmoid(tau s) > sigmoid(tau G)`, except for sigmoids that round to one number.

    Args:
        similarity_TE: the cosines, which decide for a token without a positive logit.
        logits_TE: the logits.
        at_least_one: whether a token without a positive logit gets its most similar expert.
    """
    active_TE = logits_TE > 0
    if at_least_one:
        none_T1 = ~active_TE.any(-1, keepdim=True)
        nearest_T1 = similarity_TE.argmax(-1, keepdim=True)
        active_TE = active_TE.scatter(-1, nearest_T1, active_TE.gather(-1, nearest_T1) | none_T1)
    return active_TE


def straight_weights(
    similarity_TE: Float[Tensor, "tokens experts"],
    thresholds_E: Float[Tensor, " experts"],
    tau: Float[Tensor, " one"],
    active_TE: Bool[Tensor, "tokens experts"],
    *,
    mean: bool,
) -> Float[Tensor, "tokens experts"]:
    """Return weights of 1 (or 1 / k with `mean`) where active and 0 elsewhere.

    Their gradient is that of `sigmoid(tau s) - sigmoid(tau G)` of the active experts.
    """
    passed_TE = torch.sigmoid(tau * similarity_TE) - torch.sigmoid(tau * thresholds_E)
    weights_TE = (1 + passed_TE - passed_TE.detach()) * active_TE
    if mean:
        weights_TE = weights_TE / active_TE.sum(-1, keepdim=True).clamp_min(1)
    return weights_TE


def diversity_and_simplicity(
    prototypes_ED: Float[Tensor, "experts hidden"],
) -> Float[Tensor, ""]:
    """Return `|W W^T - 1|_F + mean_e |w_e|`, the first term with W's rows at unit length.

    The first term keeps prototypes apart, the second keeps them short.
    """
    directions_ED = F.normalize(prototypes_ED, dim=-1)
    identity_EE = torch.eye(len(prototypes_ED), device=prototypes_ED.device)
    overlap = torch.linalg.matrix_norm(directions_ED @ directions_ED.T - identity_EE)
    return overlap + prototypes_ED.norm(dim=-1).mean()


def orthogonal_prototypes(
    num_experts: int, hidden_dim: int, generator: torch.Generator
) -> Float[Tensor, "experts hidden"]:
    """Draw random unit rows on the CPU, orthogonal within blocks of `hidden_dim` rows."""
    blocks = []
    for start in range(0, num_experts, hidden_dim):
        size = min(hidden_dim, num_experts - start)
        columns, _ = torch.linalg.qr(torch.randn(hidden_dim, size, generator=generator))
        blocks.append(columns.T)
    return torch.cat(blocks)


def reseed(
    prototypes_ED: Float[Tensor, "experts hidden"],
    thresholds_E: Float[Tensor, " experts"],
    loads_E: Float[Tensor, " experts"],
    idle_input_D: Float[Tensor, " hidden"],
) -> tuple[Float[Tensor, "experts hidden"], Float[Tensor, " experts"]]:
    """Return prototypes and thresholds with one expert re-seeded, without waiting for the device.

    Algorithm 1 of the paper removes experts that no token used and adds an expert with
    `w = R_S / |R_S|` and `G = 0`, where R_S is the sum of the inputs that activated no expert, if
    there were any. Here the number of experts is fixed: the first unused expert becomes the new
    one. Nothing changes if every expert was used, or if every input activated one.

    Args:
        prototypes_ED: one row per expert.
        thresholds_E: each expert's threshold G.
        loads_E: number of tokens that used each expert in the recorded window.
        idle_input_D: sum of the inputs in the window that activated no expert.
    """
    dead_E = loads_E == 0
    first_E = dead_E & (dead_E.cumsum(0) == 1) & (idle_input_D.norm() > 0)
    new_D = F.normalize(idle_input_D, dim=0)
    return (
        torch.where(first_E[:, None], new_D, prototypes_ED),
        torch.where(first_E, 0.0, thresholds_E),
    )
