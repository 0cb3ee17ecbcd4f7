"""Auxiliary losses of gates that learn from the main loss: balanced loads and small logits.

Legend: T tokens, E experts.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn.config.schema import RouterConfig
from tiny_onn.model import dynmoe
from tiny_onn.model.experts import ExpertBank


def load_balancing_loss(
    router_logits: Sequence[Float[Tensor, "tokens experts"]],
    top_k: int,
    token_mask_T: Bool[Tensor, " tokens"],
) -> Float[Tensor, ""]:
    """Return `E * sum_e f_e P_e` over all layers' tokens together, as in transformers' Mixtral.

    f_e is the share of counted tokens whose k largest probabilities include expert e, so that the
    f_e sum to k. P_e is the mean probability of e. Source: Switch Transformer, arXiv 2101.03961,
    equations 4-6.
    """
    probs = torch.cat([logits_TE[token_mask_T] for logits_TE in router_logits]).softmax(-1)
    chosen = probs.topk(top_k, dim=-1).indices
    share_E = F.one_hot(chosen, probs.shape[-1]).float().sum(1).mean(0)
    return (share_E * probs.mean(0)).sum() * probs.shape[-1]


def z_loss(
    router_logits: Sequence[Float[Tensor, "tokens experts"]],
    token_mask_T: Bool[Tensor, " tokens"],
) -> Float[Tensor, ""]:
    """Return the mean squared log-partition of the router logits.

    Source: ST-MoE, arXiv 2202.08906, equation 5.
    """
    logits = torch.cat([logits_TE[token_mask_T] for logits_TE in router_logits])
    return logits.logsumexp(-1).square().mean()


def gate_losses(banks: Sequence[ExpertBank], config: RouterConfig) -> Float[Tensor, ""]:
    """Return DynMoE's diversity and simplicity loss, summed over layers and weighted."""
    losses = [dynmoe.diversity_and_simplicity(bank.router.weight.float()) for bank in banks]
    return config.diversity_coef * torch.stack(losses).sum()
