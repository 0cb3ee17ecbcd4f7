"""The settings that may change when a run is resumed, and its local paths made absolute."""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType

from tiny_onn.config.read import config_diff
from tiny_onn.config.schema import HUB_PREFIX, RunConfig
from tiny_onn.errors import UserError

# Settings of each section that a resumed run can adopt from its next step on.
_CHANGEABLE_KEYS = MappingProxyType(
    {
        "teacher": "path revision trust_remote_code cache",
        "router": "budget_rate straight_through load_balancing_coef z_loss_coef diversity_coef"
        " balance_rate revive_after_steps reseed_every_steps",
        "smk": "surprise direction candidates lesson_share targets net_gain explore_fraction coef",
        "loss": "divergence temperature label_coef jsd_beta states_coef states_scale chunk_tokens",
        "data": "sources settling_tokens",
        "optim": "expert_lr gate_lr beta1 beta2 eps weight_decay gate_weight_decay clip_norm"
        " warmup_fraction decay_fraction gate_warmup_fraction gate_decay_fraction",
        "train": "tokens rows_per_step device shard compile deterministic cuda_graphs expert_path"
        " checkpointing"
        " ffn_chunk_tokens eval_every_tokens save_every_tokens keep_checkpoints max_skipped_steps"
        " stop_if_worse log_every_steps stats_every_steps",
    }
)
CHANGEABLE = frozenset(
    f"{section}.{key}" for section, keys in _CHANGEABLE_KEYS.items() for key in keys.split()
)
# The reason why any other setting cannot change, by section, or by setting where it has its own.
REASONS = MappingProxyType(
    {
        "teacher": "the weights were loaded in this format",
        "experts": "the student was converted with this value",
        "router": "the student was converted with this value, and its gates were trained with it",
        "data": "the run's position in its text depends on this value",
        "data.eval_tokens": "evaluations before and after the change could not be compared",
        "data.eval_row_tokens": "evaluations before and after the change could not be compared",
        "optim": "the form of the saved optimizer state depends on this value",
        "train.seed": "the order of the text depends on this value",
        "train.blockwise_tokens": "the end of the first stage depends on this value",
    }
)


def check_changes(before: RunConfig, after: RunConfig, allowed: Sequence[str]) -> list[str]:
    """Return the differences, each as `section.key: before -> after`, if all of them are allowed.

    Args:
        before: the settings of the run.
        after: the settings to go on with.
        allowed: the names given with --allow-change.

    Raises:
        UserError: a name is no setting, or no run can change it, or a change is not allowed.
    """
    for name in allowed:
        check_changeable(name)
    changes = config_diff(before, after)
    refused = [change for change in changes if change.partition(":")[0] not in allowed]
    if refused:
        names = [change.partition(":")[0] for change in refused]
        fixed = [f"{name} cannot change: {_reason(name)}" for name in names if _is_fixed(name)]
        leave = " ".join(f"--allow-change {name}" for name in names if not _is_fixed(name))
        remedy = "; ".join([*fixed, *([f"or add {leave}"] if leave else [])])
        raise UserError(
            f"--resume: got changed settings ({'; '.join(refused)}), expected the run's own"
            f" settings; undo the changes, {remedy}"
        )
    return changes


def with_number_format_of(began: RunConfig, config: RunConfig) -> RunConfig:
    """Return the settings with the run's own `teacher.dtype` in place of `auto`.

    Args:
        began: the settings of the run.
        config: the settings to go on with.
    """
    if config.teacher.dtype != "auto":
        return config
    return replace(config, teacher=replace(config.teacher, dtype=began.teacher.dtype))


def check_changeable(name: str) -> None:
    """Refuse a setting that a resumed run cannot change.

    Raises:
        UserError: the setting cannot change, or there is no such setting.
    """
    settings = {f"{section}.{key}" for section, keys in asdict(RunConfig()).items() for key in keys}
    if name not in settings:
        raise UserError(
            f"--allow-change: got {name}, expected SECTION.KEY of a setting; `tiny-onn config`"
            " lists all settings"
        )
    if _is_fixed(name):
        raise UserError(
            f"--allow-change: got {name}, expected a setting that a run can change, but"
            f" {_reason(name)}; start a new run with another --out"
        )


def _is_fixed(name: str) -> bool:
    return name not in CHANGEABLE


def _reason(name: str) -> str:
    return REASONS[name] if name in REASONS else REASONS[name.partition(".")[0]]


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the settings with absolute local paths, so that a run can resume from any folder."""
    path = config.teacher.path
    # Path.is_dir raises an error for a name that is too long, os.path.isdir returns False.
    teacher = _absolute(path) if os.path.isdir(_absolute(path)) else path  # noqa: PTH112
    sources = tuple(
        source if source == "embedded" or source.startswith(HUB_PREFIX) else _absolute(source)
        for source in config.data.sources
    )
    cache = (
        config.teacher.cache if config.teacher.cache == "none" else _absolute(config.teacher.cache)
    )
    return replace(
        config,
        teacher=replace(config.teacher, path=teacher, cache=cache),
        data=replace(config.data, sources=sources),
    )


def _absolute(path: str) -> str:
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:
        # There is no such user's home folder; the reader of the path reports that.
        return path
