"""The gates' side of one update: their losses, their statistics, and changes without a gradient.

The experts learn from the main loss, in `step.distill_step` and `blockwise.blockwise_step`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tiny_onn.config.schema import RunConfig
from tiny_onn.data.packing import PackedRow
from tiny_onn.model.experts import ExpertBank, RowState, row_context
from tiny_onn.model.exploration import Exploration
from tiny_onn.model.router import Routing
from tiny_onn.ops.router_gradient import SmkStep, SurpriseTally
from tiny_onn.ops.shared_experts import routed
from tiny_onn.ops.surprise import SmkRule
from tiny_onn.parallel import ALONE, World
from tiny_onn.routing.losses import gate_losses, load_balancing_loss, z_loss
from tiny_onn.routing.statistics import RoutingStats
from tiny_onn.routing.steering import Steering


@dataclass(frozen=True, kw_only=True, slots=True)
class StepScales:
    """The numbers of a step by which sums over its rows become means.

    On a GPU they are tensors, which a captured graph reads anew at each replay.
    """

    loss_tokens: float | Tensor
    """Number of tokens over which the main loss is a mean, at least 1."""
    router_tokens: float | Tensor
    """Number of tokens that count in targets and statistics, at least 1."""
    grad_scale: float | Tensor
    """Factor of the routers' gradient: the coefficient of the SMK loss over `router_tokens`."""
    lesson_shift: int | Tensor
    """Number of steps before this one, by which a sampled lesson moves."""

    @staticmethod
    def of_rows(
        rows: Sequence[PackedRow],
        config: RunConfig,
        step: int,
        device: torch.device,
        *,
        labelled: bool,
    ) -> "StepScales":
        """Return the scales of a step on some rows, which should lie on the host.

        Args:
            rows: The rows of the update.
            config: The settings.
            step: Number of updates before this one.
            device: The banks' device.
            labelled: Whether the main loss is a mean over the tokens with a label; otherwise it is
                one over `router_tokens`.
        """
        router_tokens = max(1, sum(int(row.router_mask.sum()) for row in rows))
        loss_tokens = router_tokens
        if labelled:
            loss_tokens = max(1, sum(int(row.loss_mask.sum()) for row in rows))
        coef = config.smk.coef if config.router.objective == "smk" else 1.0
        grad_scale = coef / router_tokens
        if device.type != "cuda":
            return StepScales(
                loss_tokens=float(loss_tokens),
                router_tokens=float(router_tokens),
                grad_scale=grad_scale,
                lesson_shift=step,
            )
        floats = torch.tensor([loss_tokens, router_tokens, grad_scale], device=device).unbind()
        return StepScales(
            loss_tokens=floats[0],
            router_tokens=floats[1],
            grad_scale=floats[2],
            lesson_shift=torch.tensor(step, device=device),
        )


