"""A run that cannot work is refused here, before its first step."""

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import filesize

from tiny_onn.config.schema import RunConfig
from tiny_onn.conversion.pipeline import Prepared
from tiny_onn.conversion.sharing import share_student
from tiny_onn.conversion.verify import backbone_hash
from tiny_onn.distill.progress import show_conversion
from tiny_onn.errors import UserError
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.parallel import ALONE, World, check_world
from tiny_onn.planning.cluster import check_blocks
from tiny_onn.planning.costs import meta_models, sizes_of
from tiny_onn.planning.disk import disk_use
from tiny_onn.planning.sources import load_shape
from tiny_onn.publish import nearest_existing
from tiny_onn.runs.folder import check_backbone, record_conversion
from tiny_onn.runs.trackers import check_trackers


def check_start(
    config: RunConfig, out: Path, *, track: Sequence[str] = (), world: World = ALONE
) -> None:
    """Refuse a run for what is known before the teacher is loaded.

    Of the teacher only its config.json is read. Several processes may write to several disks, which
    are not checked.

    Args:
        config: The settings, whose `teacher.dtype` is not `auto`.
        out: The run folder, which need not exist.
        track: Names of experiment trackers.
        world: The processes of the run.

    Raises:
        UserError: A tracker is unknown or not installed, the teacher's MLPs cannot be cut as the
            settings say, the disk has too little room, a number is no multiple of the number of
            processes, or a share of the weights would end within a block of 8-bit state.
    """
    check_trackers(track)
    check_world(config, world)
    student = check_sizes(config)
    if student is None:
        return
    if world.size == 1:
        _check_disk(out, config, student)
    elif config.train.shard == "full":
        check_blocks(config.optim, sizes_of(student), world.size)


def check_sizes(config: RunConfig) -> TinyOnnForCausalLM | None:
    """Refuse settings that do not fit the sizes in the teacher's config.json.

    Args:
        config: The settings, whose `teacher.dtype` is not `auto`.

    Returns:
        The student without its weights; None if the config.json cannot be had. Loading the teacher
        finds the same fault, and tells what a teacher must be.

    Raises:
        UserError: The architecture, the sizes or k do not fit.
    """
    try:
        _, shape = load_shape(config.teacher.path, config.teacher)
    except UserError:
        return None
    return meta_models(config, shape)[1]


def keep_conversion(file: Path, prepared: Prepared, title: str, world: World) -> None:
    """Keep what is known of a conversion, or compare a resumed run's backbone with it.

    Args:
        file: The record, `conversion.json`.
        prepared: The models.
        title: The word with which the run's lines begin.
        world: The processes of the run, all of which make this call.

    Raises:
        UserError: A resumed run has another backbone than it began with.
    """
    student, conversion = prepared.student, prepared.conversion
    if conversion is None:
        if world.first:
            check_backbone(file, backbone_hash(student))
        return
    share_student(student, world)
    if world.first:
        record_conversion(file, asdict(conversion))
    show_conversion(title, student, conversion)


def _check_disk(out: Path, config: RunConfig, student: TinyOnnForCausalLM) -> None:
    """Refuse a disk without room for the run; what a resumed run has written is room of its own."""
    use = disk_use(config, student)
    free = shutil.disk_usage(nearest_existing(out)).free
    written = _bytes_in(out / "checkpoints") + _bytes_in(out / "student")
    if free + written < use.total_bytes:
        size = filesize.decimal
        raise UserError(
            f"--out: got {size(free)} free on the disk of {out}, expected"
            f" {size(use.total_bytes - written)} for {use}; free some space, choose another --out,"
            " or lower train.keep_checkpoints"
        )


def _bytes_in(folder: Path) -> int:
    total = 0
    # Another run may be writing and removing files there, which the folder's lock refuses later.
    with contextlib.suppress(OSError):
        for file in folder.rglob("*"):
            total += file.stat().st_size if file.is_file() else 0
    return total
