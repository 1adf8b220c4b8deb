"""How the rows of a classifier are cut over ranks, and how a parameter says that it is such a shard.

Rank p of P holds the rows ``[start(p), stop(p))``. Shards may have any sizes, also none: with fewer rows than ranks
some ranks hold nothing and still take part in every collective.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from alimm.distributed.collectives import rank_and_size

_ATTRIBUTE = "alimm_sharding"


@dataclass(frozen=True)
class RowShards:
    """Consecutive row ranges, one a rank.

    Args:
        sizes: rows of each rank, by rank.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 0:
            raise ValueError(f"shards need a size of at least 0 for each of one or more ranks, got {self.sizes}")

    @classmethod
    def balanced(cls, num_rows: int, world_size: int) -> RowShards:
        """Sizes that differ by at most one; the first ``num_rows % world_size`` ranks hold the longer ones."""
        if num_rows < 0 or world_size < 1:
            raise ValueError(f"shards need num_rows >= 0 and world_size >= 1, got {num_rows} and {world_size}")
        size, longer = divmod(num_rows, world_size)
        return cls(tuple(size + (rank < longer) for rank in range(world_size)))

    @property
    def num_rows(self) -> int:
        """Rows of all ranks together."""
        return sum(self.sizes)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.sizes)

    @property
    def bounds(self) -> tuple[int, ...]:
        """First row of each rank, and after them the number of rows: ``world_size + 1`` values."""
        return (0, *accumulate(self.sizes))

    def size(self, rank: int) -> int:
        """Rows of a rank."""
        return self.sizes[rank]

    def start(self, rank: int) -> int:
        """First row of a rank."""
        return self.bounds[rank]

    def stop(self, rank: int) -> int:
        """The row after the last one of a rank."""
        return self.bounds[rank + 1]

    def owner(self, rows: torch.Tensor) -> torch.Tensor:
        """The rank that holds each row.

        Args:
            rows: int64, any shape, values in [0, num_rows).
        """
        bounds = torch.tensor(self.bounds[1:], device=rows.device)
        return torch.searchsorted(bounds, rows, right=True)


@dataclass(frozen=True)
class Sharding:
    """The shards, and which of them this process holds.

    Attributes:
        shards: the rows of every rank.
        rank: this process's rank in ``group``.
        group: the process group that the rows are cut over; None is the default group (or no group with one rank).
    """

    shards: RowShards
    rank: int = 0
    group: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Sharding:
        # Nothing in it changes, and a process group cannot be copied.
        return self

    @classmethod
    def over(cls, num_rows: int, group: Any = None) -> Sharding:
        """Balanced shards over a process group; a single shard where torch.distributed is not running."""
        rank, size = rank_and_size(group)
        return cls(RowShards.balanced(num_rows, size), rank, group)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.shards.world_size

    @property
    def start(self) -> int:
        """First own row."""
        return self.shards.start(self.rank)

    @property
    def stop(self) -> int:
        """The row after the last own one."""
        return self.shards.stop(self.rank)

    @property
    def size(self) -> int:
        """Own rows."""
        return self.shards.size(self.rank)


def mark_sharded(parameter: nn.Parameter, sharding: Sharding) -> None:
    """Tell optimizers, gradient clipping and DDP that a parameter is a shard and not a replica."""
    setattr(parameter, _ATTRIBUTE, sharding)


def sharding_of(parameter: torch.Tensor) -> Sharding | None:
    """What `mark_sharded` noted, or None for an ordinary parameter."""
    return getattr(parameter, _ATTRIBUTE, None)


def exclude_from_ddp(model: nn.Module) -> list[str]:
    """Tell DDP to leave the shards of ``model`` alone, else it sends rank 0's over those of all ranks.

    Call it on the module that is wrapped: DDP reads the list from there only.

    Returns:
        The names of the sharded parameters.
    """
    names = [name for name, parameter in model.named_parameters() if sharding_of(parameter) is not None]
    if names:
        known = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
        model._ddp_params_and_buffers_to_ignore = sorted(known | set(names))  # type: ignore[assignment]
    return names