class GateStep:
    """The gates' side of one update, used by both stages in the same way.

        with gates.row(row):
            with recorded_routings(banks) as routings:
                ...  # the forward pass
            gates.observe(routings, row)
            (main_loss + gates.loss(routings, row)).backward()
        gates.finish(updated=True)  # after the optimizer

    Attributes:
        stats: Routing statistics of the rows so far.
        tallies: Each layer's surprise, to which backward passes add; empty if no gate is taught by
            surprise.
        scales: The numbers that make means of the rows' sums.

    Args:
        banks: The layers.
        config: The settings.
        scales: The scales of all the rows of the update.
        step: Number of updates before this one.
        world: The processes, of which each counts its share of the rows.
    """

    def __init__(
        self,
        banks: Sequence[ExpertBank],
        config: RunConfig,
        scales: StepScales,
        step: int,
        world: World = ALONE,
    ) -> None:
        self.banks, self.stats, self.scales = banks, RoutingStats.zeros(banks), scales
        self.tallies: list[SurpriseTally] = []
        self._config, self._step, self._world = config, step, world
        # This is the row's number in the step, from 1, whichever process has it.
        self._row_number = world.rank + 1 - world.size
        self._steering = Steering(banks, config.router, scales.router_tokens, step)
        self._smk: list[SmkStep | None] = [None] * len(banks)
        if (rule := smk_rule(config)) is not None:
            num_experts, device = banks[0].experts.num_experts, banks[0].router.weight.device
            self.tallies = SurpriseTally.of_layers(len(banks), num_experts, device)
            self._smk = [
                SmkStep(
                    rule=rule,
                    grad_scale=scales.grad_scale,
                    loss_scale=scales.loss_tokens,
                    tally=tally,
                    num_shared=config.experts.num_shared,
                    lesson_shift=scales.lesson_shift,
                    mean_outputs_ED=displaced(bank, config),
                )
                for bank, tally in zip(banks, self.tallies, strict=True)
            ]

    @contextmanager
    def row(self, row: PackedRow) -> Iterator[None]:
        """Count a row's tokens, and let the banks treat the passes in the context as this row's.

        Args:
            row: The row whose forward and backward pass run in the context, on the banks' device.
        """
        self._row_number += self._world.size
        self.stats.add_tokens(row)
        states = [
            RowState(
                token_mask=row.router_mask[0],
                smk=smk,
                exploration=self._exploration(layer),
                fills_window=self._config.router.reseed_every_steps > 0,
            )
            for layer, smk in enumerate(self._smk)
        ]
        with row_context(self.banks, states):
            yield

    def observe(self, routings: Sequence[Routing], row: PackedRow, first_layer: int = 0) -> None:
        """Count the routing of some layers, from `first_layer` on, for statistics and steering."""
        self.stats.add_layers(routings, row, first_layer)
        self._steering.observe(routings, row.router_mask[0], first_layer)

    def loss(
        self, routings: Sequence[Routing], row: PackedRow, first_layer: int = 0
    ) -> Tensor | float:
        """Return the gates' auxiliary loss on a row, for the layers from `first_layer` on.

        The objective `task` has one where it selects by `top_k` or `top_any`; otherwise it is 0.
        """
        router = self._config.router
        if router.objective == "task" and router.selection == "top_any":
            return gate_losses(self.banks[first_layer : first_layer + len(routings)], router)
        if router.objective != "task" or router.selection != "top_k":
            return 0.0
        num_shared = self._config.experts.num_shared
        logits = [routed(routing.router_logits, num_shared) for routing in routings]
        top_k = round(router.target_k) - num_shared
        balance = load_balancing_loss(logits, top_k, row.router_mask[0])
        penalty = z_loss(logits, row.router_mask[0])
        return router.load_balancing_coef * balance + router.z_loss_coef * penalty

    def add(self, row: "GateStep") -> None:
        """Add the sums of a row that was counted apart."""
        self.stats.add_stats(row.stats)
        if self.tallies:
            totals, parts = (
                [t for tally in of for t in tally] for of in (self.tallies, row.tallies)
            )
            torch._foreach_add_(totals, parts)  # pyright: ignore[reportPrivateImportUsage]
        self._steering.add(row._steering)

    def sums(self) -> list[Tensor]:
        """Return the tensors whose sums over all processes are those of the whole step."""
        tallies = [tensor for tally in self.tallies for tensor in tally]
        return [*self.stats.tensors(), *tallies, *self._steering.sums(self._world)]

    def finish(self, *, updated: bool) -> None:
        """Update what routers change without a gradient; undo the step if it did not update."""
        if updated:
            self._steering.update(self.stats.load_LE.float())
        else:
            self._steering.undo()

    def _exploration(self, layer: int) -> Exploration | None:
        if not (fraction := self._config.smk.explore_fraction):
            return None
        text = f"{self._config.train.seed} {self._step} {self._row_number} {layer}"
        digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
        return Exploration(fraction=fraction, seed=int.from_bytes(digest))


def displaced(bank: ExpertBank, config: RunConfig) -> Tensor | None:
    """Return the mean outputs that a net gain counts, without their graph; None if none are."""
    if not (config.router.objective == "smk" and config.smk.net_gain) or bank.mean_outputs is None:
        return None
    return bank.mean_outputs.detach()


def smk_rule(config: RunConfig) -> SmkRule | None:
    """Return the rule by which surprise teaches the gates; None if surprise does not teach them."""
    if config.router.objective == "regression":
        # D2DMoE, arXiv 2310.04361, section 3.3: the gate predicts the norms of all experts' outputs
        # by squared error. Logarithms keep layers with large outputs from dominating.
        return SmkRule(surprise="magnitude", direction="max", candidates="all", targets="log")
    if config.router.objective != "smk":
        return None
    smk = config.smk
    return SmkRule(
        surprise=smk.surprise,
        direction=smk.direction,
        candidates=smk.candidates,
        lesson_share=smk.lesson_share,
        targets=smk.targets,
        num_targets=round(config.router.target_k) - config.experts.num_shared,
    )
