"""Rules on which selections, objectives, weightings and options go together, with the reasons."""

import json
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from tiny_onn.config.schema import RouterConfig, RunConfig
from tiny_onn.errors import UserError

# Kinds of surprise that the kernels of the sparse path know.
SPARSE_SURPRISES = ("parameters", "output", "gain", "relative")
CONTROLS = ("static", "random", "oracle")


class Rule(NamedTuple):
    """A combination of settings that is refused.

    The texts `expected` and `reason` may hold `{c.section.key}` for the value of another setting,
    and `{least}` for the fewest active experts that the number of shared experts allows.
    """

    settings: str
    """The names of the settings that the rule applies to one by one, with blanks between them."""
    refuses: Callable[[RunConfig, Any], object]
    """A function of the settings and the setting's value: true if they do not go together."""
    expected: str
    reason: str
    remedy: str


def has_budget(router: RouterConfig) -> bool:
    """Return True if tokens may use different numbers of experts and a threshold sets the mean."""
    return router.selection == "budget" or (router.selection == "oracle" and router.oracle_budget)


def _top_any(c: RunConfig) -> bool:
    return c.router.selection == "top_any"


def _has_probability_threshold(c: RunConfig) -> bool:
    return c.router.selection == "budget" and c.router.budget_form == "threshold"


def _all_active(c: RunConfig) -> bool:
    return c.router.target_k == c.experts.num_experts


