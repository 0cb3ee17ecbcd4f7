"""Settings of routing that make no sense together are refused by name."""

import pytest

from tiny import CONFIG, change
from tiny_onn.checks import validate
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
