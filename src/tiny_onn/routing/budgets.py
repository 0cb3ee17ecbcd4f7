"""Thresholds of a budget that are measured on text, and students run at other budgets than trained.

A budget's threshold is measured three times: `fit_start_thresholds` sets it before training,
`fit_eval_thresholds` before an evaluation, and `fill_threshold_tables` measures one for every mean
k at the end of training (`finish_tables`).

A table holds, per layer, the threshold that gives k experts a token on average, for k = S + 1 ... E
(S are shared). The router stores it, so that `set_budget` can choose a k later without any text. A
layer's threshold depends on its inputs, and so on the budgets of the layers below. Each pass over
the text therefore sets every layer to one k on the way up, and measures the table around that k.

Cost of the tables: `len(PASSES)` forward passes of about `TABLE_TOKENS` tokens, without the head,
and `SCALE_ROUNDS` of `SCALE_TOKENS` for the scale with which a budget follows each sequence.

Legend: T tokens, E experts, S of them shared.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from tiny_onn.config.checks import check_budget
from tiny_onn.config.schema import BudgetScope
from tiny_onn.console import track
from tiny_onn.data.packing import PackedRow, joined
from tiny_onn.data.rows import evenly
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import last_hidden_states
from tiny_onn.model.experts import ExpertBank, recorded_routings
from tiny_onn.model.hooks import MlpInputs
from tiny_onn.model.router import temporary_rules
from tiny_onn.model.sequence_budget import follow
from tiny_onn.model.student import TinyOnnForCausalLM, eval_mode
from tiny_onn.parallel import ALONE, World
from tiny_onn.routing.statistics import RoutingStats
from tiny_onn.routing.thresholds import (
    corrected_targets,
    exact_threshold,
    exact_thresholds,
    update_thresholds,
)

TABLE_TOKENS = 16_384
# Each pass sets all layers to one of these shares of the experts; other k use the nearest pass.
PASSES = (0.75, 0.5, 0.375, 0.25, 0.125)
SCALE_ROUNDS, SCALE_TOKENS = 2, 65_536
LEAST_SCALE, LARGEST_SCALE = 0.8, 1.25


def finish_tables(
    student: TinyOnnForCausalLM, rows: Sequence[PackedRow], scope: BudgetScope = "layer"
) -> None:
    """Measure what lets a trained student use other budgets and follow sequences.

    Every process of a run makes this call, with the same rows.
    """
    fill_threshold_tables(student, rows, scope)
    join_tables_to_settled(student)
    fit_sequence_scale(student, rows)


@torch.no_grad()
def fill_threshold_tables(
    student: TinyOnnForCausalLM, rows: Sequence[PackedRow], scope: BudgetScope = "layer"
) -> None:
    """Fill every router's table of thresholds from text; the rest of the student does not change.

    A selection without a threshold has no table, and nothing is done.

    Args:
        student: The student at the end of its training.
        rows: Text of the kind that the student will see; about `TABLE_TOKENS` tokens are read.
        scope: Whether each layer has the budget, or all together.
    """
    banks = student.banks()
    if not banks[0].router.rule.has_budget:
        return
    # The rows come sorted by their source, so that the first ones would be of one source.
    some = evenly(rows, -(-TABLE_TOKENS // rows[0].labels.numel()))
    row = joined(some).to(banks[0].router.weight.device)
    num_experts = banks[0].router.weight.shape[0]
    least = banks[0].router.rule.num_shared + 1
    passes = sorted({max(least, round(num_experts * share)) for share in PASSES})
    was_training = student.training
    student.train(False)
    with _restored_eval_thresholds(banks):
        for k in track(passes, "table of budgets, passes"):
            nearest = [
                other
                for other in range(least, num_experts)
                if min(passes, key=lambda p: (abs(p - other), p)) == k
            ]
            if scope == "global":
                _fill_global_tables(student, row, k, nearest)
                continue
            with ExitStack() as hooks:
                for bank in banks:
                    hooks.enter_context(_filled_table(bank, k, nearest, row.router_mask[0]))
                last_hidden_states(student, row.input_ids, **packed_kwargs(row))
    student.train(was_training)
    for bank in banks:
        # The two ends need no measuring: at 1 only first choices are active, at -1 every expert.
        bank.router.threshold_table[:least] = 1.0
        bank.router.threshold_table[-1] = -1.0


@torch.no_grad()
def join_tables_to_settled(student: TinyOnnForCausalLM) -> None:
    """Multiply each table by what gives it the settled threshold at the student's own budget.

    Evaluation thresholds are settled on more text than tables are measured on, and text that is
    dearer than other text is so at every budget.
    """
    for router in (bank.router for bank in student.banks()):
        table_E, least = router.threshold_table, router.rule.num_shared + 1
        if router.rule.has_budget and least < router.rule.target_k <= len(table_E) - 1:
            factor = router.settled / router.table_threshold()
            # A threshold of 0 or less, where experts are almost never or always on, has no factor.
            if 0 < factor < float("inf"):
                table_E[least:-1] = (table_E[least:-1] * factor).clamp(max=1.0)


@torch.no_grad()
def fit_sequence_scale(student: TinyOnnForCausalLM, rows: Sequence[PackedRow]) -> None:
    """Set the `sequence_scale` with which followed sequences use the student's own budget.

    About `SCALE_TOKENS` tokens of the rows are read. Without a table, or with a budget of as few
    experts as can be or of all, nothing is done; nothing else of the student changes.
    """
    banks = student.banks()
    router, rule = banks[0].router, banks[0].router.rule
    if not router.has_table or not rule.num_shared + 1 < rule.target_k < len(router.weight):
        return
    config = student.config
    config.sequence_scale = 1.0
    some = evenly(rows, -(-SCALE_TOKENS // rows[0].labels.numel()))
    hooks = follow(student.backbone.base_model, student.hand_over)
    try:
        with eval_mode(student):
            for _ in range(SCALE_ROUNDS):
                stats = RoutingStats.zeros(banks)
                for row in some:
                    with recorded_routings(banks) as routings:
                        last_hidden_states(student, row.input_ids, **packed_kwargs(row))
                    stats.add(routings, row)
                scale = config.sequence_scale * rule.target_k / stats.summary()["mean_k"]
                config.sequence_scale = min(max(scale, LEAST_SCALE), LARGEST_SCALE)
    finally:
        for hook in hooks:
            hook.remove()


def set_budget(student: TinyOnnForCausalLM, budget: float) -> None:
    """Let the student use `budget` experts a token: on average if it has a threshold, else exactly.

    Raises:
        UserError: The number is outside S + 1 ... E, or not whole for a selection without a
            threshold, or the student has no measured table.
    """
    rule = student.banks()[0].router.rule
    check_budget(
        budget,
        num_experts=student.config.num_experts,
        num_shared=rule.num_shared,
        selection=rule.selection,
        is_mean=rule.has_budget,
    )
    for bank in student.banks():
        bank.router.set_budget(budget)


@contextmanager
def at_budget(student: TinyOnnForCausalLM, budget: float | None) -> Iterator[None]:
    """Let the student use `budget` experts a token within the context, or its own number for None.

    Raises:
        UserError: `set_budget` refuses the budget.
    """
    banks = student.banks()
    routers = [bank.router for bank in banks]
    rules = [router.rule for router in routers]
    with temporary_rules(routers, rules), _restored_eval_thresholds(banks):
        if budget is not None:
            set_budget(student, budget)
        yield


@contextmanager
def _filled_table(
    bank: ExpertBank, k: int, nearest: Sequence[int], mask_T: Tensor
) -> Iterator[None]:
    """Let the bank's calls in the context use k experts on average, and fill its table near k."""

    def fit_threshold_and_table(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        router = bank.router
        scores_TE = bank.route(inputs[0].flatten(0, -2)).scores
        router.settled.copy_(exact_threshold(scores_TE, mask_T, float(k)))
        for other in nearest:
            router.threshold_table[other - 1] = exact_threshold(scores_TE, mask_T, float(other))

    with bank.register_forward_pre_hook(fit_threshold_and_table):
        yield


def _fill_global_tables(
    student: TinyOnnForCausalLM, row: PackedRow, k: int, nearest: Sequence[int]
) -> None:
    """Set all layers to one threshold for k experts on average, and fill their tables near k."""
    banks, mask_T = student.banks(), row.router_mask[0]
    # The first pass still runs at another budget, so its layers see other inputs than at this one.
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
def _restored_eval_thresholds(banks: Sequence[ExpertBank]) -> Iterator[None]:
    """Give the banks their evaluation thresholds back when the context ends."""
    before = [bank.router.settled.clone() for bank in banks]
    try:
        yield
    finally:
        for bank, threshold in zip(banks, before, strict=True):
            bank.router.settled.copy_(threshold)


@torch.no_grad()
def fit_start_thresholds(
    inputs: MlpInputs, banks: Sequence[ExpertBank], scope: BudgetScope = "layer"
) -> None:
    """Set the thresholds with which training starts: means over the rows of the exact ones.

    Args:
        inputs: The dense model's MLP inputs, on which the gates route.
        banks: The layers.
        scope: Whether each layer has the budget, or all together.
    """
    if not banks[0].router.rule.has_budget:
        return
    routers = [bank.router for bank in banks]
    scores: list[Tensor] = []

    def add_scores(layer: int, x_TD: Tensor, row: PackedRow) -> None:
        scores.append(banks[layer].route(x_TD).scores)
        if len(scores) == len(banks):
            thresholds_L = exact_thresholds(
                scores, row.router_mask[0], corrected_targets(routers), scope
            )
            scores.clear()
            update_thresholds(routers, thresholds_L, rate=0.0)

    inputs.visit(add_scores, "setting budgets, rows")


@torch.no_grad()
def fit_eval_thresholds(
    student: TinyOnnForCausalLM,
    rows: Sequence[PackedRow],
    scope: BudgetScope = "layer",
    world: World = ALONE,
) -> None:
    """Set the evaluation thresholds to those that meet the target on all these rows together.

    Training's thresholds follow the last batches: they lag behind the gate and carry the batches'
    noise. Here the gate does not change. Training's thresholds stay as they are.

    The rows are read once, each by one of the processes. Each layer is measured on the inputs that
    the layers below give with their old thresholds.
    """
    banks = student.banks()
    if not rows or not banks[0].router.rule.has_budget:
        return
    was_training = student.training
    student.train(False)
    scores: list[list[Tensor]] = [[] for _ in banks]
    for number, row in enumerate(track(rows, "measuring budgets, rows")):
        if number % world.size != world.rank:
            for bank, layer_scores in zip(banks, scores, strict=True):
                weight = bank.router.weight
                layer_scores.append(weight.new_zeros(row.labels.numel(), len(weight)))
            continue
        with recorded_routings(banks) as routings:
            last_hidden_states(student, row.input_ids, **packed_kwargs(row))
        for routing, layer_scores in zip(routings, scores, strict=True):
            layer_scores.append(routing.scores)
    if world.lacks_one(len(rows)):
        # Processes whose models are cut make forward passes together.
        last_hidden_states(student, rows[-1].input_ids, **packed_kwargs(rows[-1]))
    student.train(was_training)
    mask_T = torch.cat([row.router_mask[0] for row in rows])
    target_k = banks[0].router.rule.target_k
    targets_L = torch.full((len(banks),), target_k, device=mask_T.device)
    pooled = [torch.cat(layer_scores) for layer_scores in scores]
    # Every process now gets the same scores to the bit, since a sum with zeros is exact.
    world.all_reduce_sum(pooled)
    for bank, threshold in zip(
        banks, exact_thresholds(pooled, mask_T, targets_L, scope), strict=True
    ):
        bank.router.settled.copy_(threshold)
