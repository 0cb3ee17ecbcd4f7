"""The writing of a teacher's last hidden states, shard by shard, for the runs that shall read them.

`teacher/cache.py` describes the files. A shard is written under another name, hashed, renamed, and
then recorded in the manifest, so that a process which is killed at any instant leaves whole shards
and at most one file that the next process writes anew.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from rich import filesize
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tiny_onn.config.checks import check_cacheable
from tiny_onn.config.schema import RunConfig, StatesFormat, TrainConfig
from tiny_onn.console import Bar, say, status
from tiny_onn.data.packing import PackedRow
from tiny_onn.data.rows import training_rows
from tiny_onn.data.stream import check_vocabulary
from tiny_onn.device import prepare_device
from tiny_onn.errors import UserError
from tiny_onn.model.attention import training_kwargs
from tiny_onn.model.backbone import head_of, last_hidden_states
from tiny_onn.model.compile import compile_backbones
from tiny_onn.publish import publish
from tiny_onn.runs.files import explain_write, write_json
from tiny_onn.runs.lock import LOCK_NAME, run_lock
from tiny_onn.teacher.cache import (
    MANIFEST,
    Manifest,
    Shard,
    cache_identity,
    check_shard,
    damaged,
    difference,
    encoded,
    file_sha256,
    read_manifest,
    row_sha256,
    rows_of_run,
    shard_name,
)
from tiny_onn.teacher.load import load_dense, teacher_for

SHARD_BYTES = 2**28
"""The largest size of a shard, which holds one row at least."""
_UNFINISHED = ".unfinished"


def write_cache(
    config: RunConfig,
    *,
    out: Path,
    states_format: StatesFormat = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Write the teacher's hidden states on all rows of a run, or go on at the first missing shard.

    Shards that are there are compared with their SHA-256. A finished cache is made longer if the
    settings ask for more tokens.

    Args:
        config: the settings of the runs that shall read the cache.
        out: the folder of the cache.
        states_format: the number format of the stored states.
        shard_bytes: the largest size of a shard, for a new cache.

    Raises:
        UserError: settings, text, teacher or disk are unfit, the folder holds something else or
            another cache, or a shard is damaged.
    """
    check_cacheable(config)
    config, device = prepare_device(config)
    with run_lock(out):
        _check_folder(out)
        with status(f"Loading the teacher, {config.teacher.path}"):
            dense, tokenizer = load_dense(config.teacher, device)
            check_vocabulary(tokenizer, dense.config.get_text_config().vocab_size)
        with status("Identifying text and teacher"):
            wanted = Manifest(
                identity=cache_identity(config, dense, tokenizer),
                format=states_format,
                hidden_dim=head_of(dense).weight.shape[1],
                row_tokens=config.data.row_tokens,
                num_rows=rows_of_run(config),
                rows_per_shard=1,
            )
            per_shard = max(1, shard_bytes // wanted.row_bytes)
        manifest = _begin(out, replace(wanted, rows_per_shard=per_shard))
        missing = _missing_shards(out, manifest)
        _check_space(out, manifest, missing)
        if missing:
            rows = training_rows(config, tokenizer)
            teacher = _teaching(dense, config)
            manifest = write_shards(out, manifest, missing, rows, teacher, train=config.train)
    return manifest


def _check_folder(out: Path) -> None:
    """Refuse a folder that holds anything but a cache; remove what a killed process left."""
    stale = (*out.glob(f".{MANIFEST}.*.tmp"), *out.glob(f".shard-*{_UNFINISHED}"))
    with explain_write(out):
        for path in stale:
            path.unlink()
        names = {path.name for path in out.iterdir()} - {LOCK_NAME}
    if names and MANIFEST not in names:
        raise UserError(
            f"--out: got {out}, which holds {min(names)} and no {MANIFEST}, expected a new folder"
            " or one that `tiny-onn cache` wrote; choose another --out"
        )


def _begin(out: Path, wanted: Manifest) -> Manifest:
    """Return the manifest to go on with: the folder's own if it has one, made longer if needed.

    Raises:
        UserError: the folder's cache is another one, or one of its shards is damaged.
    """
    manifest = wanted
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        found = difference(manifest, wanted.identity)
        if found is None and manifest.format != wanted.format:
            found = f"format {manifest.format} for {wanted.format}"
        if found is not None:
            raise UserError(
                f"--out: {out} holds another cache: got {found}, expected the one of these"
                " settings; choose another --out, or the settings of that cache"
            )
        _check_shards(out, manifest)
        manifest = replace(manifest, num_rows=max(manifest.num_rows, wanted.num_rows))
        # A last shard that was short is written anew if the cache becomes longer.
        full = [
            shard
            for index, shard in enumerate(manifest.shards)
            if shard.rows == manifest.rows_of_shard(index)
        ]
        manifest = replace(manifest, shards=tuple(full))
    write_json(out / MANIFEST, manifest.as_json())
    return manifest


def _check_shards(out: Path, manifest: Manifest) -> None:
    """Refuse a damaged shard among those that are there."""
    with Bar("checking, shards", len(manifest.shards)) as bar:
        for index, shard in enumerate(manifest.shards):
            path = out / shard_name(index)
            if path.exists():
                check_shard(out, index, shard)
                if (got := file_sha256(path)) != shard.sha256:
                    raise damaged(path, f"SHA-256 {got}", shard.sha256)
            bar.update()


def _missing_shards(out: Path, manifest: Manifest) -> list[int]:
    """Return the indices of the shards that are still to be written."""
    num_shards = -(-manifest.num_rows // manifest.rows_per_shard)
    written = len(manifest.shards)
    return [i for i in range(num_shards) if i >= written or not (out / shard_name(i)).exists()]


def _check_space(out: Path, manifest: Manifest, missing: list[int]) -> None:
    """Say how large the cache is, and refuse to begin if the disk has no room for it."""
    size, token_bytes = filesize.decimal, manifest.row_bytes / manifest.row_tokens
    needed = sum(manifest.rows_of_shard(index) for index in missing) * manifest.row_bytes
    free = shutil.disk_usage(out).free
    say(
        f"cache: {manifest.num_rows:,} rows of {manifest.row_tokens:,} tokens take"
        f" {size(manifest.num_rows * manifest.row_bytes)}, {token_bytes:,.0f} bytes a token in"
        f" {manifest.format}; {size(needed)} are to be written, and {size(free)} are free"
    )
    if needed > free:
        raise UserError(
            f"--out: got {size(free)} free on the disk of {out}, expected {size(needed)} for the"
            " rest of the cache; free some space, choose another --out, lower train.tokens, or"
            " take --format int8"
        )


def _teaching(dense: PreTrainedModel, config: RunConfig) -> PreTrainedModel:
    """Return the model that computes what the teacher of a run computes."""
    # Without quantisation a separate teacher would be a copy of the same weights.
    quantised = config.teacher.quantization != "none"
    teacher = teacher_for(dense, config.teacher) if quantised else dense
    if config.train.compile:
        compile_backbones(teacher)
    return teacher


def write_shards(
    out: Path,
    manifest: Manifest,
    missing: Sequence[int],
    rows: Iterator[PackedRow],
    teacher: PreTrainedModel,
    *,
    train: TrainConfig,
) -> Manifest:
    """Write the missing shards and record each; return the manifest with all of them.

    Args:
        out: the folder of the cache.
        manifest: what the cache shall hold, and the shards that it holds.
        missing: the indices of the shards to write, in order.
        rows: the text from its first row on.
        teacher: the model that teaches.
        train: the settings of the runs, on which its kernels depend.

    Raises:
        UserError: the disk refuses, or a hidden state is not finite.
    """
    shards, last = list(manifest.shards), missing[-1]
    with Bar("caching, rows", sum(map(manifest.rows_of_shard, range(last + 1)))) as bar:
        for index in range(last + 1):
            of_shard = list(islice(rows, manifest.rows_of_shard(index)))
            if index not in missing:
                bar.update(len(of_shard))
                continue
            tensors = _stored(of_shard, manifest.format, teacher, train, bar)
            shards[index : index + 1] = [_write_shard(out / shard_name(index), tensors)]
            manifest = replace(manifest, shards=tuple(shards))
            write_json(out / MANIFEST, manifest.as_json())
    return manifest


@torch.no_grad()
def _stored(
    rows: Sequence[PackedRow],
    states_format: StatesFormat,
    teacher: PreTrainedModel,
    train: TrainConfig,
    bar: Bar,
) -> dict[str, Tensor]:
    """Return the tensors of a shard."""
    parts: dict[str, list[Tensor]] = {"states": [], "scales": [], "row_sha256": []}
    for row in rows:
        on_device = row.to(teacher.device)
        kwargs = training_kwargs(teacher, on_device, train)
        hidden_TD = last_hidden_states(teacher, on_device.input_ids, **kwargs)[0]
        if not hidden_TD.isfinite().all():
            raise UserError(
                f"teacher.path: its hidden states are not finite in row {row.number:,} of the"
                " text, expected finite numbers; set teacher.dtype=float32"
            )
        states_TD, scales = encoded(hidden_TD, states_format)
        parts["states"].append(states_TD.cpu())
        if scales is not None:
            parts["scales"].append(scales.cpu())
        parts["row_sha256"].append(torch.tensor(list(row_sha256(row)), dtype=torch.uint8))
        bar.update()
    return {name: torch.stack(tensors) for name, tensors in parts.items() if tensors}


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> Shard:
    """Write a shard, wholly or not at all, and return what the manifest records of it.

    Raises:
        UserError: the disk refuses.
    """
    unfinished = path.with_name(f".{path.name}{_UNFINISHED}")
    try:
        with explain_write(path):
            try:
                save_file(tensors, unfinished)
            except SafetensorError as error:
                raise OSError(None, str(error)) from error
            shard = Shard(
                rows=len(tensors["states"]),
                bytes=unfinished.stat().st_size,
                sha256=file_sha256(unfinished),
            )
            publish(unfinished, path)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return shard
