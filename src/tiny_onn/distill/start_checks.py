"""A run that cannot work is refused here: before the conversion, for its weights or disk after."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich import filesize

from tiny_onn.config.schema import RunConfig
from tiny_onn.conversion.pipeline import Prepared
from tiny_onn.conversion.sharing import share_student
from tiny_onn.conversion.verify import backbone_hash
from tiny_onn.distill.progress import show_conversion
from tiny_onn.errors import UserError
from tiny_onn.model.student import TinyOnnForCausalLM, split_parameters
from tiny_onn.parallel import World, check_world
from tiny_onn.planning.cluster import check_blocks
from tiny_onn.planning.costs import meta_models, sizes_of
from tiny_onn.planning.memory import state_bytes
from tiny_onn.planning.sources import load_shape
from tiny_onn.runs.folder import check_backbone, record_conversion
from tiny_onn.runs.trackers import check_trackers
from tiny_onn.runs.trained_tensors import student_tensors


def check_start(config: RunConfig, track: Sequence[str], world: World) -> None:
    """Refuse absent trackers, and rows, experts or optimizer state that processes cannot divide.

    Of the teacher only its config.json is read, and only for 8-bit state of shares.

    Args:
        config: The settings.
        track: Names of experiment trackers.
        world: The processes of the run.

    Raises:
        UserError: A tracker is unknown or not installed, a number is no multiple of the number of
            processes, or a share of the weights would end within a block of 8-bit state.
    """
    check_trackers(track)
    check_world(config, world)
    if world.size == 1 or config.train.shard != "full" or "8bit" not in config.optim.name:
        return
    try:
        _, shape = load_shape(config.teacher.path, config.teacher)
    except UserError:
        # Loading the teacher finds the same fault, and tells what a teacher must be.
        return
    plain = replace(config, teacher=replace(config.teacher, dtype="float32"))
    _, student = meta_models(plain, shape)
    check_blocks(config.optim, sizes_of(student), world.size)


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


def check_disk(out: Path, student: TinyOnnForCausalLM, config: RunConfig, world: World) -> None:
    """Refuse a disk without room for a checkpoint and the student, before steps that would be lost.

    Several processes may write to several disks, which are not checked.

    Raises:
        UserError: too little is free.
    """
    if world.size > 1:
        return
    experts, gates = split_parameters(student)
    # Vectors and gates have the state of AdamW, whatever the optimizer.
    states = [
        state_bytes(config.optim.name if name in experts and p.ndim > 1 else "adamw", p.shape)
        for name, p in (experts | gates).items()
    ]
    saved = [*student_tensors(student).values(), *student.state_dict().values()]
    needed = sum(states) + sum(tensor.nbytes for tensor in saved)
    free = shutil.disk_usage(out).free
    if free < needed:
        raise UserError(
            f"--out: got {filesize.decimal(free)} free on the disk of {out}, expected"
            f" {filesize.decimal(needed)} for a checkpoint and the student; free some space, or"
            " choose another --out"
        )
