"""Sums over tokens of what the routers did: on the device, read once per record.

Legend: L layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiny_onn.experts import ExpertBank


@dataclass(kw_only=True, slots=True)
class RoutingStats:
    """Counted tokens, and per layer the sums of k, of k squared, and each expert's load."""

    num_tokens: Float[Tensor, ""]
    k_L: Float[Tensor, " layers"]  # noqa: N815 - shape suffix
    k_squared_L: Float[Tensor, " layers"]  # noqa: N815
    load_LE: Float[Tensor, "layers experts"]  # noqa: N815

    @staticmethod
    def zeros(banks: Sequence[ExpertBank]) -> "RoutingStats":
        """Empty sums for these layers."""
        num_experts, device = banks[0].router.weight.shape[0], banks[0].router.weight.device
        return RoutingStats(
            num_tokens=torch.zeros((), device=device),
            k_L=torch.zeros(len(banks), device=device),
            k_squared_L=torch.zeros(len(banks), device=device),
            load_LE=torch.zeros(len(banks), num_experts, device=device),
        )

    @torch.no_grad()
    def add(self, banks: Sequence[ExpertBank], token_mask_T: Bool[Tensor, " tokens"]) -> None:
        """Count the banks' last routing."""
        self.num_tokens += token_mask_T.sum()
        for layer, bank in enumerate(banks):
            assert bank.routing is not None
            active_TE = bank.routing.active & token_mask_T[:, None]
            k_T = active_TE.sum(-1).float()
            self.k_L[layer] += k_T.sum()
            self.k_squared_L[layer] += k_T.square().sum()
            self.load_LE[layer] += active_TE.sum(0)

    def summary(self) -> dict[str, float]:
        """Mean k over layers and tokens, its standard deviation over tokens, and more."""
        num_tokens = self.num_tokens.clamp_min(1)
        mean_L = self.k_L / num_tokens
        variance_L = (self.k_squared_L / num_tokens - mean_L.square()).clamp_min(0)
        share_LE = self.load_LE / self.load_LE.sum(-1, keepdim=True).clamp_min(1)
        entropy_L = -torch.xlogy(share_LE, share_LE).sum(-1)
        return {
            "mean_k": mean_L.mean().item(),
            "std_k": variance_L.sqrt().mean().item(),
            "min_layer_k": mean_L.min().item(),
            "max_layer_k": mean_L.max().item(),
            "dead_experts": float((self.load_LE == 0).sum().item()),
            "load_entropy": entropy_L.mean().item(),
        }
