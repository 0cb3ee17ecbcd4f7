"""Routing statistics: sums over tokens that stay on the device and are read once per record.

The tokens of `router_mask` are the counted ones. The first token of each document, whose
activations are thousands of times larger, is counted apart. Only `summary`, `layers` and `counts`
wait for the device.

Cost: per layer and row a few passes over (T, E) tables. `OracleStats` costs a forward pass of the
experts (two of the three matrix products and a Gram matrix), so only evaluations use it.

Legend: T tokens, D hidden, E experts, L layers, K = E + 1 possible numbers of active experts.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tiny_onn.data.packing import PackedRow
from tiny_onn.model.experts import ExpertBank, expert_norms, recorded_routings
from tiny_onn.model.router import Routing
from tiny_onn.ops.shared_experts import routed
from tiny_onn.routing.thresholds import layer_groups

# The oracle holds the hidden activations of so many tokens at once, in float32.
ORACLE_CHUNK_TOKENS = 2048


@dataclass(kw_only=True, slots=True)
class RoutingStats:
    """Counts and sums of one step or evaluation, which add up tensor by tensor."""

    num_tokens: Int[Tensor, ""]
    """Number of counted tokens."""
    num_first: Int[Tensor, ""]
    """Number of documents' first tokens, which are not among the counted ones."""
    k_histogram_LK: Int[Tensor, "layers experts_plus_one"]
    """Number of counted tokens with 0, 1, ... E active experts."""
    load_LE: Int[Tensor, "layers experts"]
    """Number of counted tokens that activated the expert."""
    first_load_LE: Int[Tensor, "layers experts"]
    """Number of first tokens that activated the expert."""
    gate_entropy_L: Float[Tensor, " layers"]
    """Sum over counted tokens of the entropy of the softmax of the logits, nats."""
    ties_L: Int[Tensor, " layers"]
    """Number of counted tokens with a tie at the border, see `border_ties`."""
    num_shared: int
    """Number of shared experts of each layer, S. They count as active experts, but statistics about
    choices leave them out."""

    @staticmethod
    def zeros(banks: Sequence[ExpertBank]) -> "RoutingStats":
        """Return empty sums for these layers."""
        L, (E, _), device = len(banks), banks[0].router.weight.shape, banks[0].router.weight.device
        count = partial(torch.zeros, device=device, dtype=torch.int64)
        return RoutingStats(
            num_tokens=count(()),
            num_first=count(()),
            k_histogram_LK=count(L, E + 1),
            load_LE=count(L, E),
            first_load_LE=count(L, E),
            gate_entropy_L=torch.zeros(L, device=device),
            ties_L=count(L),
            num_shared=banks[0].router.rule.num_shared,
        )

    def add(self, routings: Sequence[Routing], row: PackedRow) -> None:
        """Count a row and the routing of all layers on it."""
        assert len(routings) == len(self.load_LE)
        self.add_tokens(row)
        self.add_layers(routings, row)

    @torch.no_grad()
    def add_stats(self, other: "RoutingStats") -> None:
        """Add the counts and sums of other rows."""
        for total, part in zip(self.tensors(), other.tensors(), strict=True):
            total.add_(part)

    def tensors(self) -> list[Tensor]:
        """Return the counts and sums, which add up over rows and over processes."""
        values = (getattr(self, field.name) for field in fields(self))
        return [value for value in values if isinstance(value, Tensor)]

    @torch.no_grad()
    def add_tokens(self, row: PackedRow) -> None:
        """Count a row's tokens; `add_layers` counts its layers."""
        self.num_tokens += row.router_mask.sum()
        self.num_first += first_tokens(row).sum()

    @torch.no_grad()
    def add_layers(self, routings: Sequence[Routing], row: PackedRow, first_layer: int = 0) -> None:
        """Count the routing of some layers, from `first_layer` on, on a row."""
        elements = row.labels.numel() * self.load_LE.shape[1]
        for some in layer_groups(len(routings), elements):
            group = routings[some]
            start = first_layer + some.start
            self._add_group(slice(start, start + len(group)), group, row)

    def _add_group(self, layers: slice, routings: Sequence[Routing], row: PackedRow) -> None:
        mask_T, first_T = row.router_mask[0], first_tokens(row)
        numbers_K = torch.arange(self.k_histogram_LK.shape[1], device=mask_T.device)
        active_LTE = torch.stack([routing.active for routing in routings])
        has_k_LTK = active_LTE.sum(-1)[..., None] == numbers_K
        self.k_histogram_LK[layers] += (has_k_LTK & mask_T[:, None]).sum(1)
        self.load_LE[layers] += (active_LTE & mask_T[:, None]).sum(1)
        self.first_load_LE[layers] += (active_LTE & first_T[:, None]).sum(1)
        active_LTR = routed(active_LTE, self.num_shared)
        logits = [routed(routing.router_logits, self.num_shared) for routing in routings]
        logits_LTR = torch.stack(logits)
        entropy_LT = torch.special.entr(logits_LTR.softmax(-1)).sum(-1)
        self.gate_entropy_L[layers] += torch.where(mask_T, entropy_LT, 0).sum(-1)
        self.ties_L[layers] += (border_ties(logits_LTR, active_LTR) & mask_T).sum(-1)

    def summary(self) -> dict[str, float]:
        """Return the fields of `RoutingSummary`."""
        layers = self.layers()
        mean_k, load_LE = layers["mean_k"], self.load_LE.cpu()
        return {
            "mean_k": _mean(mean_k),
            "std_k": _mean(layers["std_k"]),
            "min_layer_k": min(mean_k),
            "max_layer_k": max(mean_k),
            "zero_expert_rate": _mean(layers["zero_expert_rate"]),
            "dead_experts": float((load_LE == 0).sum()),
            "load_entropy": _mean(layers["load_entropy"]),
            "max_load_share": max(layers["max_load_share"]),
            "gate_entropy": _mean(layers["gate_entropy"]),
            "tie_rate": _mean(layers["tie_rate"]),
            "first_mean_k": _mean(layers["first_mean_k"]),
        }

    def layers(self) -> dict[str, list[float]]:
        """Return the statistics with one number per layer: fields of `records.LayersRecord`."""
        num_tokens, num_first = (max(1, int(n)) for n in (self.num_tokens, self.num_first))
        histogram_LK, load_LE = self.k_histogram_LK.double().cpu(), self.load_LE.double().cpu()
        numbers_K = torch.arange(histogram_LK.shape[1], dtype=torch.float64)
        mean_L = histogram_LK @ numbers_K / num_tokens
        variance_L = histogram_LK @ numbers_K.square() / num_tokens - mean_L.square()
        load_LE = routed(load_LE, self.num_shared)
        share_LE = load_LE / load_LE.sum(-1, keepdim=True).clamp_min(1)
        per_layer = {
            "mean_k": mean_L,
            "std_k": variance_L.clamp_min(0).sqrt(),
            "zero_expert_rate": histogram_LK[:, 0] / num_tokens,
            "load_entropy": torch.special.entr(share_LE).sum(-1),
            "max_load_share": share_LE.amax(-1),
            "gate_entropy": self.gate_entropy_L.double().cpu() / num_tokens,
            "tie_rate": self.ties_L.double().cpu() / num_tokens,
            "first_mean_k": self.first_load_LE.double().cpu().sum(-1) / num_first,
        }
        return {name: values_L.tolist() for name, values_L in per_layer.items()}

    def counts(self) -> dict[str, int | list[list[int]]]:
        """Return the counts: fields of `records.LayersRecord`."""
        return {
            "num_tokens": int(self.num_tokens),
            "num_first": int(self.num_first),
            "load": self.load_LE.tolist(),
            "first_load": self.first_load_LE.tolist(),
            "k_histogram": self.k_histogram_LK.tolist(),
        }


