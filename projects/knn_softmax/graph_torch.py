"""`Search` in plain torch, on any device: a tile, its best few, merged with the best so far. No limit on k."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from alimm.projects.knn_softmax.graph_search import Clock, Search
from alimm.projects.knn_softmax.graph_units import DTYPES, output_slack, similarity, tolerance
from alimm_ops.graph.topk_reference import PADDING_ID

_PAIRS = 1 << 18
"""Pairs whose rows are held in double precision at a time."""


class TorchSearch(Search):
    """See `Search`."""

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
        super().__init__(queries_QW, query_ids_Q, k, width, precision, largest_error, tile, clock)
        self.scores = torch.full((len(queries_QW), width), -torch.inf, device=queries_QW.device)
        self.candidates = torch.full_like(self.scores, PADDING_ID, dtype=torch.int64)

    def visit(self, rows_NW: Tensor, first_id: int, same: bool) -> Iterator[float]:
        """See `Search`."""
        if not len(rows_NW) or not len(self.queries):
            return
        rounded = self.rounded if same else rows_NW.to(DTYPES[self.precision])
        for top, bottom, left, right in self.tiles(len(self.queries), len(rows_NW)):
            with self.clock.phase("product"):
                scores = (self.rounded[top:bottom] @ rounded[left:right].t()).float()
            self.clock.flop += 2.0 * scores.numel() * rounded.shape[1]
            with self.clock.phase("scan"):
                ids = torch.arange(first_id + left, first_id + right, device=scores.device)
                scores.masked_fill_(ids == self.query_ids[top:bottom, None], -torch.inf)
                best, place = scores.topk(min(self.width, right - left))
                scores = torch.cat([self.scores[top:bottom], best], 1)
                ids = torch.cat([self.candidates[top:bottom], ids[place]], 1)
                self.scores[top:bottom], place = scores.topk(self.width)
                self.candidates[top:bottom] = ids.gather(1, place)
            if right == len(rows_NW):
                yield bottom / len(self.queries)
        with self.clock.phase("rank"):
            self._rank(rows_NW, first_id)

    def _rank(self, rows_NW: Tensor, first_id: int) -> None:
        step = max(1, _PAIRS // self.width)
        for start in range(0, len(self.queries), step):
            part = slice(start, start + step)
            ids, scores = self.candidates[part], self.scores[part]
            here = (ids >= first_id) & (ids < first_id + len(rows_NW)) & (scores > -torch.inf)
            rows = rows_NW[torch.where(here, ids - first_id, 0)]
            exact = similarity(self.queries[part][:, None], rows)
            bound = self.tolerance[part][:, None] + output_slack(scores, self.precision)
            self.broken[part] |= ((scores.double() - exact).abs() > bound).logical_and_(here).any(1)
            self._merge(part, torch.where(here, ids, PADDING_ID), torch.where(here, exact, -torch.inf))

    def _merge(self, queries: slice | Tensor, ids: Tensor, values: Tensor) -> None:
        """Put candidates into the sorted lists; those with a similarity of minus infinity are padding."""
        ids = torch.cat([self.ids[queries], ids], 1)
        values = torch.cat([self.similarity[queries], values], 1)
        order = ids.argsort(dim=1, stable=True)
        order = order.gather(1, values.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, : self.k]
        self.ids[queries], self.similarity[queries] = ids.gather(1, order), values.gather(1, order)

    def unseen(self) -> Tensor:
        """See `Search`."""
        last = self.scores[:, -1]
        none = last == -torch.inf
        last = torch.where(none, 0.0, last)
        return torch.where(none, -torch.inf, last.double() + output_slack(last, self.precision))

    def revisit(
        self, select: Tensor, rows_NW: Tensor, first_id: int, precision: str, floors: Tensor
    ) -> Iterator[float]:
        """See `Search`."""
        dtype = DTYPES[precision]
        zero = torch.zeros(1, dtype=torch.float64)
        bound = float(tolerance(zero, 0.0, rows_NW.shape[1], precision))
        for top, bottom, left, right in self.tiles(len(select), len(rows_NW)):
            chosen = select[top:bottom]
            scores = self.queries[chosen].to(dtype) @ rows_NW[left:right].to(dtype).t()
            self.clock.flop += 2.0 * scores.numel() * rows_NW.shape[1]
            ids = torch.arange(first_id + left, first_id + right, device=scores.device)
            last = self.similarity[chosen, -1:]
            wanted = scores >= torch.maximum(floors[chosen, None], last).double() - bound
            wanted &= ids != self.query_ids[chosen, None]
            # Nothing is more similar than one: with a full list of copies, a later copy needs no second look.
            wanted &= ~((last == 1) & (ids > self.ids[chosen, -1:]))
            line, column = wanted.nonzero(as_tuple=True)
            for start in range(0, len(line), _PAIRS):
                part = slice(start, start + _PAIRS)
                self._add_pairs(chosen, line[part], column[part] + left, rows_NW, first_id, scores, left, bound)
            if right == len(rows_NW):
                yield bottom / len(select)

    def _add_pairs(
        self,
        chosen: Tensor,
        line: Tensor,
        column: Tensor,
        rows_NW: Tensor,
        first_id: int,
        scores: Tensor,
        left: int,
        bound: float,
    ) -> None:
        """Merge pairs of a query (by its line of the tile) and a row, sorted by line and row."""
        values = similarity(self.queries[chosen[line]], rows_NW[column])
        off = (scores[line, column - left].double() - values).abs() > bound
        self.broken[chosen[line[off]]] = True
        order = values.argsort(descending=True, stable=True)
        order = order[line[order].argsort(stable=True)]
        line, column, values = line[order], column[order], values[order]
        first = torch.searchsorted(line, line)  # position of the best pair of the same query
        rank = torch.arange(len(line), device=line.device) - first
        kept = rank < self.k
        lines, where = line[kept].unique_consecutive(return_inverse=True)
        shape = (len(lines), self.k)
        ids = torch.full(shape, PADDING_ID, dtype=torch.int64, device=line.device)
        found = torch.full(shape, -torch.inf, device=line.device)
        ids[where, rank[kept]] = column[kept] + first_id
        found[where, rank[kept]] = values[kept]
        self._merge(chosen[lines], ids, found)
