"""What may change when a run goes on: settings by name, and where its files lie."""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType

from tiny_onn.config.read import config_diff
from tiny_onn.config.schema import HUB_PREFIX, RunConfig
from tiny_onn.errors import UserError

# Settings that a resumed run can take over from the next step on, by section.
_CHANGEABLE_KEYS = MappingProxyType(
    {
        "teacher": "path revision trust_remote_code",
        "router": "budget_rate load_balancing_coef z_loss_coef diversity_coef balance_rate"
        " revive_after_steps reseed_every_steps",
        "smk": "surprise direction candidates lesson_share targets explore_fraction coef",
        "loss": "divergence temperature jsd_beta states_coef chunk_tokens",
        "data": "sources",
        "optim": "expert_lr gate_lr beta1 beta2 eps weight_decay gate_weight_decay clip_norm"
        " warmup_fraction decay_fraction gate_warmup_fraction gate_decay_fraction",
        "train": "tokens rows_per_step device compile deterministic expert_path checkpointing"
        " ffn_chunk_tokens eval_every_tokens save_every_tokens keep_checkpoints max_skipped_steps"
        " log_every_steps stats_every_steps",
    }
)
CHANGEABLE = frozenset(
    f"{section}.{key}" for section, keys in _CHANGEABLE_KEYS.items() for key in keys.split()
)
# Why the others cannot, by section or setting.
REASONS = MappingProxyType(
    {
        "teacher": "the teacher's and the student's weights have it",
        "experts": "the student was converted with it",
        "router": "the student was converted and its gates taught with it",
        "data": "the position in the text counts on it",
        "data.eval_tokens": "evaluations before and after could not be compared",
        "optim": "the optimizer's state has its form",
        "train.seed": "the order of the text counts on it",
        "train.blockwise_tokens": "the stages follow each other by it",
    }
)


def check_changes(before: RunConfig, after: RunConfig, allowed: Sequence[str]) -> list[str]:
    """The differences, each as `section.key: before -> after`, if all of them are allowed.

    Args:
        before: the settings of the run.
        after: those to go on with.
        allowed: names given with --allow-change.

    Raises:
        UserError: a name that is no setting or that no run can change, or a change without leave.
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
            f"--resume: got changed settings ({'; '.join(refused)}), expected those of the run;"
            f" undo them, {remedy}"
        )
    return changes


def with_number_format_of(began: RunConfig, config: RunConfig) -> RunConfig:
    """The settings with the run's own `teacher.dtype` where they leave it open.

    Args:
        began: the settings of the run.
        config: those to go on with.
    """
    if config.teacher.dtype != "auto":
        return config
    return replace(config, teacher=replace(config.teacher, dtype=began.teacher.dtype))


def check_changeable(name: str) -> None:
    """Return if a resumed run can take over a change of the setting.

    Raises:
        UserError: it cannot, or there is no such setting.
    """
    settings = {f"{section}.{key}" for section, keys in asdict(RunConfig()).items() for key in keys}
    if name not in settings:
        raise UserError(
            f"--allow-change: got {name}, expected SECTION.KEY of a setting; `tiny-onn config`"
            " lists them"
        )
    if _is_fixed(name):
        raise UserError(
            f"--allow-change: got {name}, which cannot change in a run: {_reason(name)}; start a"
            " new run with another --out"
        )


def _is_fixed(name: str) -> bool:
    return name not in CHANGEABLE


def _reason(name: str) -> str:
    return REASONS[name] if name in REASONS else REASONS[name.partition(".")[0]]


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same settings with local paths absolute, so that a run goes on from any folder."""
    path = config.teacher.path
    # Unlike Path.is_dir it knows no folder, rather than raising, where a name is too long.
    teacher = _absolute(path) if os.path.isdir(_absolute(path)) else path  # noqa: PTH112
    sources = tuple(
        source if source == "embedded" or source.startswith(HUB_PREFIX) else _absolute(source)
        for source in config.data.sources
    )
    return replace(
        config,
        teacher=replace(config.teacher, path=teacher),
        data=replace(config.data, sources=sources),
    )


def _absolute(path: str) -> str:
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:
        # No such user's home; whoever reads the path says so.
        return path