def first_tokens(row: PackedRow) -> Bool[Tensor, " tokens"]:
    """Return True at the first token of each fragment of text, and nowhere in padding.

    A fragment has at least two tokens, so that its first one has a label, which padding has not.
    """
    return row.loss_mask[0] & ~row.router_mask[0]


def border_ties(
    logits: Float[Tensor, "*layers tokens experts"], active: Bool[Tensor, "*layers tokens experts"]
) -> Bool[Tensor, "*layers tokens"]:
    """Return True at tokens whose lowest active logit equals their highest inactive one.

    At a tie the order of the experts, not the gate, decided which of them is active. A token
    without active or without inactive experts has no tie.
    """
    lowest = logits.masked_fill(~active, math.inf).amin(-1)
    highest = logits.masked_fill(active, -math.inf).amax(-1)
    return lowest == highest


@dataclass(kw_only=True, slots=True)
class OracleStats:
    """A comparison of each token's k active experts with an oracle's, the k largest `|expert(x)|`.

    Overlap and chance leave the shared experts out, because they are no choice.
    """

    num_tokens: Int[Tensor, " layers"]
    """Number of counted tokens with at least one active expert."""
    overlap_L: Float[Tensor, " layers"]
    """Sum over these tokens of the share of the active experts that the oracle picks too."""
    chance_L: Float[Tensor, " layers"]
    """Sum over these tokens of k / E, the mean overlap of a random set of k."""
    norm_L: Float[Tensor, " layers"]
    """Sum over these tokens of the mean norm of their active experts' outputs, unweighted."""

    @staticmethod
    def zeros(banks: Sequence[ExpertBank]) -> "OracleStats":
        """Return empty sums for these layers."""
        L, device = len(banks), banks[0].router.weight.device
        return OracleStats(
            num_tokens=torch.zeros(L, device=device, dtype=torch.int64),
            overlap_L=torch.zeros(L, device=device),
            chance_L=torch.zeros(L, device=device),
            norm_L=torch.zeros(L, device=device),
        )

    @torch.no_grad()
    def add(
        self,
        layer: int,
        norms_TE: Float[Tensor, "tokens experts"],
        active_TE: Bool[Tensor, "tokens experts"],
        token_mask_T: Bool[Tensor, " tokens"],
        *,
        num_shared: int = 0,
    ) -> None:
        """Count one layer's tokens."""
        norm_T = torch.where(active_TE, norms_TE, 0).sum(-1) / active_TE.sum(-1).clamp_min(1)
        active_TE, norms_TE = (routed(t_TE, num_shared) for t_TE in (active_TE, norms_TE))
        k_T = active_TE.sum(-1)
        mask_T = token_mask_T & (k_T > 0)
        order_TE = norms_TE.argsort(dim=-1, descending=True, stable=True)
        ranked_TE = active_TE.gather(-1, order_TE)
        ranks_E = torch.arange(norms_TE.shape[1], device=norms_TE.device)
        hits_T = (ranked_TE & (ranks_E < k_T[:, None])).sum(-1)
        divisor_T = k_T.clamp_min(1)
        self.num_tokens[layer] += mask_T.sum()
        self.overlap_L[layer] += torch.where(mask_T, hits_T / divisor_T, 0).sum()
        self.chance_L[layer] += torch.where(mask_T, k_T / norms_TE.shape[1], 0).sum()
        self.norm_L[layer] += torch.where(mask_T, norm_T, 0).sum()

    def watch(
        self, banks: Sequence[ExpertBank], token_mask_T: Bool[Tensor, " tokens"]
    ) -> AbstractContextManager[object]:
        """Return a context that counts every forward pass of the banks, each of one row."""

        def hook(
            layer: int,
            routings: list[Routing],
            bank: ExpertBank,
            inputs: tuple[Tensor, ...],
            _: Tensor,
        ) -> None:
            parts = inputs[0].flatten(0, -2).split(ORACLE_CHUNK_TOKENS)
            norms_TE = torch.cat([expert_norms(bank, x_TD) for x_TD in parts])
            S = bank.router.rule.num_shared
            self.add(layer, norms_TE, routings.pop().active, token_mask_T, num_shared=S)

        stack = ExitStack()
        for layer, bank in enumerate(banks):
            routings = stack.enter_context(recorded_routings([bank]))
            count: Callable[..., None] = partial(hook, layer, routings)
            stack.enter_context(bank.register_forward_hook(count))
        return stack

    def layers(self) -> dict[str, list[float]]:
        """Return each layer's overlap, its chance level and the mean norm of an active expert.

        Overlap and chance are between 0 and 1. All three are 0 in a layer that activates no expert.
        """
        num_tokens = self.num_tokens.clamp_min(1).double().cpu()
        sums = {
            "oracle_overlap": self.overlap_L,
            "oracle_chance": self.chance_L,
            "expert_norm": self.norm_L,
        }
        return {name: (s.double().cpu() / num_tokens).tolist() for name, s in sums.items()}

    def summary(self) -> dict[str, float]:
        """Return overlap and chance as means over layers, and the smallest norm of a layer."""
        layers = self.layers()
        return {
            "oracle_overlap": _mean(layers["oracle_overlap"]),
            "oracle_chance": _mean(layers["oracle_chance"]),
            "min_expert_norm": min(layers["expert_norm"]),
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
