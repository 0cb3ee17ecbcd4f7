"""A lost connection is told in one line; a fault of the program shows itself."""

import os

import pytest
import torch
import torch.distributed as dist

from forks import start_ranks
from parallel_cases import free_port
from tiny_onn.errors import UserError
from tiny_onn.parallel import World, is_lost

OTHERS_END = "got an end of another process of this run or of its connection"


def work(rank, port, folder, dtypes):
    """Add up a tensor, or end where this process has none; write what came of it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with World.from_environment("cpu") as world:
        world.barrier()
        if dtypes[rank] is not None:
            try:
                world.all_reduce_sum([torch.ones(5, dtype=dtypes[rank])])
            except (RuntimeError, UserError) as error:
                (folder / str(rank)).write_text(f"{type(error).__name__}: {error}")
        # The group of processes that have ended cannot be closed.
        os._exit(0)


@pytest.mark.parametrize(
    ("dtypes", "told"),
    [
        ((torch.float32, None), f"UserError: {OTHERS_END}"),
        # gloo adds no numbers of this format up.
        ((torch.int16, torch.int16), "RuntimeError: "),
    ],
)
def test_only_a_lost_connection_is_told_as_one(dtypes, told, tmp_path):
    start_ranks(work, (free_port(), tmp_path, dtypes), 2)
    assert (tmp_path / "0").read_text().startswith(told)


def work_with_a_library(rank, port, folder):
    """Gather a tensor as `fully_shard` does, without `World`, after the other process has ended."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with World.from_environment("cpu") as world:
            world.barrier()
            if rank == 0:
                gathered = [torch.empty(5) for _ in range(2)]
                dist.all_gather(gathered, torch.ones(5), group=world.group)
    except (RuntimeError, UserError) as error:
        (folder / str(rank)).write_text(f"{type(error).__name__}: {error}")
    # The group of processes that have ended cannot be closed.
    os._exit(0)


def test_a_connection_that_fully_shard_loses_is_told_as_one(tmp_path):
    start_ranks(work_with_a_library, (free_port(), tmp_path), 2)
    assert (tmp_path / "0").read_text().startswith(f"UserError: {OTHERS_END}")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (
            RuntimeError("[gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]"),
            True,
        ),
        (
            RuntimeError("[gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 9ms"),
            True,
        ),
        (RuntimeError("[enforce fail at gloo/gloo/transport/tcp/pair.cc:4] a <= b. 8 vs 4"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (dist.DistNetworkError("The client socket has failed to connect"), True),
    ],
)
def test_an_error_of_a_connection_is_known_by_its_type_or_text(error, lost):
    assert is_lost(error) == lost