RULES = (
    # These selections cannot learn from the objective.
    Rule(
        "router.objective",
        lambda c, value: value != "none" and c.router.selection in CONTROLS,
        '"none" with router.selection = "{c.router.selection}"',
        "this selection has no gate to train",
        'set router.objective = "none"',
    ),
    Rule(
        "router.objective",
        lambda c, value: value == "smk" and _top_any(c),
        '"task" or "none" with router.selection = "top_any"',
        "a cross-entropy over experts teaches which expert to choose, not how many, and nothing"
        " would limit the number of experts that pass their thresholds",
        'set router.objective = "task", or router.selection = "budget"',
    ),
    Rule(
        "router.objective",
        lambda c, value: value == "regression" and _top_any(c),
        '"task" or "none" with router.selection = "top_any"',
        "its logits are bounded cosines, which cannot equal the log norms that the regression aims"
        " at",
        'set router.objective = "task", or router.selection = "budget"',
    ),
    # These numbers of active experts are impossible.
    Rule(
        "router.target_k",
        lambda c, value: value > c.experts.num_experts,
        "at most experts.num_experts = {c.experts.num_experts}",
        "a token cannot use more experts than there are",
        "lower router.target_k or raise experts.num_experts",
    ),
    Rule(
        "router.target_k",
        lambda c, value: value % 1 and not has_budget(c.router) and not _top_any(c),
        'a whole number with router.selection = "{c.router.selection}"',
        "every token uses exactly that many experts",
        'round router.target_k or set router.selection = "budget"',
    ),
    Rule(
        "router.budget_scope",
        lambda c, value: value == "global" and not has_budget(c.router),
        '"layer" with router.selection = "{c.router.selection}"',
        "this selection has no budget that layers could share",
        'set router.selection = "budget"',
    ),
    Rule(
        "router.oracle_budget",
        lambda c, value: value and c.router.selection != "oracle",
        'false with router.selection = "{c.router.selection}"',
        "only the oracle has this option",
        'set router.selection = "oracle" or leave router.oracle_budget out',
    ),
    # These settings do not go with `top_any`, or go with nothing else.
    Rule(
        "experts.weighting",
        lambda c, value: value not in ("mean", "unit") and _top_any(c),
        '"mean" or "unit" with router.selection = "top_any"',
        "its gate decides yes or no for each expert, and has no probabilities to weight by",
        'set experts.weighting = "mean" for DynMoE',
    ),
    Rule(
        "experts.gate_init",
        lambda c, value: value != "random" and _top_any(c),
        '"random" with router.selection = "top_any"',
        "its gate consists of directions and thresholds, and is no linear map",
        'set experts.gate_init = "random"',
    ),
    Rule(
        "router.reseed_every_steps",
        lambda c, value: value and c.router.objective != "task" and _top_any(c),
        '0 with router.objective = "{c.router.objective}"',
        "the gate is frozen",
        'set router.objective = "task" or leave router.reseed_every_steps at 0',
    ),
    Rule(
        "router.at_least_one",
        lambda c, value: value != "evaluation" and not _top_any(c),
        '"evaluation" with router.selection = "{c.router.selection}"',
        "only top_any has this option",
        'set router.selection = "top_any" or leave router.at_least_one out',
    ),
    Rule(
        "router.reseed_every_steps",
        lambda c, value: value and not _top_any(c),
        '0 with router.selection = "{c.router.selection}"',
        "only top_any has this option",
        'set router.selection = "top_any" or leave router.reseed_every_steps out',
    ),
    # These settings need the threshold that a probability has to pass.
    Rule(
        "experts.weighting",
        lambda c, value: value == "ramp" and not _has_probability_threshold(c),
        'another value with router.selection = "{c.router.selection}" and router.budget_form ='
        ' "{c.router.budget_form}"',
        "its weights rise from the threshold that a probability has to pass",
        'set router.selection = "budget" and router.budget_form = "threshold", or'
        ' experts.weighting = "unit"',
    ),
    Rule(
        "router.straight_through",
        lambda c, value: value == "threshold" and not _has_probability_threshold(c),
        'another value with router.selection = "{c.router.selection}" and router.budget_form ='
        ' "{c.router.budget_form}"',
        "its sigmoid lies around the threshold that a probability has to pass",
        'set router.selection = "budget" and router.budget_form = "threshold", or leave'
        " router.straight_through out",
    ),
    # These settings would have no effect.
    Rule(
        "smk.net_gain",
        lambda c, value: value and c.router.objective != "smk",
        'false with router.objective = "{c.router.objective}"',
        "surprise does not teach the gate",
        'set router.objective = "smk" or leave smk.net_gain out',
    ),
    Rule(
        "smk.net_gain",
        lambda c, value: value and (c.smk.surprise != "gain" or c.experts.compensation != "mean"),
        'false with smk.surprise = "{c.smk.surprise}" and experts.compensation ='
        ' "{c.experts.compensation}"',
        "no mean output is part of this surprise",
        'set smk.surprise = "gain" and experts.compensation = "mean", or leave smk.net_gain out',
    ),
    Rule(
        "router.straight_through",
        lambda c, value: (
            value == "threshold"
            and (c.router.objective != "task" or c.experts.weighting not in ("unit", "mean"))
        ),
        'another value with router.objective = "{c.router.objective}" and experts.weighting ='
        ' "{c.experts.weighting}"',
        "no gradient passes straight through the choice of experts",
        'set router.objective = "task" and experts.weighting = "unit", or leave'
        " router.straight_through out",
    ),
    Rule(
        "router.balance_rate router.revive_after_steps",
        lambda c, value: value and c.router.selection in CONTROLS,
        '0 with router.selection = "{c.router.selection}"',
        "a control's routing must not change",
        "leave it at 0",
    ),
    Rule(
        "smk.explore_fraction",
        lambda c, value: value and c.router.objective != "smk",
        "0",
        'only router.objective = "smk" has candidates to explore',
        'leave it at 0, or set router.objective = "smk"',
    ),
    Rule(
        "smk.explore_fraction",
        lambda c, value: value and c.smk.candidates == "all",
        "0",
        'with smk.candidates = "all" every expert is a candidate already',
        'leave it at 0, or set smk.candidates = "active"',
    ),
    Rule(
        "smk.explore_fraction",
        lambda c, value: value and _all_active(c),
        "0",
        "router.target_k is experts.num_experts, so that no expert is inactive",
        "leave it at 0, or lower router.target_k",
    ),
    Rule(
        "smk.lesson_share",
        lambda c, value: value != 1 and c.router.objective != "smk",
        "1",
        'router.objective = "{c.router.objective}" has no candidates to sample',
        'leave it at 1, or set router.objective = "smk"',
    ),
    Rule(
        "smk.lesson_share",
        lambda c, value: value != 1 and c.smk.candidates == "active",
        "1",
        'smk.candidates = "active" sees no inactive expert at any token',
        'leave it at 1, or set smk.candidates = "all"',
    ),
    Rule(
        "router.blockwise_anneal_fraction",
        lambda c, value: value and not c.train.blockwise_tokens,
        "0",
        "train.blockwise_tokens is 0, so that there is no blockwise stage",
        "leave it at 0, or set train.blockwise_tokens",
    ),
    Rule(
        "router.anneal_fraction router.blockwise_anneal_fraction",
        lambda c, value: value and _top_any(c),
        "0",
        'router.selection = "top_any" finds its own number of experts',
        "leave it at 0",
    ),
    Rule(
        "router.anneal_fraction router.blockwise_anneal_fraction",
        lambda c, value: value and _all_active(c),
        "0",
        "router.target_k is experts.num_experts, so that the number of active experts cannot fall",
        "leave it at 0, or lower router.target_k",
    ),
    Rule(
        "smk.targets",
        lambda c, value: (
            value == "helpful" and (c.smk.surprise, c.smk.direction) != ("gain", "max")
        ),
        'another value with smk.surprise = "{c.smk.surprise}" and smk.direction ='
        ' "{c.smk.direction}"',
        "only the sign of a gain says whether an expert helps",
        'set smk.surprise = "gain" and smk.direction = "max", or smk.targets = "member"',
    ),
    # These shared experts leave the gate nothing to choose, or cannot exist.
    Rule(
        "experts.num_shared",
        lambda c, value: value and _top_any(c),
        '0 with router.selection = "top_any"',
        "every one of its experts is active or inactive by its own threshold",
        'set router.selection = "budget" or leave experts.num_shared at 0',
    ),
    Rule(
        "experts.num_shared",
        lambda c, value: value >= c.experts.num_experts,
        "fewer than experts.num_experts = {c.experts.num_experts}",
        "the gate would have nothing to choose from",
        "lower experts.num_shared",
    ),
    Rule(
        "router.target_k",
        lambda c, value: c.experts.num_shared and value < c.experts.num_shared + 1,
        "at least {least} with experts.num_shared = {c.experts.num_shared}",
        "it counts the shared experts, and every token uses at least one other expert",
        "raise router.target_k or lower experts.num_shared",
    ),
    Rule(
        "experts.keep_massive",
        lambda c, value: value and c.experts.init == "random",
        'false with experts.init = "random"',
        "random experts hold none of the teacher's neurons",
        'set experts.init = "slices" or another partition, or leave experts.keep_massive out',
    ),
    Rule(
        "experts.keep_massive",
        lambda c, value: value and not c.experts.num_shared,
        "false with experts.num_shared = 0",
        "there is no shared expert to hold the neurons",
        "set experts.num_shared to 1 or more",
    ),
)


