"""A run's reading of a teacher's cache, whose format `teacher/cache.py` describes."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_onn.config.schema import RunConfig
from tiny_onn.data.packing import PackedRow
from tiny_onn.errors import UserError
from tiny_onn.parallel import ALONE, World
from tiny_onn.teacher.cache import (
    cache_identity,
    check_shard,
    damaged,
    difference,
    file_sha256,
    missing,
    read_manifest,
    row_sha256,
    rows_of_run,
    shard_name,
)


def open_cache(config: RunConfig) -> "TeacherCache | None":
    """Return the cache that the settings name, or None if they name none.

    Raises:
        UserError: the cache is not there or not whole.
    """
    return None if config.teacher.cache == "none" else TeacherCache(Path(config.teacher.cache))


class TeacherCache:
    """The rows of a cache, read from one memory-mapped shard at a time.

    Of several processes each one compares its share of the shards with their SHA-256. While a shard
    is in use, a thread does this for the next one, which also brings its bytes into memory.

    Args:
        folder: the folder that `tiny-onn cache` wrote.

    Raises:
        UserError: there is no cache, or a shard is missing or of another size than recorded.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        for index, shard in enumerate(self.manifest.shards):
            check_shard(folder, index, shard)
        self._hashes: dict[int, Future[str]] = {}
        self._checked = -1
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher-cache")
        self._index, self._shard = -1, None

    def close(self) -> None:
        """Compare no more shards, because no more rows are read; the program need not wait."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def check_run(self, config: RunConfig, rows_read: int = 0) -> None:
        """Refuse to serve a run that reads more rows, in whole steps, than the cache holds.

        Args:
            config: the settings.
            rows_read: the number of rows that the run read before it was resumed.

        Raises:
            UserError: the cache holds fewer rows.
        """
        num_rows = rows_of_run(config, rows_read)
        self._check_length(num_rows, rows_read, config.train.rows_per_step)

    def _check_length(self, num_rows: int, rows_read: int = 0, rows_per_step: int = 1) -> None:
        """Refuse to serve more rows than the cache holds.

        Raises:
            UserError: the cache holds fewer rows.
        """
        manifest = self.manifest
        if num_rows <= manifest.rows_written:
            return
        held, asked = (rows * manifest.row_tokens for rows in (manifest.rows_written, num_rows))
        planned = manifest.num_rows * manifest.row_tokens
        unfinished = f" of {planned:,} that it shall hold" if held < planned else ""
        part_of_step = (manifest.rows_written - rows_read) % rows_per_step
        whole = held - part_of_step * manifest.row_tokens
        shorter = f", or set train.tokens={whole} or less" if whole else ""
        raise UserError(
            f"teacher.cache: {self.folder} holds {held:,} tokens{unfinished}, expected the"
            f" {asked:,} that the run reads; go on with `tiny-onn cache` and its settings{shorter}"
        )

    def taught(self, rows: Sequence[PackedRow], world: World = ALONE) -> list[PackedRow]:
        """Return the rows of a step, of which this process's own get the teacher's stored states.

        A damaged shard is told by the process that compares it, before any process uses the rows.

        Args:
            rows: consecutive rows of the training text on the host, with their numbers.
            world: the processes of the run, each of which gets all rows.

        Raises:
            UserError: the cache does not hold a row, holds another text in its place, or a shard
                is damaged.
        """
        assert rows[0].number >= 0
        self._check_length(rows[-1].number + 1)
        self._check_shards(rows[0].number, rows[-1].number, world)
        taught = list(rows)
        for number in world.mine(range(len(rows))):
            taught[number] = self._taught(rows[number])
        return taught

    def _taught(self, row: PackedRow) -> PackedRow:
        index, place = divmod(row.number, self.manifest.rows_per_shard)
        shard = self._open(index)
        stored = {name: shard.get_slice(name)[place] for name in shard.keys()}  # noqa: SIM118
        if bytes(stored["row_sha256"].tolist()) != row_sha256(row):
            raise UserError(
                f"teacher.cache: {self.folder} holds another text in row {row.number:,} than the"
                " run reads there, expected equal tokens; restore the text and its tokenizer, or"
                " write another cache with `tiny-onn cache`"
            )
        return replace(row, teacher_states=stored["states"], teacher_scales=stored.get("scales"))

    def _check_shards(self, first: int, last: int, world: World) -> None:
        """Check this process's share of the shards with rows from `first` to `last`.

        A thread begins with those that follow.
        """
        shards, per_shard = self.manifest.shards, self.manifest.rows_per_shard
        begin, end = max(self._checked + 1, first // per_shard), last // per_shard + 1
        for index in range(begin, min(end + world.size, len(shards))):
            if index % world.size == world.rank and index not in self._hashes:
                path = self.folder / shard_name(index)
                self._hashes[index] = self._executor.submit(file_sha256, path)
        for index in range(begin, end):
            self._checked = index
            if index % world.size != world.rank:
                continue
            path = self.folder / shard_name(index)
            try:
                got = self._hashes.pop(index).result()
            except OSError as error:
                raise missing(path, error) from error
            if got != shards[index].sha256:
                raise damaged(path, f"SHA-256 {got}", shards[index].sha256)

    def _open(self, index: int) -> Any:  # noqa: ANN401 - safetensors has no type for it
        """Return the open shard of this index."""
        if index == self._index:
            return self._shard
        path = self.folder / shard_name(index)
        try:
            self._shard = safe_open(path, framework="pt")
        except OSError as error:
            raise missing(path, error) from error
        except SafetensorError as error:
            raise damaged(path, f"no safetensors ({error})", "some") from error
        self._index = index
        return self._shard


def check_cache(
    config: RunConfig, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a cache that the settings name if a run cannot read all of its rows from it.

    Args:
        config: the settings.
        dense: the teacher as it was loaded, before it is quantised.
        tokenizer: the teacher's tokenizer.

    Raises:
        UserError: there is no whole cache, it is too short, or it is of another text or teacher.
    """
    if (cache := open_cache(config)) is None:
        return
    cache.check_run(config)
    found = difference(cache.manifest, cache_identity(config, dense, tokenizer))
    if found is not None:
        raise UserError(
            f"teacher.cache: {cache.folder} holds the states of another text or teacher: got"
            f" {found}, expected the run's own; change the run's settings to those of the cache, or"
            " write another cache with `tiny-onn cache`"
        )
