"""The processes that train one student together, and what they add up.

A launcher (torchrun, accelerate) starts one process per device and tells each its rank by
environment variables. Each process computes its share of a step's rows; a `World` adds up
gradients and counts, after which every process holds the same bits and decides the same. Without a
launcher the world is one process, in which every operation here does nothing.
"""

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    rendezvous,  # pyright: ignore[reportPrivateImportUsage]
)

from tiny_onn.config.launcher import launcher_number, num_processes, under_torchrun
from tiny_onn.config.schema import RunConfig
from tiny_onn.console import silenced
from tiny_onn.errors import RankError, UserError, reason_of

Item = TypeVar("Item")

# Tensors travel together in messages of up to so many bytes, because each message takes time.
MESSAGE_BYTES = 2**26
# The others may wait so long while one process converts the model or writes a checkpoint.
TIMEOUT = timedelta(hours=2)
# A launcher that has ended does not answer.
ANSWERED_WITHIN = timedelta(seconds=30)
ASKED_EVERY_S = 0.02
# The parts of the texts of gloo's errors, which are plain ones, that only a lost connection has.
LOST = ("gloo/transport/", "connectFullMesh failed")
# A condition that gloo checks is ours to keep, such as equal sizes in all processes.
BROKEN_RULE = "enforce fail"


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    """The number of this process, from 0. The first process alone writes records and lines."""
    size: int = 1
    """The number of processes."""
    group: dist.ProcessGroup | None = None
    """The group of torch's collectives; None in one process."""
    saving: dist.ProcessGroup | None = None
    """A group of the same processes for the thread that writes checkpoints."""
    launch: str | None = None
    """A name of torchrun's launch, which its restarts keep and no other launch has."""

    @staticmethod
    @contextmanager
    def from_environment(device: str) -> "Iterator[World]":
        """Join the processes that a launcher started, within the context.

        The first process alone prints, and a mistake that several find is told by one of them.

        Args:
            device: The setting `train.device`: cuda (or auto, on a machine with GPUs) gives each
                process the GPU of its local rank.

        Raises:
            UserError: The environment is incomplete, there are too few GPUs, or a connection was
                lost.
            SystemExit: Another process has told the mistake.
        """
        size = num_processes()
        if size == 1:
            yield World(launch=_launch_of_one())
            return
        rank, local_rank = launcher_number("RANK"), launcher_number("LOCAL_RANK")
        on_gpu = _choose_gpu(device, size, local_rank)
        store, launch = _store(rank, size)
        try:
            with silenced(rank > 0):
                world = World(rank=rank, size=size, launch=launch)
                with _connecting(size):
                    dist.init_process_group(
                        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                        store=PrefixStore("group", store),
                        rank=rank,
                        world_size=size,
                        timeout=TIMEOUT,
                    )
                    saving = dist.new_group(backend="gloo", timeout=TIMEOUT)
                # fully_shard exchanges tensors without the methods below.
                with world._explained():
                    yield replace(world, group=dist.group.WORLD, saving=saving)
        except UserError as error:
            told = 0
            with suppress(RuntimeError):
                told = store.add("told", 1) - 1
            if told:
                raise SystemExit(2) from error
            if rank:
                raise RankError(f"process {rank}: {error}") from error
            raise
        dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """True in the process that writes records and lines for all."""
        return self.rank == 0

    def mine(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's share of some items: those numbered rank, rank + size, ..."""
        return items[self.rank :: self.size]

    def lacks_one(self, num_items: int) -> bool:
        """Return True if this process's share of some items is smaller than the first one's."""
        return self.rank >= num_items % self.size > 0

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, which has the same bits in all.

        Args:
            tensors: Tensors of any shapes and formats, in the same order in every process.
        """
        if self.size == 1:
            return
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        with self._explained():
            for kind in kinds.values():
                for numbers in messages([tensor.nbytes for tensor in kind]):
                    self._sum_together([kind[number] for number in numbers])

    def _sum_together(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one format by their sums over all processes, in one message."""
        if len(tensors) == 1 and tensors[0].is_contiguous():
            dist.all_reduce(tensors[0], group=self.group)
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        parts = [part.view_as(tensor) for tensor, part in zip(tensors, parts, strict=True)]
        # A copy each would be hundreds of launches, which take the host longer than the message.
        torch._foreach_copy_(list(tensors), parts)  # pyright: ignore[reportPrivateImportUsage]

    def broadcast(self, tensors: Sequence[Tensor], sources: Sequence[int] | None = None) -> None:
        """Replace each tensor by that of one process.

        Args:
            tensors: Tensors of any shapes and formats, in the same order in every process.
            sources: The rank of the process that has each tensor; None: the first one has all.
        """
        if self.size == 1:
            return
        ranks = sources or [0] * len(tensors)
        sent = [tensor.contiguous() for tensor in tensors]
        with self._explained():
            works = [
                dist.broadcast(tensor, group=self.group, group_src=rank, async_op=True)
                for tensor, rank in zip(sent, ranks, strict=True)
            ]
            for work in works:
                assert work is not None
                work.wait()
        for tensor, copy in zip(tensors, sent, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)

    def any_true(self, flag: bool) -> bool:
        """Return True if the flag is true in any process; a GPU is not waited for."""
        if self.size == 1:
            return flag
        count = torch.tensor([int(flag)])
        self.all_reduce_sum([count])
        return bool(count)

    def least(self, number: int) -> int:
        """Return the smallest of the processes' numbers."""
        if self.size == 1:
            return number
        numbers = torch.zeros(self.size, dtype=torch.int64)
        numbers[self.rank] = number
        self.all_reduce_sum([numbers])
        return int(numbers.min())

    def of_first(self, number: int) -> int:
        """Return the first process's number, in every process."""
        if self.size == 1:
            return number
        numbers = torch.tensor([number])
        self.broadcast([numbers])
        return int(numbers)

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.any_true(False)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn a lost connection into the line that says what to do; other errors are faults."""
        try:
            yield
        except RuntimeError as error:
            if not is_lost(error):
                raise
            raise UserError(
                f"got an end of another process of this run or of its connection"
                f" ({reason_of(error)}), expected all {self.size} processes until the end; see what"
                " the launcher says about it, and go on with --resume"
            ) from error


ALONE = World()
"""The world of one process."""


def is_lost(error: RuntimeError) -> bool:
    """Return True if an error of a collective says that a connection to another process failed."""
    text = str(error)
    gloo = any(part in text for part in LOST) and BROKEN_RULE not in text
    return gloo or isinstance(error, dist.DistError)


def messages(sizes: Sequence[int]) -> list[list[int]]:
    """Return the numbers of the tensors that travel together, by the tensors' bytes, in order.

    A tensor of `MESSAGE_BYTES` or more travels alone.
    """
    groups: list[list[int]] = []
    room = 0
    for number, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = MESSAGE_BYTES
        groups[-1].append(number)
        room -= size
    return groups


def balanced(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """Return the rank of the process that gets each item, so that all get about as much.

    The largest items come first, each to the process that has least so far.

    Args:
        sizes: The size of each item.
        num_ranks: The number of processes.
    """
    loads, ranks = [0] * num_ranks, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        ranks[number] = loads.index(min(loads))
        loads[ranks[number]] += sizes[number]
    return ranks


def check_world(config: RunConfig, world: World) -> None:
    """Refuse settings whose steps cannot be divided evenly over the processes.

    Raises:
        UserError: `train.rows_per_step` is no multiple of the number of processes, or the experts
            are cut and their number is none.
    """
    rows = config.train.rows_per_step
    if rows % world.size:
        raise UserError(
            f"train.rows_per_step: got {rows} with {world.size} processes, expected a multiple of"
            f" {world.size}, since every process takes as many rows of a step; write"
            f" {-(-rows // world.size) * world.size}, or start as many processes as divide it"
        )
    if config.train.shard == "full":
        check_shares(config.experts.num_experts, world.size)


def check_shares(num_experts: int, num_processes: int) -> None:
    """Refuse experts that do not divide evenly over the processes that hold shares of them.

    Raises:
        UserError: the number of experts is no multiple of the number of processes.
    """
    if num_experts % num_processes:
        raise UserError(
            f'train.shard: got "full" with {num_processes} processes and {num_experts} experts,'
            f" expected a multiple of {num_processes} experts, since every process holds as many of"
            ' them whole; start as many processes as divide it, or set train.shard = "optimizer"'
        )


@contextmanager
def _connecting(size: int) -> Iterator[None]:
    """Turn the errors of processes that do not find each other into one line."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        # A variable that is missing is missing in all processes; a connection may fail in one.
        rank = launcher_number("RANK", 0)
        kind = RankError if rank and isinstance(error, RuntimeError) else UserError
        raise kind(
            f"WORLD_SIZE: got {size} processes that do not find each other"
            f" ({reason_of(error)}), expected the address and the port that a launcher sets, and a"
            " network between them; start them with torchrun"
        ) from error


def _store(rank: int, size: int) -> tuple[Store, str]:
    """Return the table by which the processes of this start find each other, and the launch."""
    with _connecting(size):
        store, _, _ = next(rendezvous("env://", rank, size, timeout=TIMEOUT))
        launch = name_of_launch(store)
        start = name_of_start(store, rank, size)
    # Processes that are started again do not meet what the ones before them left.
    return PrefixStore(f"tiny_onn {start}", store), launch


def _launch_of_one() -> str | None:
    """Return the name of the launch of a process that torchrun started alone; None without one."""
    if not under_torchrun():
        return None
    # The variables may be those of a launcher that has ended.
    with suppress(ValueError, RuntimeError):
        store, _, _ = next(rendezvous("env://", 0, 1, timeout=ANSWERED_WITHIN))
        return name_of_launch(store)
    return None


def name_of_launch(store: Store) -> str:
    """Return a name that the processes of a launch share over all of its starts.

    torchrun's id of a launch is no such name, because users may give the same id to many launches.
    torchrun's own process holds the table while it starts the others anew, so that the table's
    first name is that of the launch. A table that ends with the processes gives each start a name
    of its own.

    Args:
        store: The launcher's table.
    """
    return store.compare_set("tiny_onn launch", "", secrets.token_hex(8)).decode()


def name_of_start(store: Store, rank: int, size: int) -> str:
    """Return a name that the processes of this start share, and that no earlier start had.

    The launcher's table may outlive the processes. Its count of restarts is no such name, because
    the agent of each machine counts only the failures of its own processes. So each process asks by
    a new name of its own, and the first one answers until all of them have its answer.

    Args:
        store: The launcher's table, which may hold entries of earlier starts.
        rank: The number of this process.
        size: The number of processes, all of which make this call.

    Raises:
        RuntimeError: A process does not come in time.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"asks {rank}", own)
        start = store.get(f"answer {own}").decode()
        store.set(f"knows {start} {rank}", "1")
        return start
    waiting, until = set(range(1, size)), time.monotonic() + TIMEOUT.total_seconds()
    while waiting:
        for other in waiting:
            if store.check([f"asks {other}"]):
                store.set(f"answer {store.get(f'asks {other}').decode()}", own)
        waiting = {other for other in waiting if not store.check([f"knows {own} {other}"])}
        if waiting and time.monotonic() > until:
            raise RuntimeError(f"process {min(waiting)} did not come")
        time.sleep(ASKED_EVERY_S)
    return own


def _choose_gpu(device: str, size: int, local_rank: int) -> bool:
    """Let this process use the GPU of its local rank; return False if it uses the CPU."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return False
    if device not in ("auto", "cuda"):
        raise UserError(
            f"train.device: got {device} with {size} processes, expected auto, cuda or cpu; each"
            " process takes the GPU of its local rank"
        )
    if local_rank >= (found := torch.cuda.device_count()):
        # Other processes of this machine may have a device each, so the first one without tells it.
        raise (RankError if local_rank == found else UserError)(
            f"train.device: got local rank {local_rank} on a machine with {found} CUDA devices,"
            " expected a device per process; lower --nproc-per-node"
        )
    torch.cuda.set_device(local_rank)
    return True