def check_routing(config: RunConfig) -> None:
    """Refuse settings of the router that do not go together.

    Raises:
        UserError: the first rule that is broken, with the reason and the remedy.
    """
    for rule in RULES:
        for name in rule.settings.split():
            if rule.refuses(config, got := attrgetter(name)(config)):
                names = {"c": config, "least": config.experts.num_shared + 1}
                expected, reason = (text.format(**names) for text in (rule.expected, rule.reason))
                raise UserError(
                    f"{name}: got {json.dumps(got)}, expected {expected}: {reason}; {rule.remedy}"
                )


def check_path(config: RunConfig) -> None:
    """Refuse the grouped path for settings that only the dense path can run.

    Raises:
        UserError: `train.expert_path` is `grouped` or `sparse`, and other settings refuse it.
    """
    path = config.train.expert_path
    if path not in ("grouped", "sparse"):
        return
    if (reason := path_refusal(config, path)) is not None:
        raise UserError(
            f'train.expert_path: got "{path}", expected "auto" or "dense": {reason}; set'
            ' train.expert_path = "auto"'
        )


def path_refusal(config: RunConfig, path: Literal["grouped", "sparse"]) -> str | None:
    """Return why the settings refuse a path that skips inactive experts; None if it can run them.

    What the device and the teacher refuse, `model/expert_path.py` knows.
    """
    smk = config.smk
    if config.router.objective == "smk":
        if path == "grouped" and smk.candidates == "all" and smk.lesson_share == 1:
            return (
                'smk.candidates = "all" with smk.lesson_share = 1 needs the surprise of inactive'
                " experts at every token"
            )
        if path == "sparse" and smk.surprise not in SPARSE_SURPRISES:
            return f'smk.surprise = "{smk.surprise}" needs a Gram matrix, which its kernels lack'
    if config.router.objective == "regression":
        return 'router.objective = "regression" needs the norms of inactive experts\' outputs'
    weighting = config.experts.weighting
    straight_through = weighting in ("unit", "mean") and config.router.selection != "top_any"
    if config.router.objective == "task" and straight_through:
        return (
            f'router.objective = "task" with experts.weighting = "{weighting}" needs the gradient'
            " of inactive experts' weights"
        )
    for name, value in (
        ("train.ffn_chunk_tokens", config.train.ffn_chunk_tokens),
        ("smk.net_gain", smk.net_gain),
    ):
        if value:
            return f"{name} = {json.dumps(value)} works on the dense path only"
    return None
