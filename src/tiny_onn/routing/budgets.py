"""Running a student cheaper or dearer than it was trained: thresholds for every mean k.

At the end of training `tabulate` measures, per layer, the threshold that gives k experts a token on
average, for k = S + 1 ... E (S are shared), and keeps it in the router; `set_budget` reads it back,
with no text at hand. A layer's threshold depends on what the layers below hand it, and so on their
budgets: each pass over the text settles every layer at one k on the way up, and fills the table
around it.

Cost: `len(PASSES)` forward passes of about `TABLE_TOKENS` tokens, without the head.

Legend: T tokens, E experts, S of them shared.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from tiny_onn.config.schema import BudgetScope
from tiny_onn.console import track
from tiny_onn.data.packing import PackedRow
from tiny_onn.errors import UserError
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import last_hidden_states
from tiny_onn.model.experts import ExpertBank, recorded_routings
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.routing.thresholds import aims, exact_threshold, exact_thresholds, steer

TABLE_TOKENS = 1024
# Shares of the experts at which the layers are settled together; other k use the nearest pass.
PASSES = (0.75, 0.5, 0.375, 0.25, 0.125)


@torch.no_grad()
def tabulate(
    student: TinyOnnForCausalLM, rows: Sequence[PackedRow], scope: BudgetScope = "layer"
) -> None:
    """Fill every router's table of thresholds from text; what else the student has stays.

    Nothing is done for a selection that has no threshold.

    Args:
        student: at the end of its training.
        rows: text of the kind it will see; the first `TABLE_TOKENS` or so are read.
        scope: whether each layer has the budget, or all together.
    """
    banks = student.banks()
    if not banks[0].router.rule.has_budget:
        return
    row = _joined(rows).to(banks[0].router.weight.device)
    num_experts = banks[0].router.weight.shape[0]
    least = banks[0].router.rule.num_shared + 1
    passes = sorted({max(least, round(num_experts * share)) for share in PASSES})
    was_training = student.training
    student.train(False)
    with _thresholds_kept(banks):
        for k in track(passes, "table of budgets, passes"):
            nearest = [
                other
                for other in range(least, num_experts)
                if min(passes, key=lambda p: (abs(p - other), p)) == k
            ]
            if scope == "global":
                _fill_together(student, row, k, nearest)
                continue
            with ExitStack() as hooks:
                for bank in banks:
                    hooks.enter_context(_settling(bank, k, nearest, row.router_mask[0]))
                last_hidden_states(student, row.input_ids, **packed_kwargs(row))
    student.train(was_training)
    for bank in banks:
        # The ends are certain: first choices alone pass 1, and everything passes -1.
        bank.router.threshold_table[:least] = 1.0
        bank.router.threshold_table[-1] = -1.0


def set_budget(student: TinyOnnForCausalLM, budget: float) -> None:
    """Let the student use `budget` experts a token: exactly, or on average where it has a budget.

    Raises:
        UserError: not in S + 1 ... E, not whole where it must be, or never measured.
    """
    num_experts = student.config.num_experts
    rule = student.banks()[0].router.rule
    least = rule.num_shared + 1
    if not least <= budget <= num_experts:
        why = f", more than the {rule.num_shared} that are always on" if rule.num_shared else ""
        raise UserError(
            f"--budget: got {budget:g}, expected {least} to {num_experts}, the experts of a layer"
            f"{why}; choose one in between"
        )
    if rule.selection not in ("budget", "top_k", "static", "random", "oracle"):
        raise UserError(
            f"--budget: got a student with router.selection = {rule.selection!r}, expected budget, "
            "top_k, static or random; this one decides by itself how many experts it uses"
        )
    if not rule.has_budget and not float(budget).is_integer():
        raise UserError(
            f"--budget: got {budget:g}, expected a whole number with router.selection = "
            f"{rule.selection!r}; round it"
        )
    for bank in student.banks():
        bank.router.set_budget(budget)


@contextmanager
def _settling(bank: ExpertBank, k: int, nearest: Sequence[int], mask_T: Tensor) -> Iterator[None]:
    """Within the context the bank's next call uses k experts on average, and fills its table."""

    def settle(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        router = bank.router
        scores_TE = bank.route(inputs[0].flatten(0, -2)).scores
        router.settled.copy_(exact_threshold(scores_TE, mask_T, float(k)))
        for other in nearest:
            router.threshold_table[other - 1] = exact_threshold(scores_TE, mask_T, float(other))

    with bank.register_forward_pre_hook(settle):
        yield


def _fill_together(
    student: TinyOnnForCausalLM, row: PackedRow, k: int, nearest: Sequence[int]
) -> None:
    """Settle all layers at one threshold for k experts on average, and fill their tables."""
    banks, mask_T = student.banks(), row.router_mask[0]
    # Twice: the inputs of the first pass are those of another budget.
    masks_T, scores = mask_T.repeat(len(banks)), banks[0].router.weight.new_empty(0)
    for _ in range(2):
        with recorded_routings(banks) as routings:
            last_hidden_states(student, row.input_ids, **packed_kwargs(row))
        scores = torch.cat([routing.scores for routing in routings])
        for bank in banks:
            bank.router.settled.copy_(exact_threshold(scores, masks_T, float(k)))
    for other in nearest:
        threshold = exact_threshold(scores, masks_T, float(other))
        for bank in banks:
            bank.router.threshold_table[other - 1] = threshold


@contextmanager
def _thresholds_kept(banks: Sequence[ExpertBank]) -> Iterator[None]:
    """After the context thresholds are what they were before it."""
    kept = [bank.router.settled.clone() for bank in banks]
    try:
        yield
    finally:
        for bank, threshold in zip(banks, kept, strict=True):
            bank.router.settled.copy_(threshold)


def _joined(rows: Sequence[PackedRow]) -> PackedRow:
    """The first rows of `TABLE_TOKENS` or more, laid end to end as one."""
    taken: list[PackedRow] = []
    while len(taken) < len(rows) and sum(r.labels.numel() for r in taken) < TABLE_TOKENS:
        taken.append(rows[len(taken)])
    bounds, offset = [torch.zeros(1, dtype=torch.int32, device=taken[0].cu_seqlens.device)], 0
    for row in taken:
        bounds.append(row.cu_seqlens[1:] + offset)
        offset += row.labels.numel()
    return PackedRow(
        input_ids=torch.cat([row.input_ids for row in taken], dim=1),
        position_ids=torch.cat([row.position_ids for row in taken], dim=1),
        cu_seqlens=torch.cat(bounds),
        max_seqlen=max(row.max_seqlen for row in taken),
        labels=torch.cat([row.labels for row in taken], dim=1),
        loss_mask=torch.cat([row.loss_mask for row in taken], dim=1),
        router_mask=torch.cat([row.router_mask for row in taken], dim=1),
    )


@torch.no_grad()
def settle_budgets(
    inputs: MlpInputs, banks: Sequence[ExpertBank], scope: BudgetScope = "layer"
) -> None:
    """Set each budget's threshold to the mean of those that meet its target on each row."""
    if not banks[0].router.rule.has_budget:
        return
    routers = [bank.router for bank in banks]
    scores: list[Tensor] = []

    def see(index: int, x_TD: Tensor, row: PackedRow) -> None:
        scores.append(banks[index].route(x_TD).scores)
        if len(scores) == len(banks):
            thresholds_L = exact_thresholds(scores, row.router_mask[0], aims(routers), scope)
            scores.clear()
            steer(routers, thresholds_L, rate=0.0)

    inputs.visit(see, "setting budgets, rows")


@torch.no_grad()
def settle(
    student: TinyOnnForCausalLM, rows: Sequence[PackedRow], scope: BudgetScope = "layer"
) -> None:
    """Set the thresholds of evaluation to those that meet the target on these rows, pooled.

    A threshold that was steered on the last batches lags behind the gate and carries their noise;
    here the gate stands still. Training's own thresholds stay as they are. One pass over the rows:
    each layer is measured on the inputs that the layers before it give with their old thresholds.
    """
    banks = student.banks()
    if not rows or not banks[0].router.rule.has_budget:
        return
    was_training = student.training
    student.train(False)
    scores: list[list[Tensor]] = [[] for _ in banks]
    for row in track(rows, "settling budgets, rows"):
        with recorded_routings(banks) as routings:
            last_hidden_states(student, row.input_ids, **packed_kwargs(row))
        for routing, kept in zip(routings, scores, strict=True):
            kept.append(routing.scores)
    student.train(was_training)
    mask_T = torch.cat([row.router_mask[0] for row in rows])
    target_k = banks[0].router.rule.target_k
    targets_L = torch.full((len(banks),), target_k, device=mask_T.device)
    pooled = [torch.cat(kept) for kept in scores]
    for bank, threshold in zip(
        banks, exact_thresholds(pooled, mask_T, targets_L, scope), strict=True
    ):
        bank.router.settled.copy_(threshold)
