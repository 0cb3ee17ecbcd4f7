"""A teacher's last hidden states on a run's training rows, computed once for many students.

A cache is a folder:

    manifest.json              the identity of text and teacher, the format, each shard's SHA-256
    shard-000000.safetensors   some rows in order: `states` (rows, T, D), `row_sha256` (rows, 32),
                               and `scales` (rows, T, blocks) if states are 8-bit integers

Hidden states are those after the final norm, which the output head reads. `distill/cache_writer.py`
writes a cache. A run asks the `TeacherCache` of `cache_reader.py` for rows by their number in the
text stream. Every shard is compared with its SHA-256 before its first row is used, and every row
with the text that the run reads.

Shapes: "tokens" is T, a row's length; "hidden" is D, the teacher's hidden size.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import BFloat16, Float, Shaped
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_onn.config.schema import RunConfig, StatesFormat
from tiny_onn.data.packing import PackedRow
from tiny_onn.data.rows import training_rows
from tiny_onn.errors import UserError, printable

MANIFEST = "manifest.json"
VERSION = 1
BLOCK = 32
"""Numbers of 8-bit states that share a scale."""
# A stored integer of this size stands for the largest magnitude of its block.
_LEVELS = 127
_WRITE_AGAIN = "run `tiny-onn cache` with its settings again, which writes that shard anew"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A file of a cache, as the manifest records it."""

    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The contents of `manifest.json`."""

    identity: dict[str, Any]
    """The values on which rows and hidden states depend, by name, see `cache_identity`."""
    format: StatesFormat
    """The number format of the stored states."""
    hidden_dim: int
    row_tokens: int
    num_rows: int
    """The number of rows that the cache shall hold; fewer are there until it is finished."""
    rows_per_shard: int
    """The number of rows in every shard but the last."""
    shards: tuple[Shard, ...] = ()
    """The shards that are written, in order."""

    @property
    def rows_written(self) -> int:
        """The number of rows in the shards that are written."""
        return sum(shard.rows for shard in self.shards)

    @property
    def row_bytes(self) -> int:
        """The number of bytes that a row takes in its shard."""
        per_number = {"bfloat16": 2, "int8": 1, "float32": 4}[self.format]
        scales = 2 * num_blocks(self.hidden_dim) if self.format == "int8" else 0
        return self.row_tokens * (self.hidden_dim * per_number + scales) + 32

    def rows_of_shard(self, index: int) -> int:
        """Return the number of rows of a shard once the cache is finished."""
        return min(self.rows_per_shard, self.num_rows - index * self.rows_per_shard)

    def as_json(self) -> dict[str, Any]:
        """Return the manifest as JSON values."""
        return {"version": VERSION, **asdict(self)}


def shard_name(index: int) -> str:
    """Return the file name of a shard; the names sort in the order of the rows."""
    return f"shard-{index:06d}.safetensors"


def rows_of_run(config: RunConfig, rows_read: int = 0) -> int:
    """Return the number of packed rows that a run of these settings reads, its last step whole.

    Args:
        config: the settings.
        rows_read: the number of rows that it read before it was resumed with these settings.
    """
    rows_per_step, row_tokens = config.train.rows_per_step, config.data.row_tokens
    tokens_left = max(0, config.train.tokens - rows_read * row_tokens)
    return rows_read + -(-tokens_left // (rows_per_step * row_tokens)) * rows_per_step


def encoded(
    hidden_TD: Float[Tensor, "tokens hidden"], states_format: StatesFormat
) -> tuple[Shaped[Tensor, "tokens hidden"], BFloat16[Tensor, "tokens blocks"] | None]:
    """Return hidden states as a cache stores them, and the blocks' scales if they are integers.

    An 8-bit integer q stands for q * scale. `BLOCK` neighbouring numbers share a scale, their
    largest magnitude / 127, as in the format Q8_0 of llama.cpp: a few hidden dimensions are so
    large that one scale per token would leave few levels for the others.
    """
    if states_format != "int8":
        return hidden_TD.to(getattr(torch, states_format)), None
    blocks = hidden_TD.float().unflatten(-1, (num_blocks(hidden_TD.shape[-1]), -1))
    # A scale that was rounded down would make the largest number overflow.
    scales = (blocks.abs().amax(-1) / _LEVELS * (1 + 2**-8)).bfloat16()
    # Blocks whose numbers are all 0 have the scale 0.
    divisors = scales.float().clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return (blocks / divisors).round().to(torch.int8).flatten(-2), scales


def decoded(
    states_TD: Shaped[Tensor, "tokens hidden"],
    scales: BFloat16[Tensor, "tokens blocks"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "tokens hidden"]:
    """Return the hidden states that `encoded` stored, in the number format `dtype`."""
    if scales is None:
        return states_TD.to(dtype)
    blocks = states_TD.unflatten(-1, (scales.shape[-1], -1)) * scales.float()[..., None]
    return blocks.flatten(-2).to(dtype)


def num_blocks(hidden_dim: int) -> int:
    """Return the number of scales per token of 8-bit states, one for `BLOCK` numbers or fewer."""
    return hidden_dim // gcd(hidden_dim, BLOCK)


def row_sha256(row: PackedRow) -> bytes:
    """Return the SHA-256 of a row's token ids and document bounds, which lie on the host."""
    digest = hashlib.sha256(row.input_ids.numpy().tobytes())
    digest.update(row.cu_seqlens.numpy().tobytes())
    return digest.digest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_identity(
    config: RunConfig, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return by name the values on which the rows of a run and the teacher's states depend.

    Args:
        config: the settings.
        dense: the teacher as it was loaded, before it is quantised.
        tokenizer: the teacher's tokenizer.

    Raises:
        UserError: the text cannot be read.
    """
    teacher, quantisation = config.teacher, "none"
    if teacher.quantization != "none":
        layers = "the MLPs" if teacher.placement == "shared" else "all linear layers"
        double = "double" if teacher.double_quant else "single"
        quantisation = f"{teacher.quantization} of {layers}, {double}"
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    identity = {
        **training_rows(config, tokenizer).identity(),
        "teacher's tokenizer (sha256)": hashlib.sha256(vocabulary).hexdigest(),
        "teacher's number format": str(dense.dtype).removeprefix("torch."),
        "teacher's quantisation": quantisation,
        "teacher's weights (sha256)": _weights_sha256(dense),
    }
    # The manifest holds the same values as JSON has them.
    return json.loads(json.dumps(identity))


def _weights_sha256(dense: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(dense.named_parameters(remove_duplicate=False)):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def difference(manifest: Manifest, identity: dict[str, Any]) -> str | None:
    """Describe how a cache's identity differs from another one, or return None."""
    saved = manifest.identity
    names = [name for name in saved | identity if saved.get(name) != identity.get(name)]
    values = (f"{name} {saved.get(name)} for {identity.get(name)}" for name in names)
    return "; ".join(values) or None


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a cache.

    Raises:
        UserError: there is no manifest, or it is damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        version = table.pop("version")
        shards = tuple(Shard(**entry) for entry in table.pop("shards"))
        manifest = Manifest(**table, shards=shards)
    except OSError as error:
        raise UserError(
            f"teacher.cache: got {folder} without a readable {MANIFEST} ({error.strerror}),"
            " expected a folder that `tiny-onn cache` wrote; write one with `tiny-onn cache --out"
            f" {folder}` and the run's settings"
        ) from error
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise _damaged_manifest(path) from error
    if version != VERSION:
        raise UserError(
            f"{path}: got version {printable(str(version))[:40]}, expected {VERSION}; write the"
            " cache anew with this version of tiny-onn"
        )
    if not _is_sound(manifest):
        raise _damaged_manifest(path)
    return manifest


def _damaged_manifest(path: Path) -> UserError:
    return UserError(
        f"{path}: got a damaged manifest, expected the one that `tiny-onn cache` wrote; restore it"
        " from a copy, or write the cache anew in another folder"
    )


def _is_sound(manifest: Manifest) -> bool:
    """Return True if all values of a manifest have their types and go together."""
    counts = (manifest.hidden_dim, manifest.row_tokens, manifest.num_rows, manifest.rows_per_shard)
    if not all(type(count) is int and count >= 1 for count in counts):
        return False
    known = isinstance(manifest.identity, dict) and manifest.format in get_args(StatesFormat)
    return known and all(
        type(shard.bytes) is int
        and isinstance(shard.sha256, str)
        and shard.rows == manifest.rows_of_shard(index)
        for index, shard in enumerate(manifest.shards)
    )


def check_shard(folder: Path, index: int, shard: Shard) -> None:
    """Refuse a shard that is missing or whose size is not the recorded one.

    Raises:
        UserError: the shard is missing, or its size differs.
    """
    path = folder / shard_name(index)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise missing(path, error) from error
    if size != shard.bytes:
        raise damaged(path, f"a size of {size} bytes", f"{shard.bytes} bytes")


def damaged(path: Path, got: str, expected: str) -> UserError:
    """Return the refusal of a damaged shard."""
    return UserError(
        f"{path}: this shard of a teacher's cache is damaged: got {got}, expected {expected};"
        f" remove the file and {_WRITE_AGAIN}, or restore it from a copy"
    )


def missing(path: Path, error: OSError) -> UserError:
    """Return the refusal of a shard that cannot be read."""
    return UserError(
        f"{path}: cannot read this shard of a teacher's cache ({error.strerror}), expected the file"
        f" that {MANIFEST} records; {_WRITE_AGAIN}, or restore it from a copy"
    )
