"""DynMoE's top-any gate: every token activates the experts whose own threshold it passes.

With unit vectors for the token and the experts' prototypes, temperature tau and thresholds G,

    s_e = <x, w_e> / (|x| |w_e|)        g_e = sign(relu(sigmoid(tau s_e) - sigmoid(tau G_e)))
    k = sum_e g_e                        y = (1 / max(k, 1)) sum_e g_e E_e(x)

The sign passes its gradient straight through to the active experts' differences; k has none. A
token that passes no threshold gets no expert in training; at evaluation the one of the largest s.

Source: Guo et al., "Dynamic Mixture of Experts", arXiv 2405.14297, section 3.1 (gate and its loss)
and 3.2 (adaptive number of experts), and the authors' code, github.com/LINs-lab/DynMoE, where the
paper is silent: the temperature, the gradient of active experts only, and normalised prototypes in
the diversity loss.

Legend: T tokens, D hidden, E experts.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

# The authors' starting temperature for language models, 1 / 0.1, and their largest.
START_LOG_TEMPERATURE = math.log(10.0)
MAX_LOG_TEMPERATURE = math.log(100.0)


def similarity(
    x_TD: Float[Tensor, "tokens hidden"], prototypes_ED: Float[Tensor, "experts hidden"]
) -> Float[Tensor, "tokens experts"]:
    """Cosine of every token and every prototype."""
    return F.linear(F.normalize(x_TD, dim=-1), F.normalize(prototypes_ED, dim=-1))


def temperature(log_temperature: Float[Tensor, " one"]) -> Float[Tensor, " one"]:
    """tau, at most 100."""
    return log_temperature.clamp(max=MAX_LOG_TEMPERATURE).exp()


def activate(
    similarity_TE: Float[Tensor, "tokens experts"],
    logits_TE: Float[Tensor, "tokens experts"],
    *,
    at_least_one: bool,
) -> Bool[Tensor, "tokens experts"]:
    """Experts whose logit `tau (s - G)`, selection bias included, is positive.

    That is `sigmoid(tau s) > sigmoid(tau G)`, but for sigmoids that round to the same number.

    Args:
        similarity_TE: what decides for a token that has none.
        logits_TE: what is compared with 0.
        at_least_one: whether such a token gets its most similar expert.
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
    """1 (or 1 / k) where active and 0 elsewhere.

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
    """`|W W^T - 1|_F + mean_e |w_e|`, the first with rows of unit length.

    The first term keeps prototypes apart, the second keeps them short.
    """
    directions_ED = F.normalize(prototypes_ED, dim=-1)
    identity_EE = torch.eye(len(prototypes_ED), device=prototypes_ED.device)
    overlap = torch.linalg.matrix_norm(directions_ED @ directions_ED.T - identity_EE)
    return overlap + prototypes_ED.norm(dim=-1).mean()


def orthogonal_prototypes(
    num_experts: int, hidden_dim: int, generator: torch.Generator
) -> Float[Tensor, "experts hidden"]:
    """Random unit rows, orthogonal in blocks of as many as fit, on the CPU."""
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
    """Prototypes and thresholds with one expert re-seeded, without waiting for the device.

    Algorithm 1 of the paper removes experts that nobody used and adds one, `w = R_S / |R_S|`,
    `G = 0`, if there was input that activated none (R_S is its sum). Here the size is fixed: the
    first unused expert becomes the new one; nothing happens without one, or without such input.

    Args:
        prototypes_ED: one row per expert.
        thresholds_E: G.
        loads_E: tokens that used each expert in the recorded window.
        idle_input_D: the sum of the inputs that activated none in it.
    """
    dead_E = loads_E == 0
    first_E = dead_E & (dead_E.cumsum(0) == 1) & (idle_input_D.norm() > 0)
    new_D = F.normalize(idle_input_D, dim=0)
    return (
        torch.where(first_E[:, None], new_D, prototypes_ED),
        torch.where(first_E, 0.0, thresholds_E),
    )
