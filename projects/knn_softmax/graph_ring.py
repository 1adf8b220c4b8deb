"""The shards of all ranks, one after another, on every rank: a ring.

In step s rank p holds the shard of rank (p + s) mod P. While it works on it, it already sends it on to rank p - 1 and
receives the next one from rank p + 1, so after P steps everyone has seen everything and holds two foreign
shards at most. Each rank sends N - n rows of float32 a build.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from alimm.distributed import Sharding


def ring(shard_NW: Tensor, sharding: Sharding) -> Iterator[tuple[int, Tensor]]:
    """Yield (rank of the owner, its rows), the own ones first.

    Every rank has to go through all of it. The rows must not be changed meanwhile.

    Args:
        shard_NW: the own rows, contiguous; shards may be of different length or empty.
        sharding: whose rows they are.
    """
    size, rank, group = sharding.world_size, sharding.rank, sharding.group
    current = shard_NW
    for step in range(size):
        owner = (rank + step) % size
        waiting: list[dist.Work] = []
        following = current
        if step + 1 < size:
            following = current.new_empty((sharding.shards.size((owner + 1) % size), current.shape[1]))
            operations = []
            if len(current):
                operations.append(dist.P2POp(dist.isend, current, _peer(rank - 1, size, group), group))
            if len(following):
                operations.append(dist.P2POp(dist.irecv, following, _peer(rank + 1, size, group), group))
            if operations:
                waiting = dist.batch_isend_irecv(operations)
        yield owner, current
        for work in waiting:
            work.wait()
        current = following


def _peer(rank: int, size: int, group: dist.ProcessGroup | None) -> int:
    """The rank in the default group, which point-to-point operations are addressed by."""
    return rank % size if group is None else dist.get_global_rank(group, rank % size)


def total(count: int, device: torch.device, sharding: Sharding) -> int:
    """The sum over all ranks, on each of them."""
    if sharding.world_size == 1:
        return count
    value = torch.tensor(count, device=device)
    dist.all_reduce(value, group=sharding.group)
    return int(value)


def largest(value: float, device: torch.device, sharding: Sharding) -> float:
    """The maximum over all ranks, on each of them."""
    if sharding.world_size == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=sharding.group)
    return float(tensor)
