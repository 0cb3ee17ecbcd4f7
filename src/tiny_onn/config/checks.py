"""Checks of settings: the ranges of single settings, and the combinations of several.

Checks that need the teacher (the width of its MLPs, its memory) run where the teacher is loaded.
"""

import json
import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any, get_args

from tiny_onn.config.routing_checks import CONTROLS, check_path, check_routing
from tiny_onn.config.schema import ExpertInit, RunConfig, Selection
from tiny_onn.errors import UserError

# Values of `probe --loss`: the loss of a single token that the probe measures.
PROBE_LOSSES = ("auto", "forward-kl", "next-token")
# The expected value in words, the check, and the settings that the check applies to.
RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "an integer >= 1",
        lambda value: value >= 1,
        "experts.num_experts data.eval_tokens train.tokens train.log_every_steps"
        " train.keep_checkpoints train.max_skipped_steps",
    ),
    # These numbers of tokens and rows are held in memory at once, so that they have a maximum.
    (
        "an integer from 3 to 16,777,216",
        lambda value: 3 <= value <= 2**24,
        "data.row_tokens",
    ),
    (
        "an integer from 0 to 16,777,216",
        lambda value: 0 <= value <= 2**24,
        "data.shuffle_tokens data.eval_row_tokens",
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
        " router.reseed_every_steps router.revive_after_steps experts.num_shared"
        " data.settling_tokens",
    ),
    ("a number >= 1", lambda value: value >= 1, "router.target_k"),
    ("a number > 0", lambda value: value > 0, "loss.temperature optim.eps optim.clip_norm"),
    (
        "a number >= 0",
        lambda value: value >= 0,
        "router.load_balancing_coef router.z_loss_coef router.diversity_coef router.balance_rate"
        " smk.coef loss.states_coef optim.expert_lr optim.gate_lr"
        " optim.norm_lr optim.weight_decay optim.gate_weight_decay",
    ),
    ("a number > 0 and <= 1", lambda value: 0 < value <= 1, "smk.lesson_share"),
    ("a number > 0 and < 1", lambda value: 0 < value < 1, "loss.jsd_beta data.held_out_fraction"),
    (
        "a number >= 0 and < 1",
        lambda value: 0 <= value < 1,
        "loss.label_coef optim.beta1 optim.beta2 data.settling_fraction",
    ),
    (
        "a number from 0 to 1",
        lambda value: 0 <= value <= 1,
        "router.budget_rate router.anneal_fraction router.blockwise_anneal_fraction"
        " smk.explore_fraction optim.warmup_fraction optim.decay_fraction"
        " optim.gate_warmup_fraction optim.gate_decay_fraction",
    ),
)


def validate(config: RunConfig) -> None:
    """Refuse settings that are out of range or that do not go together.

    Raises:
        UserError: the first wrong setting, with its value and the expected one.
    """
    for expected, accepts, names in RANGES:
        for name in names.split():
            if not accepts(value := attrgetter(name)(config)):
                raise UserError(
                    f"{name}: got {shown(value)}, expected {expected}; the default is"
                    f" {to_toml(attrgetter(name)(RunConfig()))}"
                )
    check_device(config.train.device, "train.device")
    data = config.data
    if data.held_out_fraction + data.settling_fraction >= 1:
        raise UserError(
            f"data.settling_fraction: got {data.settling_fraction} beside data.held_out_fraction"
            f" {data.held_out_fraction}, expected a sum below 1; lower one of them"
        )
    for prefix in ("optim.", "optim.gate_"):
        warmup, decay = attrgetter(f"{prefix}warmup_fraction", f"{prefix}decay_fraction")(config)
        if warmup + decay > 1:
            raise UserError(
                f"{prefix}decay_fraction: got {decay} after {prefix}warmup_fraction {warmup},"
                " expected a sum of at most 1; lower one of them"
            )
    check_routing(config)
    check_path(config)
    if config.teacher.cache != "none":
        check_cacheable(config)
    if config.train.shard == "full":
        check_full_sharding(config)


def check_full_sharding(config: RunConfig) -> None:
    """Refuse settings that need whole weights where each process holds a share of them.

    Raises:
        UserError: the optimizer is Adafactor, or activations are kept by a list of operations.
    """
    for name, value, refused, expected, reason in (
        (
            "optim.name",
            config.optim.name,
            "adafactor",
            '"adamw", "adamw8bit" or "muon"',
            "it scales an update by the root mean square of a whole weight",
        ),
        (
            "train.checkpointing",
            config.train.checkpointing,
            "selective",
            '"layer", "offload" or "none"',
            "it counts a layer's operations, and fewer of them gather weights in the backward pass",
        ),
    ):
        if value == refused:
            raise UserError(
                f'{name}: got {to_toml(value)} with train.shard = "full", expected {expected},'
                f' because {reason}; change it, or set train.shard = "optimizer"'
            )


