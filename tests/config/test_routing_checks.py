"""Settings of routing that make no sense together are refused by name."""

from operator import attrgetter
from typing import Any

import pytest

from tiny import CONFIG, change
from tiny_onn.config.checks import validate
from tiny_onn.config.routing_checks import RULES
from tiny_onn.errors import UserError

REFUSED = [
    ({"num_shared": -1}, {}, "experts.num_shared: got -1, expected an integer >= 0"),
    ({"num_shared": 8}, {"target_k": 8.0}, "experts.num_shared: got 8, expected fewer than"),
    ({"num_shared": 4}, {}, "router.target_k: got 4.0, expected at least 5"),
    ({"num_shared": 4}, {"target_k": 4.9}, "router.target_k: got 4.9, expected at least 5"),
    (
        {"num_shared": 3},
        {"selection": "top_k", "target_k": 3.0},
        "router.target_k: got 3.0, expected at least 4",
    ),
    (
        {"num_shared": 1, "weighting": "mean"},
        {"selection": "top_any", "objective": "task"},
        "experts.num_shared: got 1, expected 0 with router.selection",
    ),
    ({"keep_massive": True}, {}, "experts.keep_massive: got true, expected false with .*= 0: "),
    (
        {"keep_massive": True, "num_shared": 1, "init": "random"},
        {},
        'experts.keep_massive: got true, expected false with experts.init = "random"',
    ),
]


@pytest.mark.parametrize(("experts", "router", "message"), REFUSED)
def test_what_makes_no_sense_is_refused_by_name(experts, router, message):
    with pytest.raises(UserError, match=f"^{message}.*; ") as caught:
        validate(change(CONFIG, experts=experts, router=router))
    assert "\n" not in str(caught.value)


# For each rule of the table, in its order: settings that it alone refuses, one for each name.
STATIC = {"selection": "static", "objective": "none"}
TOP_ANY = {"selection": "top_any", "objective": "task"}
EXPLORE = {"explore_fraction": 0.1}
REFUSED_BY_EACH_RULE: list[dict[str, dict[str, Any]]] = [
    {"router": {"selection": "static"}},
    {"router": {"selection": "top_any"}},
    {"router": {"selection": "top_any", "objective": "regression"}},
    {"router": {"target_k": 8.5}},
    {"router": {"selection": "top_k", "target_k": 2.5}},
    {"router": {"selection": "top_k", "budget_scope": "global"}},
    {"router": {"oracle_budget": True}},
    {"router": TOP_ANY, "experts": {"weighting": "softmax"}},
    {"router": TOP_ANY, "experts": {"gate_init": "zeros"}},
    {"router": {"selection": "top_any", "objective": "none", "reseed_every_steps": 3}},
    {"router": {"at_least_one": "always"}},
    {"router": {"reseed_every_steps": 3}},
    {"experts": {"weighting": "ramp"}},
    {"router": {"objective": "task", "straight_through": "threshold"}},
    {
        "router": {"objective": "none"},
        "experts": {"compensation": "mean"},
        "smk": {"net_gain": True, "surprise": "gain"},
    },
    {"smk": {"net_gain": True}},
    {"router": {"budget_form": "threshold", "straight_through": "threshold"}},
    {"router": {**STATIC, "balance_rate": 0.1}},
    {"router": {**STATIC, "revive_after_steps": 2}},
    {"router": {"objective": "task"}, "smk": EXPLORE},
    {"smk": {"candidates": "all", **EXPLORE}},
    {"router": {"target_k": 8.0}, "smk": EXPLORE},
    {"router": {"objective": "none"}, "smk": {"candidates": "all", "lesson_share": 0.5}},
    {"smk": {"candidates": "active", "lesson_share": 0.5}},
    {"router": {"blockwise_anneal_fraction": 0.5}},
    {"router": {**TOP_ANY, "anneal_fraction": 0.5}},
    {"router": {**TOP_ANY, "blockwise_anneal_fraction": 0.5}, "train": {"blockwise_tokens": 9}},
    {"router": {"target_k": 8.0, "anneal_fraction": 0.5}},
    {
        "router": {"target_k": 8.0, "blockwise_anneal_fraction": 0.5},
        "train": {"blockwise_tokens": 9},
    },
    {"smk": {"targets": "helpful", "surprise": "gain", "direction": "min"}},
    {"router": TOP_ANY, "experts": {"num_shared": 1}},
    {"experts": {"num_experts": 4, "num_shared": 4}},
    {"experts": {"num_shared": 4}},
    {"experts": {"init": "random", "num_shared": 1, "keep_massive": True}},
    {"experts": {"keep_massive": True}},
]
NAMED_RULES = [(rule, name) for rule in RULES for name in rule.settings.split()]


@pytest.mark.parametrize(
    ("rule", "name", "changes"),
    [(*named, changes) for named, changes in zip(NAMED_RULES, REFUSED_BY_EACH_RULE, strict=True)],
)
def test_every_rule_of_the_table_refuses_what_no_other_does(rule, name, changes):
    config = change(CONFIG, **changes)
    with pytest.raises(UserError) as caught:
        validate(config)
    reason, message = rule.reason.format(c=config), str(caught.value)
    assert message.startswith(f"{name}: got ")
    assert message.endswith(f": {reason}; {rule.remedy}")
    assert "{" not in message
    others = [
        other
        for other, setting in NAMED_RULES
        if (other, setting) != (rule, name) and other.refuses(config, attrgetter(setting)(config))
    ]
    # Four experts that are all shared leave k = 4 none of the others.
    assert [other.settings for other in others] in ([], ["router.target_k"])
