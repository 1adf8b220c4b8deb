from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.gloo_pool import GlooError, GlooPool


def sum_of_ranks(scale: int) -> tuple[int, int, float]:
    value = torch.tensor([float((dist.get_rank() + 1) * scale)])
    dist.all_reduce(value)
    return dist.get_rank(), dist.get_world_size(), value.item()


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("the label of the failing rank")
    dist.barrier()


def die_on(rank: int) -> int:
    if dist.get_rank() == rank:
        os._exit(7)
    return os.getpid()


def sleep_on_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(60)


def process_and_threads() -> tuple[int, int]:
    return os.getpid(), torch.get_num_threads()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_reduce_reaches_every_rank(gloo: GlooPool, world_size: int) -> None:
    results = gloo.run(world_size, sum_of_ranks, 10)
    total = 10.0 * sum(range(1, world_size + 1))
    assert results == [(rank, world_size, total) for rank in range(world_size)]


def test_workers_are_reused_with_one_thread_each(gloo: GlooPool) -> None:
    first = gloo.run(2, process_and_threads)
    assert gloo.run(2, process_and_threads) == first
    assert len({pid for pid, _ in first} | {os.getpid()}) == 3
    assert [threads for _, threads in first] == [1, 1]


def test_a_traceback_reaches_the_test_and_the_pool_goes_on(gloo: GlooPool) -> None:
    begin = time.monotonic()
    with pytest.raises(GlooError, match=r"rank 1 of 2: Traceback(.|\n)*raise_on(.|\n)*the label of the failing rank"):
        gloo.run(2, raise_on, 1)
    assert time.monotonic() - begin < 10
    assert [total for _, _, total in gloo.run(2, sum_of_ranks, 1)] == [3.0, 3.0]


def test_a_worker_that_dies_is_reported_and_replaced(gloo: GlooPool) -> None:
    with pytest.raises(GlooError, match="rank 0 of 2: died with exit code 7"):
        gloo.run(2, die_on, 0)
    assert len(gloo.run(2, die_on, -1)) == 2


def test_a_worker_killed_between_calls_is_replaced(gloo: GlooPool) -> None:
    gloo.run(1, process_and_threads)
    os.kill(gloo.process_ids()[0], 9)
    time.sleep(0.2)
    assert gloo.run(1, sum_of_ranks, 1) == [(0, 1, 1.0)]


def test_a_hang_is_bounded_and_shows_where(gloo: GlooPool) -> None:
    gloo.run(2, process_and_threads)
    begin = time.monotonic()
    with pytest.raises(GlooError, match=r"rank 1 of 2: did not end within 2 s(.|\n)*sleep_on_last"):
        gloo.run(2, sleep_on_last, timeout=2.0)
    assert time.monotonic() - begin < 8


def test_a_lambda_is_refused(gloo: GlooPool) -> None:
    with pytest.raises(ValueError, match="top level of a module"):
        gloo.run(1, lambda: None)
