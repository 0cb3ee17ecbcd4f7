"""What may change when a run goes on: settings by name, and where its files lie."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType

from tiny_onn.config import RunConfig
from tiny_onn.errors import UserError
from tiny_onn.settings import config_diff
from tiny_onn.sources import HUB_PREFIX

# Settings that a resumed run can take over from the next step on.
CHANGEABLE = frozenset(
    [
        "teacher.path",
        "teacher.revision",
        "teacher.trust_remote_code",
        "router.budget_rate",
        "router.load_balancing_coef",
        "router.z_loss_coef",
        "smk.surprise",
        "smk.direction",
        "smk.candidates",
        "smk.targets",
        "smk.coef",
        "loss.divergence",
        "loss.temperature",
        "loss.jsd_beta",
        "loss.chunk_tokens",
        "data.sources",
        "optim.expert_lr",
        "optim.gate_lr",
        "optim.beta1",
        "optim.beta2",
        "optim.eps",
        "optim.weight_decay",
        "optim.gate_weight_decay",
        "optim.clip_norm",
        "optim.warmup_fraction",
        "optim.decay_fraction",
        "optim.gate_warmup_fraction",
        "optim.gate_decay_fraction",
        "train.tokens",
        "train.rows_per_step",
        "train.device",
        "train.compile",
        "train.expert_path",
        "train.checkpointing",
        "train.ffn_chunk_tokens",
        "train.eval_every_tokens",
        "train.save_every_tokens",
        "train.keep_checkpoints",
        "train.max_skipped_steps",
        "train.log_every_steps",
    ]
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
    teacher = _absolute(path) if Path(_absolute(path)).is_dir() else path
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
