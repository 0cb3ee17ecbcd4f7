"""The name of a start, by which processes that are started again find each other and no others."""

from concurrent.futures import ThreadPoolExecutor

from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from tiny_onn.parallel import name_of_launch, name_of_start


def start(store, size):
    """The names that the processes of one start agree on, here threads with one table."""
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(lambda rank: name_of_start(store, rank, size), range(size)))


def test_all_processes_of_a_start_have_one_name_and_each_start_another():
    store = HashStore()
    names = [start(store, size) for size in (4, 4, 2, 3)]
    assert all(len(set(name)) == 1 for name in names)
    assert len({name[0] for name in names}) == len(names)


def test_what_a_killed_process_asked_does_not_stand_for_the_next_one():
    store = HashStore()
    store.set("asks 1", "of a process that was killed before it had an answer")
    first, second = start(store, 2)
    assert first == second


def test_all_starts_of_a_launch_have_its_name_and_each_launch_another():
    stores = HashStore(), HashStore()
    names = [{name_of_launch(store) for _ in range(3)} for store in stores]
    assert [len(name) for name in names] == [1, 1]
    assert names[0] != names[1]
