"""The tensors of a checkpoint in files of several processes, by torch's distributed checkpoint.

Every process writes the tensors that it holds into a safetensors file of its own; of a tensor that
several hold, one writes it. Any number of processes can read the files. torch's writer and reader
for this format are used, because its other writer pickles the list of the tensors. While a file is
written, the writer holds its bytes in memory once more.

The folder must be one that all processes see.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tiny_onn.errors import UserError
from tiny_onn.parallel import World, is_lost
from tiny_onn.runs.files import FileEntry, file_entry, refusal

Entries = dict[str, FileEntry]


class _Writer(HuggingFaceStorageWriter):
    """Writes safetensors files, and hands their sizes and hashes to the first process.

    Args:
        folder: the folder, which the first process makes.
        begin: called in the first process before any process writes.
        finish: called in the first process with the entries of all files once they are written.
    """

    def __init__(
        self, folder: Path, begin: Callable[[], None], finish: Callable[[Entries], None]
    ) -> None:
        super().__init__(str(folder), save_distributed=True)
        # Copying ahead would give every process a context on the first GPU; nothing is on a GPU.
        self.per_thread_copy_ahead = 0
        self._folder, self._begin, self._finish = folder, begin, finish

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._begin()
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        names = {result.storage_data.relative_path for result in results}
        entries = {name: file_entry(self._folder / name) for name in names}
        written: Future[list[WriteResult]] = Future()
        written.set_result([replace(r, storage_data=entries) for r in results[:1]])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        del metadata
        self._finish({n: e for some in results for r in some for n, e in r.storage_data.items()})


def save_shards(
    folder: Path,
    tensors: dict[str, Tensor],
    world: World,
    begin: Callable[[], None],
    finish: Callable[[Entries], None],
) -> None:
    """Write tensors of several processes into a folder; all of them make this call.

    An error in one process ends the call in all of them, with this error.

    Args:
        folder: the folder, the same one in all processes.
        tensors: the tensors of this process, in host memory; those of one name are equal.
        world: the processes.
        begin: makes the folder, in the first process.
        finish: called in the first process with the entries of all files once they are written.

    Raises:
        OSError: the file system refuses, or another process has ended.
    """
    try:
        save(
            dict(sorted(tensors.items())),
            storage_writer=_Writer(folder, begin, finish),
            planner=DefaultSavePlanner(flatten_state_dict=False),
            process_group=world.saving,
        )
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, (OSError, SafetensorError, UserError)):
            raise OSError(f"process {rank}: {refusal(cause)}") from error
        raise cause from error
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise OSError("another process of this run has ended") from error


def load_shards(
    folder: Path, is_wanted: Callable[[str], bool], device: str = "cpu"
) -> dict[str, Tensor]:
    """Return the tensors in a folder that `save_shards` wrote, those whose names are wanted."""
    reader = HuggingFaceStorageReader(str(folder))
    tensors = {
        name: torch.empty(found.size, dtype=found.properties.dtype, device=device)
        for name, found in reader.read_metadata().state_dict_metadata.items()
        if is_wanted(name) and isinstance(found, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        # Each process reads on its own, which torch takes for a mistake.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        load(tensors, storage_reader=reader, planner=planner, no_dist=True)
    return tensors