def check_cacheable(config: RunConfig) -> None:
    """Refuse settings that need more of the teacher than its last hidden states.

    Raises:
        UserError: the settings match hidden states of each layer, or have a blockwise stage.
    """
    for name, value, needed in (
        ("loss.states_coef", config.loss.states_coef, "hidden states of each layer"),
        ("train.blockwise_tokens", config.train.blockwise_tokens, "MLP inputs and outputs"),
    ):
        if value:
            raise UserError(
                f"{name}: got {value} with a cache of the teacher, expected 0, because it needs the"
                f" teacher's {needed} and a cache holds the last hidden states; set {name}=0, or"
                " train with teacher.cache=none"
            )


def check_device(device: str, name: str) -> None:
    """Refuse a text that names no device; the machine is asked for the device at first use.

    Raises:
        UserError: the text names no device; the message starts with `name`.
    """
    if re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device, re.ASCII) is None:
        raise UserError(
            f"{name}: got {shown(device)}, expected auto, cpu, cuda or cuda:N; auto takes the GPU"
            " if there is one"
        )


def parse_budgets(text: str) -> list[float]:
    """Return the numbers of a comma-separated list, the value of `eval --budget`.

    Raises:
        UserError: a part of the list is no number.
    """
    budgets = []
    for part in text.split(","):
        try:
            budgets.append(float(part))
        except ValueError as error:
            raise UserError(
                f"--budget: got {text}, expected numbers with commas between them, for example"
                " 16,8; separate them by commas"
            ) from error
    return budgets


def check_budget(
    budget: float, *, num_experts: int, num_shared: int, selection: Selection, is_mean: bool
) -> None:
    """Refuse a budget that a student of these experts and this selection cannot have.

    Args:
        budget: the value of --budget.
        num_experts: the number of experts of a layer.
        num_shared: the number of them that every token uses.
        selection: the student's selection.
        is_mean: True if the budget is a mean over tokens, False if it is that of every token.

    Raises:
        UserError: the number is outside S + 1 ... E, or is not whole without a threshold, or the
            student decides by itself.
    """
    least = num_shared + 1
    if not least <= budget <= num_experts:
        why = f", more than the {num_shared} that are always on" if num_shared else ""
        raise UserError(
            f"--budget: got {budget:g}, expected {least} to {num_experts}, the experts of a layer"
            f"{why}; choose one in between"
        )
    if selection not in ("budget", "top_k", *CONTROLS):
        raise UserError(
            f"--budget: got a student with router.selection = {selection!r}, expected budget, "
            "top_k, static or random; this one decides by itself how many experts it uses"
        )
    if not is_mean and not float(budget).is_integer():
        raise UserError(
            f"--budget: got {budget:g}, expected a whole number with router.selection = "
            f"{selection!r}; round it"
        )


def check_probe(loss: str, init: str) -> None:
    """Refuse a loss or a partition that `probe` does not know.

    Raises:
        UserError: one of the two is unknown.
    """
    for name, value, known, remedy in (
        ("--loss", loss, PROBE_LOSSES, "auto"),
        ("--init", init, get_args(ExpertInit), "slices"),
    ):
        if value not in known:
            raise UserError(
                f"{name}: got {value}, expected one of {', '.join(known)}; try {remedy}"
            )


def check_prompt(prompt: str) -> None:
    """Refuse a prompt that is empty or is no text.

    Raises:
        UserError: the prompt is empty, or holds a byte that is not UTF-8.
    """
    if not prompt:
        raise UserError("--prompt: got an empty text, expected at least one character; write one")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--prompt: got a byte that is not UTF-8 at character {error.start}, expected text; "
            "check the terminal's encoding"
        ) from error


def shown(value: object) -> str:
    """Return a value for an error message, in one line of at most 80 characters."""
    if not isinstance(value, str | bool | int | float):
        return f"a {type(value).__name__}"
    text = to_toml(value)
    return text if len(text) <= 80 else text[:77] + "..."


def to_toml(value: object) -> str:
    """Return a setting's value as TOML, with unprintable characters escaped."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=not value.isprintable())
    if isinstance(value, tuple):
        return "[" + ", ".join(to_toml(item) for item in value) + "]"
    # Python refuses to write integers of thousands of digits in decimal, but not in hexadecimal.
    return hex(value) if isinstance(value, int) and abs(value) >= 2**64 else repr(value)
