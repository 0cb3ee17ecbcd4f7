"""Which settings make sense: ranges of single settings, and combinations of several.

What depends on the teacher (its MLP width, its memory) is checked where the teacher is loaded.
"""

import json
import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any, get_args

from tiny_onn.config.routing_checks import check_path, check_routing
from tiny_onn.config.schema import ExpertInit, RunConfig
from tiny_onn.errors import UserError

# The own losses of a token that `probe` knows.
PROBE_LOSSES = ("auto", "forward-kl", "next-token")
# What to expect, the check, and the settings it holds for.
RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "an integer >= 1",
        lambda value: value >= 1,
        "experts.num_experts data.eval_tokens train.tokens train.log_every_steps"
        " train.keep_checkpoints train.max_skipped_steps",
    ),
    # What is held in memory at once has an end.
    (
        "an integer from 3 to 16,777,216",
        lambda value: 3 <= value <= 2**24,
        "data.row_tokens",
    ),
    (
        "an integer from 1 to 16,777,216",
        lambda value: 1 <= value <= 2**24,
        "experts.calibration_tokens train.rows_per_step",
    ),
    (
        "an integer >= 0",
        lambda value: value >= 0,
        "experts.expert_dim loss.chunk_tokens train.ffn_chunk_tokens train.eval_every_tokens"
        " train.save_every_tokens train.stats_every_steps train.seed train.blockwise_tokens"
        " router.reseed_every_steps router.revive_after_steps experts.num_shared",
    ),
    ("a number >= 1", lambda value: value >= 1, "router.target_k"),
    ("a number > 0", lambda value: value > 0, "loss.temperature optim.eps optim.clip_norm"),
    (
        "a number >= 0",
        lambda value: value >= 0,
        "router.load_balancing_coef router.z_loss_coef router.diversity_coef router.balance_rate"
        " smk.coef loss.states_coef optim.expert_lr optim.gate_lr"
        " optim.weight_decay optim.gate_weight_decay",
    ),
    ("a number > 0 and <= 1", lambda value: 0 < value <= 1, "smk.lesson_share"),
    ("a number > 0 and < 1", lambda value: 0 < value < 1, "loss.jsd_beta data.held_out_fraction"),
    ("a number >= 0 and < 1", lambda value: 0 <= value < 1, "optim.beta1 optim.beta2"),
    (
        "a number from 0 to 1",
        lambda value: 0 <= value <= 1,
        "router.budget_rate router.anneal_fraction router.blockwise_anneal_fraction"
        " smk.explore_fraction optim.warmup_fraction optim.decay_fraction"
        " optim.gate_warmup_fraction optim.gate_decay_fraction",
    ),
)


def validate(config: RunConfig) -> None:
    """Return if every range and combination of settings makes sense.

    Raises:
        UserError: The first setting that does not, with the value and what was expected.
    """
    for expected, accepts, names in RANGES:
        for name in names.split():
            if not accepts(value := attrgetter(name)(config)):
                raise UserError(
                    f"{name}: got {shown(value)}, expected {expected}; its default is"
                    f" {to_toml(attrgetter(name)(RunConfig()))}"
                )
    check_device(config.train.device, "train.device")
    for prefix in ("optim.", "optim.gate_"):
        warmup, decay = attrgetter(f"{prefix}warmup_fraction", f"{prefix}decay_fraction")(config)
        if warmup + decay > 1:
            raise UserError(
                f"{prefix}decay_fraction: got {decay} after {prefix}warmup_fraction {warmup},"
                " expected a sum of at most 1; lower one of them"
            )
    check_routing(config)
    check_path(config)


def check_device(device: str, name: str) -> None:
    """Return if `device` reads as a device; whether the machine has it shows on first use.

    Raises:
        UserError: It does not; the message starts with `name`.
    """
    if re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device, re.ASCII) is None:
        raise UserError(
            f"{name}: got {shown(device)}, expected auto, cpu, cuda or cuda:N; use auto to take"
            " what there is"
        )


def parse_budgets(text: str) -> list[float]:
    """The numbers of a comma-separated list, as `--budget` takes it.

    Raises:
        UserError: something in it is no number.
    """
    found = []
    for part in text.split(","):
        try:
            found.append(float(part))
        except ValueError as error:
            raise UserError(
                f"--budget: got {text}, expected numbers with commas between; for example 16,8"
            ) from error
    return found


def check_probe(loss: str, init: str) -> None:
    """Return if `probe` knows the loss and the partition.

    Raises:
        UserError: It does not know one of them.
    """
    for name, value, known, remedy in (
        ("--loss", loss, PROBE_LOSSES, "auto"),
        ("--init", init, get_args(ExpertInit), "slices"),
    ):
        if value not in known:
            raise UserError(
                f"{name}: got {value}, expected one of {', '.join(known)}; try {remedy}"
            )


def shown(value: object) -> str:
    """Return a value for an error message, short and in one line."""
    if not isinstance(value, str | bool | int | float):
        return f"a {type(value).__name__}"
    text = to_toml(value)
    return text if len(text) <= 80 else text[:77] + "..."


def to_toml(value: object) -> str:
    """Return a setting's value as TOML; what no setting may hold comes out escaped."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=not value.isprintable())
    if isinstance(value, tuple):
        return "[" + ", ".join(to_toml(item) for item in value) + "]"
    # Python refuses to write integers of thousands of digits, except in hexadecimal.
    return hex(value) if isinstance(value, int) and abs(value) >= 2**64 else repr(value)
