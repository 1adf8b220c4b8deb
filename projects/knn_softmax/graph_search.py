"""Exact nearest rows of a set of queries, shard by shard: what the two ways of computing it share.

`visit` compares the queries with a shard in low precision and ranks the best few candidates exactly. After the last
shard `certified` says whose list is proven: nobody who was turned away can reach its end. The others are emptied and go
through the shards again with `revisit`, in float32, which misses nobody who reaches the floor set by the first list.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from alimm.projects.knn_softmax.graph_units import DTYPES, rounding_errors, tolerance
from alimm_ops.graph.topk_reference import PADDING_ID


class Clock:
    """Seconds by phase and operations of matrix products."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.flop = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to a phase. On a GPU it is that of the launches, unless something waits for them."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


class Search(ABC):
    """Queries and their lists.

    Args:
        queries_QW: unit rows, float32.
        query_ids_Q: their ids, int64; a row with the id of the query is never its neighbour.
        k: how many neighbours, at least 1.
        width: how many candidates to keep, at least k.
        precision: of the first product.
        largest_error: the largest rounding error of any row that will be visited.
        tile: rows and columns of a product.
        clock: where the time goes.
    """

    def __init__(
        self,
        queries_QW: Tensor,
        query_ids_Q: Tensor,
        k: int,
        width: int,
        precision: str,
        largest_error: float,
        tile: tuple[int, int],
        clock: Clock,
    ) -> None:
        assert 1 <= k <= width
        self.queries, self.query_ids, self.k, self.width = queries_QW, query_ids_Q, k, width
        self.precision, self.tile, self.clock = precision, tile, clock
        self.errors = rounding_errors(queries_QW, precision)
        self.tolerance = tolerance(self.errors, largest_error, queries_QW.shape[1], precision)
        self.rounded = queries_QW.to(DTYPES[precision])
        # The list of a zero row is known without looking (`fill_zero_rows`).
        self.is_zero = ~queries_QW.any(1)
        shape = (len(queries_QW), k)
        self.ids = torch.full(shape, PADDING_ID, dtype=torch.int64, device=queries_QW.device)
        self.similarity = torch.full(shape, -torch.inf, device=queries_QW.device)
        self.broken = torch.zeros(len(queries_QW), dtype=torch.bool, device=queries_QW.device)

    @abstractmethod
    def visit(self, rows_NW: Tensor, first_id: int, same: bool) -> Iterator[float]:
        """Compare with a shard; yields the share done.

        Args:
            rows_NW: unit rows of the ids from ``first_id`` on.
            first_id: id of the first one.
            same: the rows are the queries themselves.
        """

    @abstractmethod
    def unseen(self) -> Tensor:
        """The largest score that may have been turned away, its rounding included, float64 (Q,)."""

    @abstractmethod
    def revisit(
        self, select: Tensor, rows_NW: Tensor, first_id: int, precision: str, floors: Tensor
    ) -> Iterator[float]:
        """Compare some queries, their lists emptied before, with a shard, completely.

        Args:
            select: the queries, int64.
            rows_NW: unit rows of the ids from ``first_id`` on.
            first_id: id of the first one.
            precision: ``'fp32'`` or ``'fp64'``.
            floors: similarities that the lists of all queries are known to reach, float32 (Q,).
        """

    def certified(self, neighbours: int) -> Tensor:
        """Which lists are proven to be exact, bool (Q,).

        A row that was turned away has a score of at most `unseen`. Where this returns True its similarity is below the
        one that ends the list, also after rounding: there is not even a tie.

        Args:
            neighbours: how many neighbours there are to find, at most k.
        """
        if not neighbours:
            return torch.ones_like(self.is_zero)
        proven = self.unseen() + self.tolerance < self.similarity[:, neighbours - 1].double()
        return proven | self.is_zero

    def empty(self, select: Tensor) -> None:
        """Forget the lists of some queries."""
        self.ids[select] = PADDING_ID
        self.similarity[select] = -torch.inf

    def fill_zero_rows(self, num_rows: int) -> None:
        """A zero row has the similarity 0 with everyone, so its neighbours are the first ids but its own."""
        zero = self.is_zero.nonzero()[:, 0]
        if not len(zero):
            return
        count = min(self.k, num_rows - 1)
        self.empty(zero)
        first = torch.arange(count, device=zero.device)
        own = self.query_ids[zero][:, None]
        self.ids[zero[:, None], first] = first + (first >= own)
        self.similarity[zero[:, None], first] = 0.0

    def tiles(self, rows: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
        """First and last row and column of each tile, a band of rows after another."""
        for top in range(0, rows, self.tile[0]):
            for left in range(0, columns, self.tile[1]):
                yield top, min(top + self.tile[0], rows), left, min(left + self.tile[1], columns)
